"""What a run that the clock limits does: model, batch and evaluation by the measured rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cordee.begin import as_recorded, get_ready, settle
from cordee.config.load import dump, load, override
from cordee.config.run import Run
from cordee.plan.plan import make_plan
from cordee.plan.recipe import (
    FEW_STEPS,
    LEAST_SAMPLE,
    LEAST_TOKENS,
    RECIPES,
    SAMPLE,
    SHARE,
    TOKENS,
    choose_recipe,
    follows_clock,
    recorded_recipe,
    with_evaluation,
    with_keys,
)
from tests.paper.test_plan import CPU


def run_of(*words: str) -> Run:
    return settle(load(None, ("run.precision=fp32", *words)).run)


def test_only_a_run_without_sizes_and_limits_follows_the_clock() -> None:
    assert follows_clock(run_of()) and follows_clock(run_of("run.dir=x", "optim.lr=0.1"))
    for word in (
        "run.steps=5", "run.tokens=5", "run.epochs=1", "run.minutes=3",
        "model.preset=tiny", "model.layers=2", "batch.microbatch=1", "batch.microbatches=8",
        "data.sequence=64", "model.dropout=0.1",
    ):  # fmt: skip
        run = run_of(word)
        assert not follows_clock(run), word
        assert run.model.preset == "tiny"
    assert run_of("model.preset=tiny").model == replace(run_of("run.steps=5").model)


def test_a_faster_machine_takes_a_larger_recipe() -> None:
    """The first recipe whose tokens are made in time; what is said is what was planned."""
    sizes = []
    for speed in (0.001, 0.02, 0.1, 0.5, 1, 4, 16, 64, 1000):
        rates = {
            name: speed * getattr(CPU, name)
            for name in ("flops_fp32", "flops_bf16", "memory_bytes_per_s")
        }
        cluster = replace(CPU, operator_s=5.6e-6 / speed, **rates)
        run, text = choose_recipe(run_of(), cluster, 256)
        predicted = make_plan(run, cluster).predicted
        steps = 90 / predicted.step_s
        assert f"{steps:,.0f} steps" in text
        assert ("too few" in text) == (steps < FEW_STEPS)
        if steps < FEW_STEPS:  # the command makes enough of them, of that very model
            words = text.partition("cordee train ")[2].split()
            told = run_of(*words)
            assert (told.model, told.batch, told.data) == (run.model, run.batch, run.data)
            assert 60 * told.run.minutes / predicted.step_s >= FEW_STEPS
        number = next(i for i, recipe in enumerate(RECIPES) if with_keys(run_of(), recipe) == run)
        reached = 90 * predicted.tokens_per_s
        assert reached >= RECIPES[number].tokens
        sizes.append(number)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == len(RECIPES) - 1 and sizes[-1] == 0


def test_recipes_are_ordered_and_give_every_machine_one() -> None:
    assert RECIPES[-1].tokens == 0
    assert len({with_keys(run_of(), recipe) for recipe in RECIPES}) == len(RECIPES)
    for recipe in RECIPES:
        assert with_keys(run_of(), recipe).batch.microbatches >= 4  # work for four islands


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_keeps_its_recipe(recipe: object, tmp_path: Path) -> None:
    begun = override(with_keys(run_of(), recipe), {"evaluate.tokens": 9000, "evaluate.sample": 41})  # type: ignore[arg-type]
    begun = override(begun, {"run.dir": str(tmp_path)})
    (tmp_path / "run.toml").write_text(dump(begun))
    again = as_recorded(settle(load(None, (f"run.dir={tmp_path}",)).run))
    assert again == begun


def test_another_run_is_not_taken_for_a_recipe() -> None:
    run = run_of()
    assert recorded_recipe(run, run_of("model.layers=3", "run.steps=5")) == run


def test_evaluation_follows_the_speed_where_time_limits() -> None:
    clocked = run_of()
    assert with_evaluation(clocked, 1e6, 5e5).evaluate.tokens == TOKENS
    slow = with_evaluation(clocked, 6000.0, 3000.0).evaluate
    assert slow.tokens == int(SHARE * 90 * 3 * 6000) < TOKENS
    assert LEAST_SAMPLE < slow.sample < SAMPLE
    slowest = with_evaluation(clocked, 1.0, 0.5).evaluate
    assert (slowest.tokens, slowest.sample) == (LEAST_TOKENS, LEAST_SAMPLE)
    unknown = with_evaluation(clocked, 0.0, 0.0).evaluate
    assert (unknown.tokens, unknown.sample) == (TOKENS, SAMPLE)
    steps = with_evaluation(run_of("run.steps=5", "run.minutes=1"), 1.0, 1.0).evaluate
    assert (steps.tokens, steps.sample) == (TOKENS, SAMPLE)
    given = with_evaluation(run_of("evaluate.tokens=5", "evaluate.sample=0"), 1.0, 1.0).evaluate
    assert (given.tokens, given.sample) == (5, 0)


def test_a_ready_run_is_resolved(tmp_path: Path) -> None:
    words = (f"run.dir={tmp_path / 'r'}", "launch.probe=false", "launch.processes=1")
    run = get_ready(load(None, words).run).run
    assert run.run.precision in ("fp32", "bf16", "fp16")
    assert isinstance(run.evaluate.tokens, int) and isinstance(run.evaluate.sample, int)
    assert any(run.model == with_keys(run, recipe).model for recipe in RECIPES)
