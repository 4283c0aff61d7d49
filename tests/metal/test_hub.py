"""Models of transformers: read, cut over real ranks by their own plans, exported and taken back.

The oracle is one process: transformers' model itself, or the same model uncut.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors
import torch
from torch import Tensor, nn

from cordee.cli.main import main
from cordee.config.model import ModelSettings
from cordee.config.run import MemorySettings
from cordee.dist.mesh import Mesh, make_mesh
from cordee.dist.wire import Wire
from cordee.errors import ConfigError, DataError, LayoutError, RunError
from cordee.layout.axes import Layout
from cordee.layout.tensors import TensorSpec
from cordee.model.folder import cut, open_folder, write_folder
from cordee.model.hub import Hub, HubModel, read_hub
from cordee.parallel.probe import Tried, descend, probe
from cordee.parallel.seams import check_hub_layout, set_seams
from cordee.testing import World, launch
from tests.conftest import cordee as command
from tests.conftest import digest, events, rows

transformers = pytest.importorskip("transformers", reason='needs pip install "cordee[hf]"')

SEED = 3
SMALL = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
KINDS = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False, "attention_bias": True}),
    "tied": ("LlamaConfig", {"tie_word_embeddings": True, "pad_token_id": 9}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),
    "phi3": ("Phi3Config", {"tie_word_embeddings": False, "pad_token_id": 0}),
}


def folder_of(kind: str, place: Path, **changed: object) -> str:
    name, more = KINDS[kind]
    config = getattr(transformers, name)(**{**SMALL, **more, **changed})
    config.architectures = [name.replace("Config", "ForCausalLM")]
    config.save_pretrained(place)
    return str(place)


def spoilt(folder: Path, name: str) -> None:
    """Does to a folder with weights what a copy that was interrupted, or an editor, may do."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    config = json.loads((folder / "config.json").read_text())
    shard = folder / "model-00001-of-00002.safetensors"
    match name:
        case "shards without an index":
            one.rename(shard)
        case "pickles" | "adapter_model.safetensors" | "model.safetensors.incomplete":
            one.rename(folder / ("pytorch_model.bin" if name == "pickles" else name))
        case "an index of pickles":
            one.rename(folder / "pytorch_model.bin.index.json")
        case "two sets":
            shard.write_bytes(one.read_bytes())
        case "an index and one file":
            shard.write_bytes(one.read_bytes())
            with safetensors.safe_open(one, framework="pt") as opened:
                index.write_text(
                    json.dumps({"weight_map": dict.fromkeys(opened.keys(), shard.name)})
                )
        case "a link without a target":
            one.unlink()
            one.symlink_to("nowhere")
        case "cut short":
            os.truncate(one, one.stat().st_size - 5)
        case "a pointer of Git LFS":
            one.write_text("version https://git-lfs.github.com/spec/v1\n")
        case "not finite":
            one.write_bytes(one.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
        case "index of brackets":
            index.write_text("[" * 100_000)
        case _:
            key, _, value = name.partition("=")
            text = json.dumps({**config, key: "@"}).replace('"@"', value)
            (folder / "config.json").write_text(text)


SPOILT = (
    "shards without an index", "pickles", "adapter_model.safetensors",
    "model.safetensors.incomplete", "an index of pickles", "two sets", "an index and one file",
    "a link without a target", "cut short", "a pointer of Git LFS", "not finite",
    "index of brackets", "num_hidden_layers=1", "num_hidden_layers=3", "hidden_size=1e400",
    f"hidden_size={'9' * 400}", f"hidden_size={'9' * 5000}", "hidden_size=-32",
    "num_hidden_layers=99999999", "num_attention_heads=0", "num_attention_heads=3",
    "vocab_size=1e3", "vocab_size=-1", "head_dim=7", 'hidden_act="nope"', "attention_dropout=5",
)  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_folders_that_are_not_whole(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(folder_of("llama", tmp_path / "hub"))
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    spoilt(folder, name)
    words = ("data.path=builtin:markov", "data.tokens=9000", "data.sequence=16", "run.steps=1",
             "launch.processes=1", "run.precision=fp32", "launch.threads=1", "evaluate.sample=0",
             f"model.hub={folder}", f"run.dir={tmp_path / 'run'}")  # fmt: skip
    assert main(["train", *words]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.toml").exists()


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 32, (3, 13), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, :4] = -100
    return tokens[:, :-1], targets


def live(hub: Hub, mesh: Mesh, memory: MemorySettings | None = None) -> HubModel:
    """A model's part on this rank, in the order of parallel/apply.py."""
    specs = {spec.name: spec for spec in hub.specs()}
    wire = Wire(mesh.group("tensor"), mesh.size("tensor"), mesh.index("tensor"))
    check_hub_layout(hub, specs, mesh.layout)
    model = HubModel(hub)
    model.memory = memory or MemorySettings()
    for name, parameter in list(model.named_parameters()):
        box = specs[name].box(mesh.layout, mesh.at, upto="tensor")
        part = cut(torch.empty(parameter.shape, device="meta"), box).contiguous()
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(part))
    model.retie()
    set_seams(model, wire)
    if mesh.shard_mesh is not None:
        from torch.distributed.fsdp import fully_shard

        for unit in (*model.parts(), model):
            fully_shard(unit, mesh=mesh.shard_mesh)
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)
    model.to_empty(device="cpu")
    model.retie()
    model.remake_buffers()
    values = hub.values(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            held = getattr(parameter, "_local_tensor", parameter)
            held.copy_(values(name, specs[name].box(mesh.layout, mesh.at)))
    return model


def alone(path: str) -> HubModel:
    return live(read_hub(path), Mesh(Layout(), 0, dict.fromkeys(
        ("island", "pipeline", "context", "expert", "shard", "tensor"), 0), {}, None))  # fmt: skip


def gradients(model: HubModel, rows: slice = slice(None)) -> tuple[float, dict[str, Tensor]]:
    """Loss, and gradients by name (this rank's parts)."""
    tokens, targets = batch()
    loss = model(tokens[rows], targets[rows])
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None for g in grads.values())
    return float(loss.detach()), {
        n: getattr(g, "_local_tensor", g).clone() for n, g in grads.items()
    }


Case = tuple[str, str, Layout, MemorySettings]


Found = tuple[str, float, float, float, bool]


def cut_rank(
    world: World, cases: list[Case], probe_path: str
) -> tuple[list[Found], tuple[bool, str]]:
    """Of each case: its name, loss, the whole model's loss, the largest relative error of a
    gradient, and whether tied parameters are one and listed once. Then what `probed` finds."""
    torch.set_num_threads(1)
    found = []
    for name, path, layout, memory in cases:
        mesh = make_mesh(layout, world.rank, world.device)
        hub = read_hub(path)
        model = live(hub, mesh, memory)
        ties = all(model.get_parameter(a) is model.get_parameter(b) for a, b in hub.ties.items())
        shards = [slice(0, 2), slice(2, 3)] if layout.shard > 1 else [slice(None)]
        loss, grads = gradients(model, shards[mesh.at["shard"]])
        whole_loss, whole = gradients(alone(path))
        specs = {spec.name: spec for spec in hub.specs()}
        worst = max(_apart(grads[n], whole[n], specs[n], mesh) for n in specs)
        total = Wire(mesh.group("shard"), mesh.size("shard"), 0).total(torch.tensor(loss))
        once = ties and len(grads) == len(specs)
        found.append((name, float(total), whole_loss, worst, once))
    return found, probed(world, probe_path)


def _apart(grad: Tensor, whole: Tensor, spec: TensorSpec, mesh: Mesh) -> float:
    """How far a rank's gradient, after the sums it still needs, is from its part of the whole."""
    if axes := spec.summed(mesh.layout):
        grad = Wire(mesh.group(*axes), mesh.size(*axes), 0).total_now(grad)
    mine = cut(whole, spec.box(mesh.layout, mesh.at))
    return float((grad - mine).abs().max() / whole.abs().max()) if mine.numel() else 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_transformers_own(kind: str, tmp_path: Path) -> None:
    path = folder_of(kind, tmp_path)
    model = alone(path).eval()
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(path), dtype=torch.float32
    ).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    tokens, targets = batch()
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=0)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=0, atol=0)
    assert dict(model.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    plain = model(tokens, targets)
    model.memory = MemorySettings(loss_chunk=5)
    torch.testing.assert_close(model(tokens, targets), plain, rtol=1e-6, atol=0)


def test_values_start_by_the_models_own_rules(tmp_path: Path) -> None:
    hub = read_hub(folder_of("llama", tmp_path, hidden_size=256, head_dim=64))
    values, again = hub.values(SEED), hub.values(SEED)
    names = [spec.name for spec in hub.specs()]
    boxes = {s.name: tuple((0, n) for n in s.shape) for s in hub.specs()}
    first = {name: values(name, boxes[name]) for name in names}
    for name in reversed(names):  # the order of asking does not matter
        assert torch.equal(again(name, boxes[name]), first[name])
    assert abs(float(first["model.layers.0.mlp.up_proj.weight"].std()) - 0.02) < 1e-3
    assert not torch.equal(first[names[1]], first[names[1].replace("0", "1")])
    assert torch.equal(first["model.norm.weight"], torch.ones(256))


CASES = {
    2: [("llama", Layout(tensor=2)), ("qwen3", Layout(tensor=2)), ("phi3", Layout(tensor=2)),
        ("tied", Layout(tensor=2)), ("tied", Layout(shard=2)), ("qwen3", Layout(shard=2))],
    4: [("qwen3", Layout(tensor=4)), ("tied", Layout(shard=2, tensor=2)),
        ("qwen3", Layout(shard=2, tensor=2))],
}  # fmt: skip


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_cut_over_ranks_is_the_same_model(ranks: int, tmp_path: Path) -> None:
    """qwen3 with the levers of memory as well: recomputed layers and a loss by chunks. The probe
    passes a right cut, puts parameters back, and refuses a wrong one."""
    levers = {"qwen3": MemorySettings(loss_chunk=7, recompute="full")}
    paths = {kind: folder_of(kind, tmp_path / kind) for kind in KINDS}
    cases = [
        (f"{kind}: {layout.describe()}", paths[kind], layout, levers.get(kind, MemorySettings()))
        for kind, layout in CASES[ranks]
    ]
    for found, (put_back, said) in launch(cut_rank, cases, paths["qwen3"], ranks=ranks):
        assert put_back
        assert "not that of the whole" in said
        for name, loss, whole, worst, once in found:
            assert loss == pytest.approx(whole, rel=1e-5), name
            assert worst < 1e-5, name
            assert once, name


def probed(world: World, path: str) -> tuple[bool, str]:
    """Whether a right cut passes and gets its parameters back; what is said of a wrong one."""
    torch.set_num_threads(1)
    mesh = make_mesh(Layout(tensor=world.size), world.rank, world.device)
    model, whole = live(read_hub(path), mesh), alone(path)
    wire = Wire(mesh.group("tensor"), world.size, world.rank)
    specs = {s.name: s for s in read_hub(path).specs()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def step(module: HubModel, cuts: bool) -> None:
        module.zero_grad()
        (module(*batch()) / 36).backward()
        grads = []
        for name, p in module.named_parameters():
            assert p.grad is not None
            summed = cuts and specs[name].summed(mesh.layout)
            grads.append(wire.total_now(p.grad) if summed else p.grad)
        descend([p.detach() for p in module.parameters()], grads, 0.1)

    def tried(module: HubModel, cuts: bool) -> Tried:
        return Tried(lambda: module(*batch()), lambda: step(module, cuts))

    parts = [p.detach() for p in model.parameters()]
    probe(tried(model, True), parts, wire, tried(whole, False))
    put_back = all(torch.equal(before[n], p) for n, p in model.named_parameters())
    with torch.no_grad():  # a norm that only rank 1 scales
        model.get_parameter("model.norm.weight").mul_(1.0 + 0.1 * world.rank)
    try:
        probe(tried(model, True), parts, wire, tried(alone(path), False))
    except RunError as error:
        return put_back, error.what
    return put_back, ""


def test_layouts_that_the_plan_has_not_are_refused(tmp_path: Path) -> None:
    def refused(layout: Layout, kind: str = "llama", **changed: object) -> str:
        where = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        hub = read_hub(folder_of(kind, where, **changed))
        with pytest.raises(LayoutError) as raised:
            check_hub_layout(hub, {s.name: s for s in hub.specs()}, layout)
        return str(raised.value.fix)

    assert refused(Layout(pipeline=2)).startswith("layout.pipeline=1")
    assert refused(Layout(tensor=3)) == "layout.tensor=2"
    assert refused(Layout(tensor=4), num_key_value_heads=2) == "layout.tensor=2"
    assert refused(Layout(tensor=2), vocab_size=33) == "layout.tensor=1"
    assert "dropout of 0" in refused(Layout(tensor=2), attention_dropout=0.1)
    gpt2 = tmp_path / "gpt2"
    transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=32).save_pretrained(gpt2)
    with pytest.raises(LayoutError, match="no tensor-parallel plan"):
        check_hub_layout(read_hub(str(gpt2)), {}, Layout(tensor=2))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hub(str(tmp_path / "nowhere"))


def test_dropout_is_a_function_of_the_key(tmp_path: Path) -> None:
    model = alone(folder_of("llama", tmp_path, attention_dropout=0.3)).train()
    tokens, targets = batch()
    state = torch.get_rng_state()
    first, other, again = (float(model(tokens, targets, key)) for key in (1, 2, 1))
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state())


def test_a_folder_goes_out_and_comes_back(tmp_path: Path) -> None:
    path = folder_of("tied", tmp_path / "plan")
    model = alone(path).eval()
    held = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in held.items()}
    config = json.loads((tmp_path / "plan" / "config.json").read_text())
    out = tmp_path / "out"
    write_folder(out, config, shapes, lambda name: held[name].detach(), 6_000)
    files = sorted(f.name for f in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0].startswith("model-00001-of-000")
    assert max(f.stat().st_size for f in out.glob("*.safetensors")) < 8_000
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens, _ = batch()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)
    back = alone(str(out)).eval()  # weights are there: nothing is drawn
    torch.testing.assert_close(back(tokens), model(tokens), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="exists"):
        write_folder(out, config, shapes, lambda name: held[name].detach(), 6_000)
    (out / files[1]).write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot be read"):
        read_hub(str(out))
    (out / files[1]).unlink()
    with pytest.raises(ConfigError, match="missing"):
        open_folder(str(out), "model.hub")


def test_a_model_without_knobs_of_ours_names_the_knob() -> None:
    from cordee.model.equivalent import equivalent

    with pytest.raises(ConfigError, match="no model with this knob") as raised:
        equivalent(ModelSettings(), 256)
    assert "model.mlp=gated" in str(raised.value.fix)


WORDS = (
    "data.path=builtin:markov", "data.tokens=20000", "data.sequence=16", "batch.microbatch=2",
    "batch.microbatches=4", "run.precision=fp32", "run.steps=10", "launch.threads=1",
    "evaluate.tokens=1024", "optim.name=adamw", "optim.lr=0.003", "checkpoint.every=1",
)  # fmt: skip


def trained(place: Path, path: str, *words: str, code: int = 0) -> list[float]:
    """The losses of `cordee train` of the folder `path`."""
    done = command("train", f"model.hub={path}", f"run.dir={place}", *WORDS, *words)
    assert done.returncode == code, done.stderr[-3000:]
    return [float(str(row["loss"])) for row in rows(place)]


def test_the_command_trains_a_folder_on_any_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With weights and tied: shard x tensor is killed, islands go on; then every verb."""
    bare = folder_of("tied", tmp_path / "bare", vocab_size=64, num_key_value_heads=2)
    config = transformers.AutoConfig.from_pretrained(bare)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    source, cut = str(tmp_path / "source"), tmp_path / "cut"
    one = trained(tmp_path / "one", source, "launch.processes=1", "evaluate.sample=0")
    four = ("layout.shard=2", "layout.tensor=2", "fault.kill=step.agree:8:3", "fault.recover=false")
    trained(cut, source, *four, code=1)
    assert trained(cut, source, "layout.islands=2") == pytest.approx(one, rel=1e-5)
    assert "resumed" in [event["event"] for event in events(cut)]
    ends = [events(folder)[-1] for folder in (tmp_path / "one", cut)]
    assert ends[1]["held_out_loss"] == pytest.approx(ends[0]["held_out_loss"], rel=1e-5)
    assert one[-1] < one[0]
    for words in (["report"], ["fingerprint"], ["export", "--to", "hf"], ["export"]):
        assert main([words[0], str(cut), *words[1:]]) == 0
    assert digest(cut) in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(cut / "hf")
    held = (cut / "model.safetensors").exists()
    assert held and theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert main(["sample", str(cut)]) == 2  # its tokens are no text


def test_a_folder_writes_text_and_is_exact(tmp_path: Path) -> None:
    """Without weights, on text: one digest for one process and for shards; then a sample."""
    source = folder_of("llama", tmp_path / "llama", vocab_size=256)
    (tmp_path / "text").write_text("to be or not to be, that is the question\n" * 300)
    words = (f"data.path={tmp_path / 'text'}", "data.tokens=0", "run.exact=true", "run.steps=4")
    found = set()
    for place, layout in enumerate(("launch.processes=1", "layout.shard=2")):
        trained(tmp_path / str(place), source, *words, layout, "evaluate.sample=8")
        found.add(digest(tmp_path / str(place)))
    assert len(found) == 1
    said = command("sample", str(tmp_path / "1"), "--tokens", "8", "--json")
    assert said.returncode == 0, said.stderr
    assert len(json.loads(said.stdout)["text"]) >= 4


def test_the_command_refuses_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder_of("llama", tmp_path / "llama", num_key_value_heads=2, vocab_size=64)
    place = tmp_path / "run"
    for words, fix in (
        (["layout.tensor=4"], "layout.tensor=2"),
        (["layout.pipeline=2"], "layout.pipeline=1"),
        (["model.layers=7"], "leave model.layers out"),
        (["run.precision=fp8"], "run.precision=bf16"),
        ([f"model.hub={tmp_path / 'no'}"], "config.json"),
        (["data.path=builtin:stdlib"], "data of that vocabulary"),
    ):
        given = ["data.path=builtin:markov", f"model.hub={source}", f"run.dir={place}", *words]
        assert main(["train", *given]) == 2
        assert fix in capsys.readouterr().err, words
        assert not place.exists()
