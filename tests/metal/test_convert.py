"""The house's transformer as a Llama or a Qwen3: out, in, and by `cordee export` from a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cordee.checkpoint.checkpointer import Checkpointer
from cordee.checkpoint.pieces import Piece
from cordee.cli.main import main
from cordee.config.load import RUN_FILE, dump, load
from cordee.config.model import InitialSettings, ModelSettings
from cordee.errors import ConfigError
from cordee.hf.convert import import_weights, make_hf_adapter
from cordee.hf.safetensors_io import write_folder
from cordee.layout.slices import full_box
from cordee.model.init_weights import init_weights
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
NONZERO_INIT = InitialSettings(residual="same", head="same", gain=2.0)


def make_model(kind: str) -> tuple[ModelSettings, Transformer]:
    settings = ModelSettings(**BASE, **KINDS[kind])  # type: ignore[arg-type]
    model = Transformer(settings, VOCABULARY)
    init_weights(model, NONZERO_INIT, 1, 2)
    with torch.no_grad():  # gains that differ, so that their order counts
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    return settings, model.eval()


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))


def write_hf_folder(settings: ModelSettings, model: Transformer, folder: Path) -> Path:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    adapter = make_hf_adapter(settings, VOCABULARY)
    own_names = dict(adapter.name_pairs())
    shapes = {
        n: adapter.tensor_shape(o, lambda name: tuple(parameters[name].shape))
        for n, o in own_names.items()
    }
    write_folder(
        folder, adapter.hf_config(64), shapes,
        lambda name: adapter.to_hf(own_names[name], parameters.__getitem__), 20_000,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_logits(kind: str, tmp_path: Path) -> None:
    settings, model = make_model(kind)
    folder = write_hf_folder(settings, model, tmp_path / "out")
    hf_model, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not loading_info["missing_keys"] and not loading_info["unexpected_keys"]
    assert type(hf_model).__name__.lower().startswith(kind.split()[0].rstrip(","))
    logits = model(tokens())
    torch.testing.assert_close(hf_model.eval()(tokens()).logits, logits, rtol=1e-5, atol=2e-5)
    assert logits.std() > 0.1


@pytest.mark.parametrize("kind", ["llama", "llama, tied", "qwen3 with gains"])
def test_weights_come_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    settings, model = make_model(kind)
    folder = write_hf_folder(settings, model, tmp_path / "out")
    read_weight = import_weights(str(folder), ModelSettings(
        **BASE, **KINDS[kind], vocabulary=VOCABULARY))  # type: ignore[arg-type]  # fmt: skip
    assert read_weight is not None
    for name, parameter in model.named_parameters():
        box = full_box(tuple(parameter.shape))
        assert torch.equal(read_weight(name, box), parameter), name
        start, stop = box[0]
        half_box = ((start, stop // 2), *box[1:])
        assert torch.equal(read_weight(name, half_box), parameter[: stop // 2]), name


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    settings, model = make_model("llama")
    folder = str(write_hf_folder(settings, model, tmp_path / "out"))
    with pytest.raises(ConfigError, match="another model") as error_info:
        import_weights(folder, ModelSettings(**BASE, qk_norm=True))  # type: ignore[arg-type]
    assert "model.vocabulary=40" in str(error_info.value.fix)
    assert "model.qk_norm=false" in str(error_info.value.fix)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="cannot be this model"):
        import_weights(folder, settings)


def make_saved_run(folder: Path, overrides: list[str], tensors: dict[str, Tensor]) -> Path:
    """A run's folder with one checkpoint, as `cordee train` leaves it."""
    folder.mkdir()
    (folder / RUN_FILE).write_text(dump(load(None, overrides).run))
    saver = Checkpointer(folder / "checkpoints", 0, 1, 1, lambda name, step: None)
    pieces = [Piece(f"model/{n}", t, tuple(t.shape), (0,) * t.ndim) for n, t in tensors.items()]
    saver.begin(7, 0, pieces, {})
    saver.join(20)
    assert saver.commit()
    saver.finish()
    return folder


def test_export_of_a_house_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, model = make_model("qwen3")
    overrides = [f"model.{k}={v}" for k, v in {**BASE, **KINDS["qwen3"]}.items()]
    overrides = [w.replace("True", "true") for w in overrides]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    run = make_saved_run(tmp_path / "run", overrides, parameters)
    out = tmp_path / "hf"
    command = ["export", str(run), "--to", "hf", "--out", str(out), "--shard-mb", "0.02", "--json"]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["step"] == 7 and len(list(out.glob("model-*.safetensors"))) > 1
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert hf_model.dtype == torch.float32
    torch.testing.assert_close(hf_model(tokens()).logits, model(tokens()), rtol=1e-5, atol=2e-5)
    assert main(command) == 2  # it is there already
    relu_run = make_saved_run(tmp_path / "relu", ["model.mlp=relu2"], parameters)
    assert main(["export", str(relu_run), "--to", "hf", "--out", str(tmp_path / "no")]) == 2
    assert "model.mlp=gated" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_export_of_a_hub_run(tmp_path: Path) -> None:
    settings, model = make_model("llama, tied")
    source = write_hf_folder(settings, model, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    (source / "tokenizer_config.json").write_text("{}")
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    new_parameters = {name: p.detach() * 1.001 for name, p in hf_model.named_parameters()}
    run = make_saved_run(tmp_path / "run", [f"model.hub={source}"], new_parameters)
    assert main(["export", str(run), "--to", "hf"]) == 0
    assert (run / "hf" / "tokenizer_config.json").read_text() == "{}"
    hf_model.load_state_dict(new_parameters, strict=False)
    exported_model = transformers.AutoModelForCausalLM.from_pretrained(run / "hf")
    expected_logits = hf_model.eval()(tokens()).logits
    torch.testing.assert_close(
        exported_model.eval()(tokens()).logits, expected_logits, rtol=1e-5, atol=1e-5
    )
