"""Presets: published totals by the test's own arithmetic, and that each is a legal run."""

from __future__ import annotations

import pytest

from cordee.config.load import dump, load
from cordee.config.model import ModelSettings
from cordee.config.presets import model_presets
from cordee.config.validate import validate_run
from cordee.layout.tensors import count_parameters

PUBLISHED_B = {
    "1b": 1.236, "llama3-8b": 8.03, "llama3-70b": 70.55, "llama3-405b": 405.85,
    "qwen3-0.6b": 0.596, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19,
    "qwen3-14b": 14.77, "qwen3-32b": 32.76, "qwen3-30b-a3b": 30.53, "qwen3-235b-a22b": 235.09,
}  # fmt: skip
ACTIVE_B = {"qwen3-30b-a3b": 3.3, "qwen3-235b-a22b": 22, "deepseek-v3-like": 41}


def expected_parameters(
    model: ModelSettings, vocabulary: int = 256, active_only: bool = False
) -> int:
    """Parameters of a transformer, all or those that a token meets, from nothing but its knobs."""
    width, head_width = model.width, model.head_width or model.width // model.heads
    queries, keys = model.heads * head_width, (model.kv_heads or model.heads) * head_width
    matrices = 3 if model.mlp == "gated" else 2
    ffn = model.ffn or (4 * width if model.mlp == "relu2" else 0)
    assert ffn, "a gated preset says its width"
    attention = 2 * width * queries + 2 * width * keys + 2 * width
    attention += 2 * head_width if model.qk_gain else 0
    moe = model.moe
    expert_count = moe.active if active_only else moe.experts
    moe_elements = (
        matrices * width * (moe.width or ffn) * (expert_count + moe.shared) + moe.experts * width
    )
    blocks = 0
    for layer in range(model.layers):
        is_dense = not moe.experts or layer < moe.dense_layers
        blocks += attention + (matrices * width * ffn if is_dense else moe_elements)
    rows = model.vocabulary or vocabulary
    return (1 if model.tied else 2) * rows * width + blocks + width


@pytest.mark.parametrize("name", PUBLISHED_B)
def test_published_totals(name: str) -> None:
    model = model_presets()[name]
    assert model.preset == name
    assert expected_parameters(model) / 1e9 == pytest.approx(PUBLISHED_B[name], rel=3e-3)


@pytest.mark.parametrize("name", ACTIVE_B)
def test_parameters_that_a_token_meets(name: str) -> None:
    model = model_presets()[name]
    assert expected_parameters(model, active_only=True) / 1e9 == pytest.approx(
        ACTIVE_B[name], rel=0.02
    )


def test_deepseek_with_plain_attention() -> None:
    """671.0 B with 187.1 M of latent attention a layer; here 249.6 M of grouped queries."""
    attention = 2 * 7168 * (128 * 128 + 8 * 128) + 2 * 7168
    latent = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    latent += 2 * 7168 + 1536 + 512
    total = expected_parameters(model_presets()["deepseek-v3-like"]) + 61 * (latent - attention)
    assert total / 1e9 == pytest.approx(671.03, rel=1e-3)


def test_small_experts() -> None:
    presets = model_presets()
    assert expected_parameters(presets["micro-moe"]) == 131_904
    assert expected_parameters(presets["tiny-moe"]) == 1_381_504


@pytest.mark.parametrize(
    "name", [*("micro", "tiny", "small", "medium", "large", "xl"), "llama3-8b", "llama3-405b", "1b"]
)
def test_the_table_counts_the_same(name: str) -> None:
    model = model_presets()[name]
    assert count_parameters(model, model.vocabulary or 256) == expected_parameters(model)


@pytest.mark.parametrize("name", model_presets())
def test_every_preset_is_legal_and_survives_a_file(name: str, tmp_path: object) -> None:
    run = load(None, [f"model.preset={name}", "run.steps=1"]).run
    validate_run(run)
    assert run.model == model_presets()[name]
    path = f"{tmp_path}/run.toml"
    with open(path, "w") as stream:
        stream.write(dump(run))
    assert load(path).run == run
