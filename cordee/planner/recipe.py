"""What a run that follows the clock does on this machine: its model, its batch, its evaluation.

Such a run has no limit but two minutes, so that nothing about it is the same on two machines; all
other runs take their sizes from the user alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cordee.config.load import flatten, override
from cordee.config.model import DEFAULT_PRESET, ModelSettings
from cordee.config.presets import model_presets
from cordee.config.run import BatchSettings, DataSettings, Run
from cordee.config.validate import DEFAULT_MINUTES
from cordee.planner.cluster import Cluster, with_precision
from cordee.planner.plan import make_plan, select_cluster

EVALUATION_TOKENS, SAMPLE_TOKENS = 262144, 240
"""Held-out tokens and sampled tokens of a run that has time for them."""
EVALUATION_SHARE, SAMPLE_SHARE = 0.065, 0.015
"""Parts of a run's time that its evaluation and its sample take at most."""
MIN_EVALUATION_TOKENS, MIN_SAMPLE_TOKENS = 8192, 40
"""Fewer say nothing."""
FORWARD_SPEEDUP = 3.0
"""A forward is so many times as fast as forward, backward and update."""
MIN_USEFUL_STEPS = 150
"""Steps below which a default run ends with nothing that is worth reading."""


@dataclass(frozen=True)
class Recipe:
    """A model and batch for machines that train it on `tokens` tokens in a default run's time."""

    preset: str
    tokens: int
    overrides: Mapping[str, Any]


SHORT_SEQUENCE = {"data.sequence": 128}
LOW_LR = {"optim.lr": 0.012, "optim.adam_lr": 0.015}

RECIPES = (
    Recipe("tiny", 2_400_000, {}),
    Recipe("tiny", 1_200_000, {"model.layers": 3, **SHORT_SEQUENCE, **LOW_LR}),
    Recipe("tiny", 500_000, {"model.layers": 2, **SHORT_SEQUENCE}),
    Recipe("micro", 0, SHORT_SEQUENCE),
)
"""Largest first; the last one is for all others."""


def follows_clock(run: Run) -> bool:
    """Whether model and batch are for the machine to choose: the user gave neither, nor a limit,
    and asks for no bits."""
    limits = run.run
    has_no_limit = not (limits.steps or limits.tokens or limits.epochs)
    is_default = (
        run.model == ModelSettings()
        and run.batch == BatchSettings()
        and run.data.sequence == DataSettings().sequence
    )
    return (
        is_default and has_no_limit and limits.minutes in (0, DEFAULT_MINUTES) and not limits.exact
    )


def apply_recipe(run: Run, recipe: Recipe) -> Run:
    """The run as `recipe` has it; what the user set otherwise stays."""
    current = flatten(replace(run, model=ModelSettings()))
    defaults = flatten(Run())
    keys = {key: value for key, value in recipe.overrides.items() if current[key] == defaults[key]}
    return override(replace(run, model=model_presets()[recipe.preset]), keys)


def choose_recipe(
    run: Run, cluster: Cluster, vocabulary: int, processes: int | None = None
) -> tuple[Run, str]:
    """The run with the largest recipe whose tokens this machine trains on in the run's time, and
    what to say of it. `run` follows the clock, its precision is resolved."""
    minutes = run.run.minutes or DEFAULT_MINUTES
    seconds = 60 * minutes
    for recipe in RECIPES:
        new_run = apply_recipe(run, recipe)
        prediction = make_plan(new_run, cluster, vocabulary, processes).predicted
        tokens = seconds * prediction.tokens_per_s
        if tokens >= recipe.tokens:
            break
    steps = seconds / prediction.step_s
    text = f"{new_run.model.name}, {steps:,.0f} steps in {seconds:.0f} s as planned"
    if steps < MIN_USEFUL_STEPS:
        keys = {"model.preset": recipe.preset, **recipe.overrides}
        keys["run.minutes"] = math.ceil(minutes * MIN_USEFUL_STEPS / steps)
        words = " ".join(f"{key}={value}" for key, value in keys.items())
        text += (
            f": too few for a useful model on this machine; this makes one: cordee train {words}"
        )
    return new_run, text


def resolve_for_machine(
    run: Run, cluster: Cluster, vocabulary: int, processes: int | None = None
) -> tuple[Run, str]:
    """The run with its precision, and where it follows the clock its recipe, resolved for these
    devices; what to say of the recipe ("": the sizes are the user's)."""
    run = with_precision(run, select_cluster(run, cluster))
    return choose_recipe(run, cluster, vocabulary, processes) if follows_clock(run) else (run, "")


def restore_recipe(run: Run, recorded_run: Run) -> Run:
    """The run with the recipe that it began with, if that was one of the table."""
    for recipe in (*RECIPES, Recipe(DEFAULT_PRESET, 0, {})):
        new_run = apply_recipe(run, recipe)
        settings = flatten(new_run), flatten(recorded_run)
        sections = ("model.", "batch.", "data.sequence")
        if all(
            settings[0][key] == settings[1][key] for key in settings[0] if key.startswith(sections)
        ):
            return new_run
    return run


def with_evaluation(run: Run, tokens_per_s: float, rank_tokens_per_s: float) -> Run:
    """The run with evaluate.tokens and evaluate.sample resolved. Rates are of training, over all
    ranks and of the one rank that samples; 0: unknown."""
    tokens, sample = EVALUATION_TOKENS, SAMPLE_TOKENS
    limits = run.run
    if limits.minutes and not (limits.steps or limits.tokens or limits.epochs):
        seconds = 60 * limits.minutes
        if tokens_per_s:
            affordable_tokens = int(EVALUATION_SHARE * seconds * FORWARD_SPEEDUP * tokens_per_s)
            tokens = min(EVALUATION_TOKENS, max(MIN_EVALUATION_TOKENS, affordable_tokens))
        if rank_tokens_per_s:  # each sampled token computes its whole window
            affordable_tokens = int(
                SAMPLE_SHARE * seconds * FORWARD_SPEEDUP * rank_tokens_per_s / run.data.sequence
            )
            sample = min(SAMPLE_TOKENS, max(MIN_SAMPLE_TOKENS, affordable_tokens))
    values = {"evaluate.tokens": tokens, "evaluate.sample": sample}
    config = flatten(run)
    return override(run, {key: v for key, v in values.items() if config[key] == "auto"})
