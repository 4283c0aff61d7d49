"""Presets: published totals by the test's own arithmetic, and what a classifier implies."""

from __future__ import annotations

import pytest

from cordee.config.check import check
from cordee.config.load import dump, load
from cordee.config.model import ModelSettings
from cordee.config.presets import implied, model_presets
from cordee.errors import ConfigError
from cordee.layout.tensors import parameters

PUBLISHED_B = {
    "1b": 1.236, "llama3-8b": 8.03, "llama3-70b": 70.55, "llama3-405b": 405.85,
    "qwen3-0.6b": 0.596, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19,
    "qwen3-14b": 14.77, "qwen3-32b": 32.76, "qwen3-30b-a3b": 30.53, "qwen3-235b-a22b": 235.09,
}  # fmt: skip
ACTIVE_B = {"qwen3-30b-a3b": 3.3, "qwen3-235b-a22b": 22, "deepseek-v3-like": 41}


def by_hand(model: ModelSettings, vocabulary: int = 256, active: bool = False) -> int:
    """Parameters of a transformer, all or those that a token meets, from nothing but its knobs."""
    width, head = model.width, model.head_width or model.width // model.heads
    queries, keys = model.heads * head, (model.kv_heads or model.heads) * head
    matrices = 3 if model.mlp == "gated" else 2
    ffn = model.ffn or (4 * width if model.mlp == "relu2" else 0)
    assert ffn, "a gated preset says its width"
    attention = 2 * width * queries + 2 * width * keys + 2 * width
    attention += 2 * head if model.qk_gain else 0
    moe = model.moe
    used = moe.active if active else moe.experts
    sparse = matrices * width * (moe.width or ffn) * (used + moe.shared) + moe.experts * width
    blocks = 0
    for layer in range(model.layers):
        dense = not moe.experts or layer < moe.dense_layers
        blocks += attention + (matrices * width * ffn if dense else sparse)
    rows = model.vocabulary or vocabulary
    return (1 if model.tied else 2) * rows * width + blocks + width


@pytest.mark.parametrize("name", PUBLISHED_B)
def test_published_totals(name: str) -> None:
    model = model_presets()[name]
    assert model.preset == name
    assert by_hand(model) / 1e9 == pytest.approx(PUBLISHED_B[name], rel=3e-3)


@pytest.mark.parametrize("name", ACTIVE_B)
def test_parameters_that_a_token_meets(name: str) -> None:
    model = model_presets()[name]
    assert by_hand(model, active=True) / 1e9 == pytest.approx(ACTIVE_B[name], rel=0.02)


def test_deepseek_with_plain_attention() -> None:
    """671.0 B with 187.1 M of latent attention a layer; here 249.6 M of grouped queries."""
    attention = 2 * 7168 * (128 * 128 + 8 * 128) + 2 * 7168
    latent = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    latent += 2 * 7168 + 1536 + 512
    total = by_hand(model_presets()["deepseek-v3-like"]) + 61 * (latent - attention)
    assert total / 1e9 == pytest.approx(671.03, rel=1e-3)


def test_small_experts() -> None:
    presets = model_presets()
    assert by_hand(presets["micro-moe"]) == 131_904
    assert by_hand(presets["tiny-moe"]) == 1_381_504


@pytest.mark.parametrize(
    "name", [*("micro", "tiny", "small", "medium", "large", "xl"), "llama3-8b", "llama3-405b", "1b"]
)
def test_the_table_counts_the_same(name: str) -> None:
    model = model_presets()[name]
    assert parameters(model, model.vocabulary or 256) == by_hand(model)


@pytest.mark.parametrize("name", model_presets())
def test_every_preset_is_legal_and_survives_a_file(name: str, tmp_path: object) -> None:
    run = load(None, [f"model.preset={name}", "run.steps=1"]).run
    check(run)
    assert run.model == model_presets()[name]
    path = f"{tmp_path}/run.toml"
    with open(path, "w") as stream:
        stream.write(dump(run))
    assert load(path).run == run


# ---- classifiers ---------------------------------------------------------------------------------


def test_a_classifier_implies_images_unless_told() -> None:
    run = load(None, ["model.kind=conv", "model.image.side=32", "model.image.channels=3"]).run
    assert (run.data.path, run.data.sequence) == ("builtin:shapes", 3073)
    told = load(None, ["model.preset=shapes-mlp", "data.path=records:a", "batch.microbatch=2"]).run
    assert (told.data.path, told.data.sequence, told.batch.microbatch) == ("records:a", 257, 2)
    assert not implied(ModelSettings())
    assert (told.targets_per_row, told.loss_unit) == (1, "nats an image")
    assert load(None, []).run.targets_per_row == 256


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("data.sequence=256", "data.sequence=257"),
        ("model.image.classes=300", "model.image.classes=256"),
        ("model.image.classes=1", "model.image.classes=2"),
        ("model.heads=8", "model.heads"),
        ("model.dropout=0.1", "model.dropout"),
        ("model.moe.experts=4", "model.moe"),
        ("model.vocabulary=300", "model.vocabulary"),
        ("memory.recompute=full", "memory.recompute"),
        ("memory.loss_chunk=128", "memory.loss_chunk"),
        ("layout.tensor=2", "layout.tensor=1"),
        ("layout.pipeline=2", "layout.pipeline=1"),
        ("layout.context=2", "layout.context=1"),
        ("layout.expert=2", "layout.expert=1"),
    ],
)
def test_what_a_classifier_refuses(word: str, fix: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(load(None, ["model.preset=shapes-conv", word]).run)
    assert fix in (refused.value.fix or "")


def test_heads_are_no_matter_of_classifiers() -> None:
    check(load(None, ["model.preset=shapes-conv", "model.width=7"]).run)
