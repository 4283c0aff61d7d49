"""The house's transformer as a Llama or a Qwen3: out, in, and by `cordee export` from a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cordee.checkpoint.format import Piece
from cordee.checkpoint.save import Saver
from cordee.cli.main import main
from cordee.config.load import RUN_FILE, dump, load
from cordee.config.model import InitialSettings, ModelSettings
from cordee.errors import ConfigError
from cordee.layout.boxes import whole
from cordee.model.equivalent import equivalent, import_weights, starting_weights
from cordee.model.folder import write_folder
from cordee.model.initial import initialise
from cordee.model.transformer import Transformer

transformers = pytest.importorskip("transformers", reason='needs pip install "cordee[hf]"')

BASE = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp": "gated", "ffn": 48,
        "logit_cap": 0.0}  # fmt: skip
KINDS = {
    "llama": {"qk_norm": False},
    "llama, tied": {"qk_norm": False, "tied": True, "rope_base": 500.0},
    "qwen3": {"qk_norm": True},
    "qwen3 with gains": {"qk_norm": True, "qk_gain": True},
}
VOCABULARY = 40
LIVELY = InitialSettings(residual="same", head="same", gain=2.0)


def house(kind: str) -> tuple[ModelSettings, Transformer]:
    settings = ModelSettings(**BASE, **KINDS[kind])  # type: ignore[arg-type]
    model = Transformer(settings, VOCABULARY)
    initialise(model, LIVELY, 1, 2)
    with torch.no_grad():  # gains that differ, so that their order counts
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    return settings, model.eval()


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))


def written(settings: ModelSettings, model: Transformer, place: Path) -> Path:
    held = {name: p.detach() for name, p in model.named_parameters()}
    same = equivalent(settings, VOCABULARY)
    ours = dict(same.names())
    shapes = {n: same.shape(o, lambda name: tuple(held[name].shape)) for n, o in ours.items()}
    write_folder(
        place, same.config(64), shapes,
        lambda name: same.give(ours[name], held.__getitem__), 20_000,
    )  # fmt: skip
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_logits(kind: str, tmp_path: Path) -> None:
    settings, model = house(kind)
    place = written(settings, model, tmp_path / "out")
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
        place, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert type(theirs).__name__.lower().startswith(kind.split()[0].rstrip(","))
    logits = model(tokens())
    torch.testing.assert_close(theirs.eval()(tokens()).logits, logits, rtol=1e-5, atol=2e-5)
    assert logits.std() > 0.1


@pytest.mark.parametrize("kind", ["llama", "llama, tied", "qwen3 with gains"])
def test_weights_come_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    settings, model = house(kind)
    place = written(settings, model, tmp_path / "out")
    value = starting_weights(InitialSettings(weights=str(place)), ModelSettings(
        **BASE, **KINDS[kind], vocabulary=VOCABULARY))  # type: ignore[arg-type]  # fmt: skip
    assert value is not None
    for name, parameter in model.named_parameters():
        box = whole(tuple(parameter.shape))
        assert torch.equal(value(name, box), parameter), name
        start, stop = box[0]
        half = ((start, stop // 2), *box[1:])
        assert torch.equal(value(name, half), parameter[: stop // 2]), name


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    settings, model = house("llama")
    place = str(written(settings, model, tmp_path / "out"))
    with pytest.raises(ConfigError, match="another model") as raised:
        import_weights(place, ModelSettings(**BASE, qk_norm=True))  # type: ignore[arg-type]
    assert "model.vocabulary=40" in str(raised.value.fix)
    assert "model.qk_norm=false" in str(raised.value.fix)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="cannot be this model"):
        import_weights(place, settings)
    assert starting_weights(InitialSettings(), settings) is None


def saved_run(place: Path, words: list[str], tensors: dict[str, Tensor]) -> Path:
    """A run's folder with one checkpoint, as `cordee train` leaves it."""
    place.mkdir()
    (place / RUN_FILE).write_text(dump(load(None, words).run))
    saver = Saver(place / "checkpoints", 0, 1, 1, lambda name, step: None)
    pieces = [Piece(f"model/{n}", t, tuple(t.shape), (0,) * t.ndim) for n, t in tensors.items()]
    saver.begin(7, 0, pieces, {})
    saver.join(20)
    assert saver.commit()
    saver.finish()
    return place


def test_export_of_a_house_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, model = house("qwen3")
    words = [f"model.{k}={v}" for k, v in {**BASE, **KINDS["qwen3"]}.items()]
    words = [w.replace("True", "true") for w in words]
    held = {name: p.detach() for name, p in model.named_parameters()}
    run = saved_run(tmp_path / "run", words, held)
    out = tmp_path / "hf"
    command = ["export", str(run), "--to", "hf", "--out", str(out), "--shard-mb", "0.02", "--json"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["step"] == 7 and len(list(out.glob("model-*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(theirs(tokens()).logits, model(tokens()), rtol=1e-5, atol=2e-5)
    assert main(command) == 2  # it is there already
    relu = saved_run(tmp_path / "relu", ["model.mlp=relu2"], held)
    assert main(["export", str(relu), "--to", "hf", "--out", str(tmp_path / "no")]) == 2
    assert "model.mlp=gated" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_export_of_a_hub_run(tmp_path: Path) -> None:
    settings, model = house("llama, tied")
    source = written(settings, model, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    (source / "tokenizer_config.json").write_text("{}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    trained = {name: p.detach() * 1.001 for name, p in theirs.named_parameters()}
    run = saved_run(tmp_path / "run", [f"model.hub={source}"], trained)
    assert main(["export", str(run), "--to", "hf"]) == 0
    assert (run / "hf" / "tokenizer_config.json").read_text() == "{}"
    theirs.load_state_dict(trained, strict=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(run / "hf")
    wanted = theirs.eval()(tokens()).logits
    torch.testing.assert_close(again.eval()(tokens()).logits, wanted, rtol=1e-5, atol=1e-5)
