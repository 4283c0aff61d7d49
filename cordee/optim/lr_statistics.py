"""Robust estimates for a handful of short, noisy runs with two or three seeds each: smoothed
curves, differences that count as none, and the band around the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

CONSECUTIVE_POINTS = 3
"""Points of a curve that must agree before a fall or a rise is believed."""


@dataclass
class LRCandidate:
    """A learning rate, and its final loss of each seed (inf: diverged) in each rung it ran."""

    lr: float
    final_losses: list[list[float]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    has_diverged: bool = False

    def mean_loss(self) -> float:
        """Mean over seeds in the longest rung that it ran; 0 before the first."""
        return fmean(self.final_losses[-1]) if self.final_losses else 0.0


@dataclass(frozen=True)
class RungScale:
    """Of a rung: its lowest loss, and the difference that counts as none."""

    lowest_loss: float
    tolerance: float


@dataclass(frozen=True)
class LRBand:
    """Rates that noise does not separate from the best; `edge_names`: the search's edges it
    touches."""

    low: float
    high: float
    candidates: tuple[LRCandidate, ...]
    edge_names: frozenset[str]
    slope: float
    """Of the excess over log10 of the rate, in units of what counts as equal."""

    def is_flat(self, max_decades: float) -> bool:
        """Whether it is wider than `max_decades` decades and has no slope: the experiment says
        nothing then."""
        width = math.log10(self.high / self.low)
        return width > max_decades and abs(self.slope) * width < 0.5


def rung_scale(
    candidates: Sequence[LRCandidate], steps: int, min_tolerance: float
) -> RungScale | None:
    """The scale of the rung of `steps` steps: its tolerance is one standard error of a mean over
    the seeds, at least `min_tolerance`. None when every candidate diverged."""
    losses = [c.final_losses[c.steps.index(steps)] for c in candidates if steps in c.steps]
    finite_losses = sorted((f for f in losses if math.isfinite(fmean(f))), key=fmean)
    if not finite_losses:
        return None
    better_half = finite_losses[: max(2, math.ceil(len(finite_losses) / 2))]
    return RungScale(fmean(finite_losses[0]), max(standard_error(better_half), min_tolerance))


def excess(candidate: LRCandidate, scales: Mapping[int, RungScale]) -> float:
    """How far it lies above the best of its longest rung, in tolerances."""
    scale = scales.get(candidate.steps[-1])
    if candidate.has_diverged or scale is None:
        return math.inf
    return (candidate.mean_loss() - scale.lowest_loss) / scale.tolerance


def band_around(
    best: LRCandidate, candidates: Sequence[LRCandidate], scales: Mapping[int, RungScale]
) -> LRBand:
    """Neighbours of `best` whose excess is at most 1. Edges between two candidates are interpolated
    in log rate, taking the excess as quadratic there; towards one that diverged they are not."""
    excesses = [excess(c, scales) for c in candidates]
    low = high = next(i for i, c in enumerate(candidates) if c is best)
    while low > 0 and excesses[low - 1] <= 1:
        low -= 1
    while high < len(excesses) - 1 and excesses[high + 1] <= 1:
        high += 1
    edge_lrs = []
    for inner, outer in ((low, low - 1), (high, high + 1)):
        rate = candidates[inner].lr
        if 0 <= outer < len(excesses) and math.isfinite(excesses[outer]):
            root = math.sqrt(max(0.0, excesses[inner]))
            fraction = (1 - root) / (math.sqrt(excesses[outer]) - root)
            rate *= (candidates[outer].lr / rate) ** fraction
        edge_lrs.append(rate)
    edge_names = {"lower"} if low == 0 else set()
    edge_names |= {"upper"} if high == len(excesses) - 1 else set()
    rates = [math.log10(c.lr) for c in candidates[low : high + 1]]
    slope = _slope(rates, excesses[low : high + 1])
    inside = tuple(candidates[low : high + 1])
    return LRBand(edge_lrs[0], edge_lrs[1], inside, frozenset(edge_names), slope)


def best_lr_by_seed(finalists: Sequence[LRCandidate]) -> list[float]:
    """Of each seed, the rate with the lowest final loss in the longest rung."""
    by_seed = zip(*(c.final_losses[-1] for c in finalists), strict=True)
    return [finalists[losses.index(min(losses))].lr for losses in by_seed]


def median_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Median over the runs that reached a step; a run that diverged (ends in inf) stays there."""
    medians = []
    for step in range(max(map(len, curves), default=0)):
        curves_at_step = [c for c in curves if step < len(c) or (c and c[-1] == math.inf)]
        losses = sorted(c[min(step, len(c) - 1)] for c in curves_at_step)
        medians.append(losses[len(losses) // 2])
    return medians


def exponential_average(values: Sequence[float], decay: float) -> list[float]:
    """Exponential moving average, corrected for its start at zero."""
    total, weight, averages = 0.0, 0.0, []
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        averages.append(total / weight)
    return averages


def first_lasting_index(
    values: Sequence[float], predicate: Callable[[float], bool], start: int = 0
) -> int | None:
    """First index from `start` with `predicate` for CONSECUTIVE_POINTS values, or an infinite
    one."""
    for i in range(start, len(values)):
        window = values[i : i + CONSECUTIVE_POINTS]
        has_enough = len(window) == CONSECUTIVE_POINTS or math.isinf(window[0])
        if has_enough and all(map(predicate, window)):
            return i
    return None


def curve_noise(pieces: Sequence[Sequence[float]]) -> float:
    """Noise of curves with a trend: median absolute second difference, as a normal deviation."""
    second_differences = [
        abs(a - 2 * b + c)
        for piece in pieces
        for a, b, c in zip(piece, piece[1:], piece[2:], strict=False)
        if math.isfinite(a + b + c)
    ]
    if len(second_differences) < 6:
        return 0.0
    # 1.4826 makes a deviation of a median; a second difference has 6 times a value's variance.
    return 1.4826 * median(second_differences) / math.sqrt(6)


def standard_error(finals: Sequence[Sequence[float]]) -> float:
    """Standard error of a row's mean over seeds, by the residuals without row and seed effects."""
    rows, seeds = len(finals), len(finals[0])
    if rows < 2 or seeds < 2:
        return 0.0
    row_means = [fmean(row) for row in finals]
    seed_means = [fmean(column) for column in zip(*finals, strict=True)]
    grand_mean = fmean(row_means)
    residual = sum(
        (finals[i][j] - row_means[i] - seed_means[j] + grand_mean) ** 2
        for i in range(rows)
        for j in range(seeds)
    )
    return math.sqrt(residual / ((rows - 1) * (seeds - 1)) / seeds)


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    mean_x, mean_y = fmean(x), fmean(y)
    sum_squares = sum((a - mean_x) ** 2 for a in x)
    sum_products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return sum_products / (sum_squares or 1.0)
