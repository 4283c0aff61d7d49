"""Comparing short, noisy runs: curves, what counts as equal, and the band around the best.

PAPER: pure functions used by `search.py`. Not here: which runs are made. Traded away: a statistics
library; these are robust estimates for a handful of runs with two or three seeds each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

IN_A_ROW = 3
"""Points of a curve that must agree before a fall or a rise is believed."""


@dataclass
class Candidate:
    """A learning rate, and its final loss of each seed (inf: diverged) in each rung it ran."""

    lr: float
    finals: list[list[float]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    diverged: bool = False

    def rate(self) -> float:
        """Its learning rate: the order in which candidates stand."""
        return self.lr

    def loss(self) -> float:
        """Mean over seeds in the longest rung that it ran; 0 before the first."""
        return fmean(self.finals[-1]) if self.finals else 0.0


@dataclass(frozen=True)
class Scale:
    """Of a rung: its lowest loss, and the difference that counts as none."""

    lowest: float
    equal: float


@dataclass(frozen=True)
class Band:
    """Rates that cannot be told from the best; `touches` names the search's edges it lies at."""

    low: float
    high: float
    inside: tuple[Candidate, ...]
    touches: frozenset[str]
    slope: float
    """Of the excess over log10 of the rate, in units of what counts as equal."""

    def is_flat(self, widest: float) -> bool:
        """Wider than `widest` decades, and without a slope: then the experiment says nothing."""
        width = math.log10(self.high / self.low)
        return width > widest and abs(self.slope) * width < 0.5


def scale_of(candidates: Sequence[Candidate], steps: int, floor: float) -> Scale | None:
    """The scale of the rung of `steps` steps: what counts as equal is one standard error of a mean
    over the seeds, or `floor` where that is larger. None when nothing held."""
    finals = [c.finals[c.steps.index(steps)] for c in candidates if steps in c.steps]
    held = sorted((f for f in finals if math.isfinite(fmean(f))), key=fmean)
    if not held:
        return None
    better_half = held[: max(2, math.ceil(len(held) / 2))]
    return Scale(fmean(held[0]), max(standard_error(better_half), floor))


def excess(candidate: Candidate, scales: Mapping[int, Scale]) -> float:
    """How far it lies above the best of its longest rung, in units of what counts as equal."""
    scale = scales.get(candidate.steps[-1])
    if candidate.diverged or scale is None:
        return math.inf
    return (candidate.loss() - scale.lowest) / scale.equal


def band_around(best: Candidate, field_: Sequence[Candidate], scales: Mapping[int, Scale]) -> Band:
    """Neighbours of `best` whose excess is at most 1. Edges between two candidates are interpolated
    in log rate, taking the excess as quadratic there; towards one that diverged they are not."""
    over = [excess(c, scales) for c in field_]
    low = high = next(i for i, c in enumerate(field_) if c is best)
    while low > 0 and over[low - 1] <= 1:
        low -= 1
    while high < len(over) - 1 and over[high + 1] <= 1:
        high += 1
    edges = []
    for inner, outer in ((low, low - 1), (high, high + 1)):
        rate = field_[inner].lr
        if 0 <= outer < len(over) and math.isfinite(over[outer]):
            root = math.sqrt(max(0.0, over[inner]))
            rate *= (field_[outer].lr / rate) ** ((1 - root) / (math.sqrt(over[outer]) - root))
        edges.append(rate)
    touches = {"lower"} if low == 0 else set()
    touches |= {"upper"} if high == len(over) - 1 else set()
    rates = [math.log10(c.lr) for c in field_[low : high + 1]]
    slope = _slope(rates, over[low : high + 1])
    inside = tuple(field_[low : high + 1])
    return Band(edges[0], edges[1], inside, frozenset(touches), slope)


def best_of_seeds(finalists: Sequence[Candidate]) -> list[float]:
    """Of each seed, the rate with the lowest final loss in the longest rung."""
    by_seed = zip(*(c.finals[-1] for c in finalists), strict=True)
    return [finalists[losses.index(min(losses))].lr for losses in by_seed]


def median_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Median over the runs that reached a step; a run that diverged (ends in inf) stays there."""
    medians = []
    for step in range(max(map(len, curves), default=0)):
        there = [c for c in curves if step < len(c) or (c and c[-1] == math.inf)]
        reached = sorted(c[min(step, len(c) - 1)] for c in there)
        medians.append(reached[len(reached) // 2])
    return medians


def smoothed(values: Sequence[float], keep: float) -> list[float]:
    """Exponential moving average, corrected for its start at zero."""
    total, weight, smooth = 0.0, 0.0, []
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smooth.append(total / weight)
    return smooth


def first_where(
    values: Sequence[float], holds: Callable[[float], bool], after: int = 0
) -> int | None:
    """First index from `after` at which `holds` for IN_A_ROW values, or for an infinite one."""
    for i in range(after, len(values)):
        row = values[i : i + IN_A_ROW]
        enough = len(row) == IN_A_ROW or math.isinf(row[0])
        if enough and all(map(holds, row)):
            return i
    return None


def roughness(pieces: Sequence[Sequence[float]]) -> float:
    """Noise of curves with a trend: median absolute second difference, as a normal deviation."""
    bends = [
        abs(a - 2 * b + c)
        for piece in pieces
        for a, b, c in zip(piece, piece[1:], piece[2:], strict=False)
        if math.isfinite(a + b + c)
    ]
    return 1.4826 * median(bends) / math.sqrt(6) if len(bends) >= 6 else 0.0


def standard_error(finals: Sequence[Sequence[float]]) -> float:
    """Of a row's mean: what is left of rows x seeds without row and seed effects."""
    rows, seeds = len(finals), len(finals[0])
    if rows < 2 or seeds < 2:
        return 0.0
    row_means = [fmean(row) for row in finals]
    seed_means = [fmean(column) for column in zip(*finals, strict=True)]
    grand = fmean(row_means)
    left = sum(
        (finals[i][j] - row_means[i] - seed_means[j] + grand) ** 2
        for i in range(rows)
        for j in range(seeds)
    )
    return math.sqrt(left / ((rows - 1) * (seeds - 1)) / seeds)


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    mean_x, mean_y = fmean(x), fmean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / (spread or 1.0)
