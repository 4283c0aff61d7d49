"""A transformers folder on paper: the shape that its config.json tells, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cordee.config.hub import on_paper, shape_of
from cordee.config.load import load
from cordee.errors import ConfigError, LayoutError
from cordee.layout.tensors import parameters
from cordee.plan.cluster import gpu_cluster
from cordee.plan.plan import make_plan
from cordee.plan.search import search

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def folder_of(place: Path, config: object) -> str:
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    return str(place)


def test_shapes(tmp_path: Path) -> None:
    """Published counts: Llama 3 8B, GPT-2 (124 M with positions and biases), Mixtral 8x7B."""
    llama = shape_of(folder_of(tmp_path, LLAMA_8B))
    assert parameters(llama, 2) == 8_030_261_248
    assert (llama.name, llama.tied, llama.per_head) == (tmp_path.name, False, 128)
    nested = shape_of(folder_of(tmp_path, {"model_type": "x", "text_config": LLAMA_8B}))
    assert nested == llama
    gpt2 = shape_of(folder_of(tmp_path, {
        "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257,
        "n_inner": None, "activation_function": "gelu_new", "tie_word_embeddings": True,
    }))  # fmt: skip
    assert abs(parameters(gpt2, 2) / 124e6 - 1) < 0.02
    mixtral = shape_of(folder_of(tmp_path, {
        **LLAMA_8B, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
    }))  # fmt: skip
    assert abs(parameters(mixtral, 2) / 46.7e9 - 1) < 0.01


def test_it_is_planned_as_what_it_is(tmp_path: Path) -> None:
    path = folder_of(tmp_path, LLAMA_8B)
    run = on_paper(load(None, [f"model.hub={path}", "batch.microbatches=64"]).run)
    ranked = search(run, gpu_cluster("H100", 8)).ranked
    assert ranked
    assert {(c.layout.tensor, c.layout.pipeline, c.layout.context) for c in ranked} == {(1, 1, 1)}
    assert ranked[0].predicted.parameters == 8_030_261_248
    given = on_paper(load(None, [f"model.hub={path}", "layout.tensor=4", "layout.shard=2"]).run)
    assert make_plan(given, gpu_cluster("H100", 8)).layout.tensor == 4
    odd = on_paper(load(None, [f"model.hub={path}", "layout.tensor=16"]).run)
    with pytest.raises(LayoutError, match="num_key_value_heads=8") as raised:
        make_plan(odd, gpu_cluster("H100", 16))
    assert raised.value.fix == "layout.tensor=8"


def test_what_is_no_model(tmp_path: Path) -> None:
    for config in ({"model_type": "clip"}, [1]):
        with pytest.raises(ConfigError):
            shape_of(folder_of(tmp_path, config))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="no valid JSON"):
        shape_of(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be read"):
        shape_of(str(tmp_path / "nowhere"))
