"""What a run that follows the clock does on this machine: its model, its batch, its evaluation.

Such a run has no limit but two minutes, so that nothing about it is the same on two machines; all
other runs take their sizes from the user alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cordee.config.check import DEFAULT_MINUTES
from cordee.config.load import flatten, override
from cordee.config.model import USUAL_PRESET, ModelSettings
from cordee.config.presets import model_presets
from cordee.config.run import BatchSettings, DataSettings, Run
from cordee.plan.cluster import Cluster
from cordee.plan.devices import with_precision
from cordee.plan.plan import devices_of, make_plan

TOKENS, SAMPLE = 262144, 240
"""Held-out tokens and sampled tokens of a run that has time for them."""
SHARE, SAMPLE_SHARE = 0.065, 0.015
"""Parts of a run's time that its evaluation and its sample take at most."""
LEAST_TOKENS, LEAST_SAMPLE = 8192, 40
"""Fewer say nothing."""
FORWARD = 3.0
"""A forward is so many times as fast as forward, backward and update."""
FEW_STEPS = 150
"""Steps below which a default run ends with nothing that is worth reading."""


@dataclass(frozen=True)
class Recipe:
    """A model and batch for machines that train it on `tokens` tokens in a default run's time."""

    preset: str
    tokens: int
    keys: Mapping[str, Any]


SHORT = {"data.sequence": 128}
GENTLE = {"optim.lr": 0.012, "optim.adam_lr": 0.015}

RECIPES = (
    Recipe("tiny", 2_400_000, {}),
    Recipe("tiny", 1_200_000, {"model.layers": 3, **SHORT, **GENTLE}),
    Recipe("tiny", 500_000, {"model.layers": 2, **SHORT}),
    Recipe("micro", 0, SHORT),
)
"""Largest first; the last one is for all others."""


def follows_clock(run: Run) -> bool:
    """Whether model and batch are for the machine to choose: the user gave neither, nor a limit,
    and asks for no bits."""
    limits = run.run
    no_limit = not (limits.steps or limits.tokens or limits.epochs)
    usual = (
        run.model == ModelSettings()
        and run.batch == BatchSettings()
        and run.data.sequence == DataSettings().sequence
    )
    return usual and no_limit and limits.minutes in (0, DEFAULT_MINUTES) and not limits.exact


def with_keys(run: Run, recipe: Recipe) -> Run:
    """The run as `recipe` has it; what the user set otherwise stays."""
    before = flatten(replace(run, model=ModelSettings()))
    usual = flatten(Run())
    keys = {key: value for key, value in recipe.keys.items() if before[key] == usual[key]}
    return override(replace(run, model=model_presets()[recipe.preset]), keys)


def choose_recipe(
    run: Run, cluster: Cluster, vocabulary: int, processes: int | None = None
) -> tuple[Run, str]:
    """The run with the largest recipe whose tokens this machine trains on in the run's time, and
    what to say of it. `run` follows the clock, its precision is resolved."""
    minutes = run.run.minutes or DEFAULT_MINUTES
    seconds = 60 * minutes
    for recipe in RECIPES:
        chosen = with_keys(run, recipe)
        predicted = make_plan(chosen, cluster, vocabulary, processes).predicted
        tokens = seconds * predicted.tokens_per_s
        if tokens >= recipe.tokens:
            break
    steps = seconds / predicted.step_s
    text = f"{chosen.model.name}, {steps:,.0f} steps in {seconds:.0f} s as planned"
    if steps < FEW_STEPS:
        keys = {"model.preset": recipe.preset, **recipe.keys}
        keys["run.minutes"] = math.ceil(minutes * FEW_STEPS / steps)
        words = " ".join(f"{key}={value}" for key, value in keys.items())
        text += (
            f": too few for a useful model on this machine; this makes one: cordee train {words}"
        )
    return chosen, text


def for_machine(
    run: Run, cluster: Cluster, vocabulary: int, processes: int | None = None
) -> tuple[Run, str]:
    """The run with its precision, and where it follows the clock its recipe, resolved for these
    devices; what to say of the recipe ("": the sizes are the user's)."""
    run = with_precision(run, devices_of(run, cluster))
    return choose_recipe(run, cluster, vocabulary, processes) if follows_clock(run) else (run, "")


def recorded_recipe(run: Run, recorded: Run) -> Run:
    """The run with the recipe that it began with, if that was one of the table."""
    for recipe in (*RECIPES, Recipe(USUAL_PRESET, 0, {})):
        chosen = with_keys(run, recipe)
        same = flatten(chosen), flatten(recorded)
        sections = ("model.", "batch.", "data.sequence")
        if all(same[0][key] == same[1][key] for key in same[0] if key.startswith(sections)):
            return chosen
    return run


def with_evaluation(run: Run, tokens_per_s: float, rank_tokens_per_s: float) -> Run:
    """The run with evaluate.tokens and evaluate.sample resolved. Rates are of training, over all
    ranks and of the one rank that samples; 0: unknown."""
    tokens, sample = TOKENS, SAMPLE
    limits = run.run
    if limits.minutes and not (limits.steps or limits.tokens or limits.epochs):
        seconds = 60 * limits.minutes
        if tokens_per_s:
            fit = int(SHARE * seconds * FORWARD * tokens_per_s)
            tokens = min(TOKENS, max(LEAST_TOKENS, fit))
        if rank_tokens_per_s:  # each sampled token computes its whole window
            fit = int(SAMPLE_SHARE * seconds * FORWARD * rank_tokens_per_s / run.data.sequence)
            sample = min(SAMPLE, max(LEAST_SAMPLE, fit))
    values = {"evaluate.tokens": tokens, "evaluate.sample": sample}
    current = flatten(run)
    return override(run, {key: v for key, v in values.items() if current[key] == "auto"})
