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
from cordee.dist.autograd_collectives import AxisComm
from cordee.dist.mesh import Mesh, make_mesh
from cordee.errors import ConfigError, DataError, LayoutError, RunError
from cordee.hf.model import HubModel, HubSource, read_hub
from cordee.hf.safetensors_io import open_folder, slice_box, write_folder
from cordee.launcher.run_ranks import RankProcess, launch
from cordee.layout.axes import Layout
from cordee.layout.tensors import TensorSpec
from cordee.parallel.external import ModelProbe, compare_probes, sgd_step
from cordee.parallel.hf_tensor_parallel import check_hf_layout, set_tensor_parallel
from tests.conftest import read_events, read_rows, weights_digest
from tests.conftest import run_cordee as command

transformers = pytest.importorskip("transformers", reason='needs pip install "cordee[hf]"')

SEED = 3
SMALL_CONFIG = {
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


def make_hf_folder(kind: str, folder: Path, **changes: object) -> str:
    name, kind_settings = KINDS[kind]
    config = getattr(transformers, name)(**{**SMALL_CONFIG, **kind_settings, **changes})
    config.architectures = [name.replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)
    return str(folder)


def damage_folder(folder: Path, name: str) -> None:
    """Does to a folder with weights what a copy that was interrupted, or an editor, may do."""
    weights_file, index_file = folder / "model.safetensors", folder / "model.safetensors.index.json"
    config = json.loads((folder / "config.json").read_text())
    shard = folder / "model-00001-of-00002.safetensors"
    match name:
        case "shards without an index":
            weights_file.rename(shard)
        case "pickles" | "adapter_model.safetensors" | "model.safetensors.incomplete":
            weights_file.rename(folder / ("pytorch_model.bin" if name == "pickles" else name))
        case "an index of pickles":
            weights_file.rename(folder / "pytorch_model.bin.index.json")
        case "two sets":
            shard.write_bytes(weights_file.read_bytes())
        case "an index and one file":
            shard.write_bytes(weights_file.read_bytes())
            with safetensors.safe_open(weights_file, framework="pt") as tensors_file:
                index_file.write_text(
                    json.dumps({"weight_map": dict.fromkeys(tensors_file.keys(), shard.name)})
                )
        case "a link without a target":
            weights_file.unlink()
            weights_file.symlink_to("nowhere")
        case "cut short":
            os.truncate(weights_file, weights_file.stat().st_size - 5)
        case "a pointer of Git LFS":
            weights_file.write_text("version https://git-lfs.github.com/spec/v1\n")
        case "not finite":
            weights_file.write_bytes(weights_file.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
        case "index of brackets":
            index_file.write_text("[" * 100_000)
        case _:
            key, _, value = name.partition("=")
            text = json.dumps({**config, key: "@"}).replace('"@"', value)
            (folder / "config.json").write_text(text)


DAMAGES = (
    "shards without an index", "pickles", "adapter_model.safetensors",
    "model.safetensors.incomplete", "an index of pickles", "two sets", "an index and one file",
    "a link without a target", "cut short", "a pointer of Git LFS", "not finite",
    "index of brackets", "num_hidden_layers=1", "num_hidden_layers=3", "hidden_size=1e400",
    f"hidden_size={'9' * 400}", f"hidden_size={'9' * 5000}", "hidden_size=-32",
    "num_hidden_layers=99999999", "num_attention_heads=0", "num_attention_heads=3",
    "vocab_size=1e3", "vocab_size=-1", "head_dim=7", 'hidden_act="nope"', "attention_dropout=5",
)  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_folders_that_are_not_whole(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(make_hf_folder("llama", tmp_path / "hub"))
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    damage_folder(folder, name)
    overrides = ("data.path=builtin:markov", "data.tokens=9000", "data.sequence=16", "run.steps=1",
             "launch.processes=1", "run.precision=fp32", "launch.threads=1", "evaluate.sample=0",
             f"model.hub={folder}", f"run.dir={tmp_path / 'run'}")  # fmt: skip
    assert main(["train", *overrides]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.toml").exists()


def make_batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 32, (3, 13), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, :4] = -100
    return tokens[:, :-1], targets


def build_local_model(hub: HubSource, mesh: Mesh, memory: MemorySettings | None = None) -> HubModel:
    """A model's part on this rank, in the order of parallel/parallelize.py."""
    specs = {spec.name: spec for spec in hub.specs()}
    comm = AxisComm(mesh.group("tensor"), mesh.size("tensor"), mesh.index("tensor"))
    check_hf_layout(hub, specs, mesh.layout)
    model = HubModel(hub)
    model.memory = memory or MemorySettings()
    for name, parameter in list(model.named_parameters()):
        box = specs[name].box(mesh.layout, mesh.coords, last_axis="tensor")
        part = slice_box(torch.empty(parameter.shape, device="meta"), box).contiguous()
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(part))
    model.tie_weights()
    set_tensor_parallel(model, comm)
    if mesh.shard_mesh is not None:
        from torch.distributed.fsdp import fully_shard

        for unit in (*model.parts(), model):
            fully_shard(unit, mesh=mesh.shard_mesh)
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.reset_buffers()
    initial_values = hub.initial_values(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local_tensor = getattr(parameter, "_local_tensor", parameter)
            local_tensor.copy_(initial_values(name, specs[name].box(mesh.layout, mesh.coords)))
    return model


def build_full_model(path: str) -> HubModel:
    return build_local_model(read_hub(path), Mesh(Layout(), 0, dict.fromkeys(
        ("island", "pipeline", "context", "expert", "shard", "tensor"), 0), {}, None))  # fmt: skip


def compute_gradients(
    model: HubModel, rows: slice = slice(None)
) -> tuple[float, dict[str, Tensor]]:
    """Loss, and gradients by name (this rank's parts)."""
    tokens, targets = make_batch()
    loss = model(tokens[rows], targets[rows])
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None for g in grads.values())
    return float(loss.detach()), {
        n: getattr(g, "_local_tensor", g).clone() for n, g in grads.items()
    }


Case = tuple[str, str, Layout, MemorySettings]


CaseResult = tuple[str, float, float, float, bool]


def check_cases(
    process: RankProcess, cases: list[Case], probe_path: str
) -> tuple[list[CaseResult], tuple[bool, str]]:
    """Of each case: its name, loss, the whole model's loss, the largest relative error of a
    gradient, and whether tied parameters are one and listed once. Then what `check_probes`
    finds."""
    torch.set_num_threads(1)
    results = []
    for name, path, layout, memory in cases:
        mesh = make_mesh(layout, process.rank, process.device)
        hub = read_hub(path)
        model = build_local_model(hub, mesh, memory)
        are_tied = all(
            model.get_parameter(a) is model.get_parameter(b) for a, b in hub.tied_parameters.items()
        )
        shards = [slice(0, 2), slice(2, 3)] if layout.shard > 1 else [slice(None)]
        loss, grads = compute_gradients(model, shards[mesh.coords["shard"]])
        full_loss, full_grads = compute_gradients(build_full_model(path))
        specs = {spec.name: spec for spec in hub.specs()}
        max_error = max(_max_grad_error(grads[n], full_grads[n], specs[n], mesh) for n in specs)
        total_loss = AxisComm(mesh.group("shard"), mesh.size("shard"), 0).all_reduce_forward(
            torch.tensor(loss)
        )
        is_tied_once = are_tied and len(grads) == len(specs)
        results.append((name, float(total_loss), full_loss, max_error, is_tied_once))
    return results, check_probes(process, probe_path)


def _max_grad_error(grad: Tensor, full_grad: Tensor, spec: TensorSpec, mesh: Mesh) -> float:
    """How far a rank's gradient, after the sums it still needs, is from its part of the whole."""
    if axes := spec.grad_reduce_axes(mesh.layout):
        grad = AxisComm(mesh.group(*axes), mesh.size(*axes), 0).all_reduce_no_grad(grad)
    local_grad = slice_box(full_grad, spec.box(mesh.layout, mesh.coords))
    return (
        float((grad - local_grad).abs().max() / full_grad.abs().max())
        if local_grad.numel()
        else 0.0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_transformers_own(kind: str, tmp_path: Path) -> None:
    path = make_hf_folder(kind, tmp_path)
    model = build_full_model(path).eval()
    hf_model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(path), dtype=torch.float32
    ).eval()
    hf_model.load_state_dict(model.state_dict(), strict=False)
    tokens, targets = make_batch()
    torch.testing.assert_close(model(tokens), hf_model(tokens).logits, rtol=0, atol=0)
    for name, buffer in hf_model.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=0, atol=0)
    assert dict(model.named_parameters()).keys() == dict(hf_model.named_parameters()).keys()
    full_loss = model(tokens, targets)
    model.memory = MemorySettings(loss_chunk=5)
    torch.testing.assert_close(model(tokens, targets), full_loss, rtol=1e-6, atol=0)


def test_values_start_by_the_models_own_rules(tmp_path: Path) -> None:
    hub = read_hub(make_hf_folder("llama", tmp_path, hidden_size=256, head_dim=64))
    values, second_values = hub.initial_values(SEED), hub.initial_values(SEED)
    names = [spec.name for spec in hub.specs()]
    boxes = {s.name: tuple((0, n) for n in s.shape) for s in hub.specs()}
    first_tensors = {name: values(name, boxes[name]) for name in names}
    for name in reversed(names):  # the order of asking does not matter
        assert torch.equal(second_values(name, boxes[name]), first_tensors[name])
    assert abs(float(first_tensors["model.layers.0.mlp.up_proj.weight"].std()) - 0.02) < 1e-3
    assert not torch.equal(first_tensors[names[1]], first_tensors[names[1].replace("0", "1")])
    assert torch.equal(first_tensors["model.norm.weight"], torch.ones(256))


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
    paths = {kind: make_hf_folder(kind, tmp_path / kind) for kind in KINDS}
    cases = [
        (f"{kind}: {layout.describe()}", paths[kind], layout, levers.get(kind, MemorySettings()))
        for kind, layout in CASES[ranks]
    ]
    for results, (is_restored, message) in launch(check_cases, cases, paths["qwen3"], ranks=ranks):
        assert is_restored
        assert "not that of the whole" in message
        for name, loss, full_loss, max_error, is_tied_once in results:
            assert loss == pytest.approx(full_loss, rel=1e-5), name
            assert max_error < 1e-5, name
            assert is_tied_once, name


def check_probes(process: RankProcess, path: str) -> tuple[bool, str]:
    """Whether a right cut passes and gets its parameters back; what is said of a wrong one."""
    torch.set_num_threads(1)
    mesh = make_mesh(Layout(tensor=process.size), process.rank, process.device)
    model, full_model = build_local_model(read_hub(path), mesh), build_full_model(path)
    comm = AxisComm(mesh.group("tensor"), process.size, process.rank)
    specs = {s.name: s for s in read_hub(path).specs()}
    parameters_before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def step(module: HubModel, is_cut: bool) -> None:
        module.zero_grad()
        (module(*make_batch()) / 36).backward()
        grads = []
        for name, p in module.named_parameters():
            assert p.grad is not None
            needs_sum = is_cut and specs[name].grad_reduce_axes(mesh.layout)
            grads.append(comm.all_reduce_no_grad(p.grad) if needs_sum else p.grad)
        sgd_step([p.detach() for p in module.parameters()], grads, 0.1)

    def make_probe(module: HubModel, is_cut: bool) -> ModelProbe:
        return ModelProbe(lambda: module(*make_batch()), lambda: step(module, is_cut))

    parts = [p.detach() for p in model.parameters()]
    compare_probes(make_probe(model, True), parts, comm, make_probe(full_model, False))
    is_restored = all(torch.equal(parameters_before[n], p) for n, p in model.named_parameters())
    with torch.no_grad():  # a norm that only rank 1 scales
        model.get_parameter("model.norm.weight").mul_(1.0 + 0.1 * process.rank)
    try:
        compare_probes(
            make_probe(model, True), parts, comm, make_probe(build_full_model(path), False)
        )
    except RunError as error:
        return is_restored, error.message
    return is_restored, ""


def test_layouts_that_the_plan_has_not_are_refused(tmp_path: Path) -> None:
    def refusal_fix(layout: Layout, kind: str = "llama", **changes: object) -> str:
        folder = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        hub = read_hub(make_hf_folder(kind, folder, **changes))
        with pytest.raises(LayoutError) as error_info:
            check_hf_layout(hub, {s.name: s for s in hub.specs()}, layout)
        return str(error_info.value.fix)

    assert refusal_fix(Layout(pipeline=2)).startswith("layout.pipeline=1")
    assert refusal_fix(Layout(tensor=3)) == "layout.tensor=2"
    assert refusal_fix(Layout(tensor=4), num_key_value_heads=2) == "layout.tensor=2"
    assert refusal_fix(Layout(tensor=2), vocab_size=33) == "layout.tensor=1"
    assert "dropout of 0" in refusal_fix(Layout(tensor=2), attention_dropout=0.1)
    gpt2_folder = tmp_path / "gpt2"
    transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=32).save_pretrained(
        gpt2_folder
    )
    with pytest.raises(LayoutError, match="no tensor-parallel plan"):
        check_hf_layout(read_hub(str(gpt2_folder)), {}, Layout(tensor=2))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hub(str(tmp_path / "nowhere"))


def test_dropout_is_a_function_of_the_key(tmp_path: Path) -> None:
    model = build_full_model(make_hf_folder("llama", tmp_path, attention_dropout=0.3)).train()
    tokens, targets = make_batch()
    state = torch.get_rng_state()
    first_loss, other_loss, repeat_loss = (float(model(tokens, targets, key)) for key in (1, 2, 1))
    assert first_loss == repeat_loss != other_loss
    assert torch.equal(state, torch.get_rng_state())


def test_a_folder_goes_out_and_comes_back(tmp_path: Path) -> None:
    path = make_hf_folder("tied", tmp_path / "plan")
    model = build_full_model(path).eval()
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    config = json.loads((tmp_path / "plan" / "config.json").read_text())
    out_folder = tmp_path / "out"
    write_folder(out_folder, config, shapes, lambda name: parameters[name].detach(), 6_000)
    files = sorted(f.name for f in out_folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0].startswith("model-00001-of-000")
    assert max(f.stat().st_size for f in out_folder.glob("*.safetensors")) < 8_000
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(out_folder).eval()
    tokens, _ = make_batch()
    torch.testing.assert_close(hf_model(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)
    reloaded_model = build_full_model(str(out_folder)).eval()  # weights are there: nothing is drawn
    torch.testing.assert_close(reloaded_model(tokens), model(tokens), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="exists"):
        write_folder(out_folder, config, shapes, lambda name: parameters[name].detach(), 6_000)
    (out_folder / files[1]).write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot be read"):
        read_hub(str(out_folder))
    (out_folder / files[1]).unlink()
    with pytest.raises(ConfigError, match="missing"):
        open_folder(str(out_folder), "model.hub")


def test_a_model_without_knobs_of_ours_names_the_knob() -> None:
    from cordee.hf.convert import make_hf_adapter

    with pytest.raises(ConfigError, match="no model with this knob") as error_info:
        make_hf_adapter(ModelSettings(), 256)
    assert "model.mlp=gated" in str(error_info.value.fix)


OVERRIDES = (
    "data.path=builtin:markov", "data.tokens=20000", "data.sequence=16", "batch.microbatch=2",
    "batch.microbatches=4", "run.precision=fp32", "run.steps=10", "launch.threads=1",
    "evaluate.tokens=1024", "optim.name=adamw", "optim.lr=0.003", "checkpoint.every=1",
)  # fmt: skip


def train_losses(folder: Path, path: str, *overrides: str, code: int = 0) -> list[float]:
    """The losses of `cordee train` of the folder `path`."""
    result = command("train", f"model.hub={path}", f"run.dir={folder}", *OVERRIDES, *overrides)
    assert result.returncode == code, result.stderr[-3000:]
    return [float(str(row["loss"])) for row in read_rows(folder)]


def test_the_command_trains_a_folder_on_any_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With weights and tied: shard x tensor is killed, islands go on; then every verb."""
    bare_folder = make_hf_folder("tied", tmp_path / "bare", vocab_size=64, num_key_value_heads=2)
    config = transformers.AutoConfig.from_pretrained(bare_folder)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    source, resumed_folder = str(tmp_path / "source"), tmp_path / "cut"
    reference_losses = train_losses(
        tmp_path / "one", source, "launch.processes=1", "evaluate.sample=0"
    )
    four_rank_overrides = (
        "layout.shard=2",
        "layout.tensor=2",
        "fault.kill=step.agree:8:3",
        "fault.recover=false",
    )
    train_losses(resumed_folder, source, *four_rank_overrides, code=1)
    assert train_losses(resumed_folder, source, "layout.islands=2") == pytest.approx(
        reference_losses, rel=1e-5
    )
    assert "resumed" in [event["event"] for event in read_events(resumed_folder)]
    final_events = [read_events(folder)[-1] for folder in (tmp_path / "one", resumed_folder)]
    assert final_events[1]["held_out_loss"] == pytest.approx(
        final_events[0]["held_out_loss"], rel=1e-5
    )
    assert reference_losses[-1] < reference_losses[0]
    for arguments in (["report"], ["fingerprint"], ["export", "--to", "hf"], ["export"]):
        assert main([arguments[0], str(resumed_folder), *arguments[1:]]) == 0
    assert weights_digest(resumed_folder) in capsys.readouterr().out
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(resumed_folder / "hf")
    has_weights = (resumed_folder / "model.safetensors").exists()
    assert has_weights and hf_model.lm_head.weight is hf_model.model.embed_tokens.weight
    assert main(["sample", str(resumed_folder)]) == 2  # its tokens are no text


def test_a_folder_writes_text_and_is_exact(tmp_path: Path) -> None:
    """Without weights, on text: one digest for one process and for shards; then a sample."""
    source = make_hf_folder("llama", tmp_path / "llama", vocab_size=256)
    (tmp_path / "text").write_text("to be or not to be, that is the question\n" * 300)
    overrides = (f"data.path={tmp_path / 'text'}", "data.tokens=0", "run.exact=true", "run.steps=4")
    digests = set()
    for index, layout in enumerate(("launch.processes=1", "layout.shard=2")):
        train_losses(tmp_path / str(index), source, *overrides, layout, "evaluate.sample=8")
        digests.add(weights_digest(tmp_path / str(index)))
    assert len(digests) == 1
    result = command("sample", str(tmp_path / "1"), "--tokens", "8", "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["text"]) >= 4


def test_the_command_refuses_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_hf_folder("llama", tmp_path / "llama", num_key_value_heads=2, vocab_size=64)
    run_folder = tmp_path / "run"
    for overrides, fix in (
        (["layout.tensor=4"], "layout.tensor=2"),
        (["layout.pipeline=2"], "layout.pipeline=1"),
        (["model.layers=7"], "leave model.layers out"),
        (["run.precision=fp8"], "run.precision=bf16"),
        ([f"model.hub={tmp_path / 'no'}"], "config.json"),
        (["data.path=builtin:stdlib"], "data of that vocabulary"),
    ):
        arguments = [
            "data.path=builtin:markov",
            f"model.hub={source}",
            f"run.dir={run_folder}",
            *overrides,
        ]
        assert main(["train", *arguments]) == 2
        assert fix in capsys.readouterr().err, overrides
        assert not run_folder.exists()
