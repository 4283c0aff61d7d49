"""The learning rate over a run, as a factor on the peak.

Not here: what progress is (steps, tokens or minutes, whichever limit is nearest: the caller's), the
peak itself (`inspect_groups.py`). A pure function, so that a resumed run needs no state of it.
"""

from __future__ import annotations

import math

from cordee.config.run import OptimSettings

MIN_WARMUP_FACTOR = 0.01
"""Least factor during warm-up: a first step of length zero would be a step thrown away."""


def lr_factor(settings: OptimSettings, progress: float, step: int) -> float:
    """Factor on the peak rate for `step` (from 0), which starts at `progress` (0 to 1) of the run.

    Warm-up rises to 1 at `settings.warmup` and is read at the end of the step (from the average
    length of the steps so far), so that it is never 0. Then, down to `settings.final`: constant
    stays; cosine (Loshchilov & Hutter 2017) and linear fall from the end of the warm-up to the end
    of the run; wsd (Hu et al. 2024) is flat and falls linearly over the last `settings.decay`.
    """
    progress = min(max(progress, 0.0), 1.0)
    return _warmup_factor(settings, progress, step) * _decay_factor(settings, progress)


def _warmup_factor(settings: OptimSettings, progress: float, step: int) -> float:
    if progress >= settings.warmup:
        return 1.0
    end = progress * (step + 1) / max(step, 1)
    return min(1.0, max(MIN_WARMUP_FACTOR, end / settings.warmup))


def _decay_factor(settings: OptimSettings, progress: float) -> float:
    if settings.schedule == "constant":
        return 1.0
    start = settings.warmup
    if settings.schedule == "wsd":
        start = max(start, 1.0 - settings.decay)
    if progress <= start:
        return 1.0
    decay_progress = (progress - start) / (1.0 - start)
    remainder = (
        0.5 + 0.5 * math.cos(math.pi * decay_progress)
        if settings.schedule == "cosine"
        else 1.0 - decay_progress
    )
    return settings.final + (1.0 - settings.final) * remainder
