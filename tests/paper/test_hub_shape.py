"""A transformers folder on paper: the shape that its config.json tells, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cordee.config.from_hf import hub_model_settings, with_hub_shape
from cordee.config.load import load
from cordee.errors import ConfigError, LayoutError
from cordee.layout.tensors import count_parameters
from cordee.planner.cluster import gpu_cluster
from cordee.planner.plan import make_plan
from cordee.planner.search import search

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def write_model_dir(model_dir: Path, config: object) -> str:
    model_dir.mkdir(exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps(config))
    return str(model_dir)


def test_shapes(tmp_path: Path) -> None:
    """Published counts: Llama 3 8B, GPT-2 (124 M with positions and biases), Mixtral 8x7B."""
    llama = hub_model_settings(write_model_dir(tmp_path, LLAMA_8B))
    assert count_parameters(llama, 2) == 8_030_261_248
    assert (llama.name, llama.tied, llama.width_per_head) == (tmp_path.name, False, 128)
    nested_settings = hub_model_settings(
        write_model_dir(tmp_path, {"model_type": "x", "text_config": LLAMA_8B})
    )
    assert nested_settings == llama
    gpt2 = hub_model_settings(write_model_dir(tmp_path, {
        "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257,
        "n_inner": None, "activation_function": "gelu_new", "tie_word_embeddings": True,
    }))  # fmt: skip
    assert abs(count_parameters(gpt2, 2) / 124e6 - 1) < 0.02
    mixtral = hub_model_settings(write_model_dir(tmp_path, {
        **LLAMA_8B, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
    }))  # fmt: skip
    assert abs(count_parameters(mixtral, 2) / 46.7e9 - 1) < 0.01


def test_it_is_planned_as_what_it_is(tmp_path: Path) -> None:
    path = write_model_dir(tmp_path, LLAMA_8B)
    run = with_hub_shape(load(None, [f"model.hub={path}", "batch.microbatches=64"]).run)
    candidates = search(run, gpu_cluster("H100", 8)).candidates
    assert candidates
    assert {(c.layout.tensor, c.layout.pipeline, c.layout.context) for c in candidates} == {
        (1, 1, 1)
    }
    assert candidates[0].prediction.parameters == 8_030_261_248
    tensor_run = with_hub_shape(
        load(None, [f"model.hub={path}", "layout.tensor=4", "layout.shard=2"]).run
    )
    assert make_plan(tensor_run, gpu_cluster("H100", 8)).layout.tensor == 4
    oversplit_run = with_hub_shape(load(None, [f"model.hub={path}", "layout.tensor=16"]).run)
    with pytest.raises(LayoutError, match="num_key_value_heads=8") as exc_info:
        make_plan(oversplit_run, gpu_cluster("H100", 16))
    assert exc_info.value.fix == "layout.tensor=8"


def test_what_is_no_model(tmp_path: Path) -> None:
    for config in ({"model_type": "clip"}, [1]):
        with pytest.raises(ConfigError):
            hub_model_settings(write_model_dir(tmp_path, config))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="no valid JSON"):
        hub_model_settings(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be read"):
        hub_model_settings(str(tmp_path / "nowhere"))
