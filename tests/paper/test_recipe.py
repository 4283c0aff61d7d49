"""What a run that the clock limits does: model, batch and evaluation by the measured rate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cordee.config.load import dump, load, override
from cordee.config.run import Run
from cordee.launcher.prepare import apply_recorded_settings, prepare_run, resolve_config
from cordee.planner.plan import make_plan
from cordee.planner.recipe import (
    EVALUATION_SHARE,
    EVALUATION_TOKENS,
    MIN_EVALUATION_TOKENS,
    MIN_SAMPLE_TOKENS,
    MIN_USEFUL_STEPS,
    RECIPES,
    SAMPLE_TOKENS,
    apply_recipe,
    choose_recipe,
    follows_clock,
    restore_recipe,
    with_evaluation,
)
from tests.paper.test_plan import CPU


def run_of(*overrides: str) -> Run:
    return resolve_config(load(None, ("run.precision=fp32", *overrides)).run)


def test_only_a_run_without_sizes_and_limits_follows_the_clock() -> None:
    assert follows_clock(run_of()) and follows_clock(run_of("run.dir=x", "optim.lr=0.1"))
    for setting in (
        "run.steps=5", "run.tokens=5", "run.epochs=1", "run.minutes=3",
        "model.preset=tiny", "model.layers=2", "batch.microbatch=1", "batch.microbatches=8",
        "data.sequence=64", "model.dropout=0.1",
    ):  # fmt: skip
        run = run_of(setting)
        assert not follows_clock(run), setting
        assert run.model.preset == "tiny"
    assert run_of("model.preset=tiny").model == replace(run_of("run.steps=5").model)


def test_a_faster_machine_takes_a_larger_recipe() -> None:
    """The first recipe whose tokens are made in time; what is said is what was planned."""
    recipe_indices = []
    for speed in (0.001, 0.02, 0.1, 0.5, 1, 4, 16, 64, 1000):
        rates = {
            name: speed * getattr(CPU, name)
            for name in ("flops_fp32", "flops_bf16", "memory_bytes_per_s")
        }
        cluster = replace(CPU, operator_s=5.6e-6 / speed, **rates)
        run, text = choose_recipe(run_of(), cluster, 256)
        prediction = make_plan(run, cluster).predicted
        steps = 90 / prediction.step_s
        assert f"{steps:,.0f} steps" in text
        assert ("too few" in text) == (steps < MIN_USEFUL_STEPS)
        if steps < MIN_USEFUL_STEPS:  # the command makes enough of them, of that very model
            overrides = text.partition("cordee train ")[2].split()
            suggested_run = run_of(*overrides)
            assert (suggested_run.model, suggested_run.batch, suggested_run.data) == (
                run.model,
                run.batch,
                run.data,
            )
            assert 60 * suggested_run.run.minutes / prediction.step_s >= MIN_USEFUL_STEPS
        index = next(i for i, recipe in enumerate(RECIPES) if apply_recipe(run_of(), recipe) == run)
        token_count = 90 * prediction.tokens_per_s
        assert token_count >= RECIPES[index].tokens
        recipe_indices.append(index)
    assert (
        recipe_indices == sorted(recipe_indices, reverse=True)
        and recipe_indices[0] == len(RECIPES) - 1
        and recipe_indices[-1] == 0
    )


def test_recipes_are_ordered_and_give_every_machine_one() -> None:
    assert RECIPES[-1].tokens == 0
    assert len({apply_recipe(run_of(), recipe) for recipe in RECIPES}) == len(RECIPES)
    for recipe in RECIPES:
        assert apply_recipe(run_of(), recipe).batch.microbatches >= 4  # work for four islands


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_keeps_its_recipe(recipe: object, tmp_path: Path) -> None:
    recorded_run = override(
        apply_recipe(run_of(), recipe), {"evaluate.tokens": 9000, "evaluate.sample": 41}
    )  # type: ignore[arg-type]
    recorded_run = override(recorded_run, {"run.dir": str(tmp_path)})
    (tmp_path / "run.toml").write_text(dump(recorded_run))
    resumed_run = apply_recorded_settings(resolve_config(load(None, (f"run.dir={tmp_path}",)).run))
    assert resumed_run == recorded_run


def test_another_run_is_not_taken_for_a_recipe() -> None:
    run = run_of()
    assert restore_recipe(run, run_of("model.layers=3", "run.steps=5")) == run


def test_evaluation_follows_the_speed_where_time_limits() -> None:
    timed_run = run_of()
    assert with_evaluation(timed_run, 1e6, 5e5).evaluate.tokens == EVALUATION_TOKENS
    slow_settings = with_evaluation(timed_run, 6000.0, 3000.0).evaluate
    assert slow_settings.tokens == int(EVALUATION_SHARE * 90 * 3 * 6000) < EVALUATION_TOKENS
    assert MIN_SAMPLE_TOKENS < slow_settings.sample < SAMPLE_TOKENS
    slowest_settings = with_evaluation(timed_run, 1.0, 0.5).evaluate
    assert (slowest_settings.tokens, slowest_settings.sample) == (
        MIN_EVALUATION_TOKENS,
        MIN_SAMPLE_TOKENS,
    )
    unmeasured_settings = with_evaluation(timed_run, 0.0, 0.0).evaluate
    assert (unmeasured_settings.tokens, unmeasured_settings.sample) == (
        EVALUATION_TOKENS,
        SAMPLE_TOKENS,
    )
    steps_settings = with_evaluation(run_of("run.steps=5", "run.minutes=1"), 1.0, 1.0).evaluate
    assert (steps_settings.tokens, steps_settings.sample) == (EVALUATION_TOKENS, SAMPLE_TOKENS)
    explicit_settings = with_evaluation(
        run_of("evaluate.tokens=5", "evaluate.sample=0"), 1.0, 1.0
    ).evaluate
    assert (explicit_settings.tokens, explicit_settings.sample) == (5, 0)


def test_a_ready_run_is_resolved(tmp_path: Path) -> None:
    overrides = (f"run.dir={tmp_path / 'r'}", "launch.probe=false", "launch.processes=1")
    run = prepare_run(load(None, overrides).run).run
    assert run.run.precision in ("fp32", "bf16", "fp16")
    assert isinstance(run.evaluate.tokens, int) and isinstance(run.evaluate.sample, int)
    assert any(run.model == apply_recipe(run, recipe).model for recipe in RECIPES)
