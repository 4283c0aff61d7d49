"""The learning rate by experiment: noise floor, range test, successive halving, a band.

PAPER: an algorithm over a callable that trains, so that it can be tested on objectives whose answer
is known. Not here: training (`trial.losses_at`), tables and plots (`cli/lr.py`). It sets nothing;
where the experiment cannot tell, it says so and names the reason. Traded away: the long horizon. A
search of a minute sees short runs, and short runs forgive a high rate a little more than long ones
do; hence the suggestion is the middle of the band and never above the best rate tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, pstdev

from cordee.errors import ConfigError
from cordee.optim.compare import (
    Band,
    Candidate,
    Scale,
    band_around,
    best_of_seeds,
    first_where,
    median_curve,
    roughness,
    scale_of,
    smoothed,
)

Sweep = Callable[[Sequence[float], int], list[float]]
"""(learning rate of each step, seed) -> loss before each update. A run that diverged ends with a
value that is not finite; a list that is merely shorter is a run that merely ended."""

NOISE_STEPS = 6
RANGE_SHARE = 0.35  # of the budget; the rest goes to the candidates
SHORTEST_RANGE, SHORTEST_RUNG, LONG_RUNG = 30, 8, 12
USEFUL = 0.05  # a rate is worth trying once a twentieth of the whole fall is behind it
FEWEST = 3  # a field is not halved below this, so that a band has neighbours on both sides


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What the search may spend and where it looks."""

    centre: float
    """Middle of the range test: the update rule's own default rate."""
    steps: int = 560
    """Budget: optimiser steps of all runs together. An extension may add a third."""
    seeds: int = 2
    """Seeds of every candidate, at least 2; the range test uses at least 3."""
    first_seed: int = 0
    decades: float = 5.0
    """Width of the range test."""
    candidates: int = 7
    """Rates that enter the successive halving, log-spaced between the bounds."""
    warmup: float = 0.2
    """Part of a candidate's run over which its rate rises linearly from 0."""
    sure: float = 3.0
    """A fall or a rise counts when it exceeds this many standard deviations of the noise."""
    quantum: float = 1e-3
    """Differences below this part of the starting loss do not matter, however small the noise."""
    widest: float = 1.5
    """Decades; a wider band without a slope means that the experiment cannot tell."""

    def check(self) -> None:
        """ConfigError when the budget cannot hold the experiment."""
        _lengths(self)


@dataclass(frozen=True)
class Point:
    """A step of the range test: median loss over the seeds, and its smoothed curve."""

    lr: float
    loss: float
    smoothed: float


@dataclass(frozen=True)
class Row:
    """A candidate: final smoothed loss (mean over seeds, inf if it diverged) of each rung it ran,
    and the length of those rungs in steps."""

    lr: float
    losses: tuple[float, ...]
    steps: tuple[int, ...]
    diverged: bool


@dataclass(frozen=True)
class Finding:
    """What the search found. `noise` is the standard deviation of one loss, in the loss's unit;
    `band` the rates that cannot be told from the best; `reason` why it is inconclusive."""

    rows: tuple[Row, ...]
    range_test: tuple[Point, ...]
    start: float
    noise: float
    bounds: tuple[float, float] | None
    best: float | None
    band: tuple[float, float] | None
    suggestion: float | None
    conclusive: bool
    reason: str
    steps_used: int


def find_lr(sweep: Sweep, settings: SearchSettings, say: Callable[[str], None]) -> Finding:
    """Searches a learning rate; deterministic if `sweep` is. `say` is told what runs next.

    Raises ConfigError when the budget cannot hold the experiment; every other failure is a Finding
    with `conclusive` False and a reason.
    """
    search = _Search(sweep, settings, say, _lengths(settings))
    reason = search.noise_floor() or search.range_test() or search.halve() or search.settle()
    return search.finding(reason)


def warmed(lr: float, steps: int, warmup: float) -> list[float]:
    """A candidate's schedule: linear from 0 over the first part `warmup`, then constant."""
    rising = max(1, round(warmup * steps))
    return [lr * min(1.0, (step + 1) / rising) for step in range(steps)]


@dataclass(frozen=True)
class _Lengths:
    range_seeds: int
    range_steps: int
    rungs: tuple[tuple[int, int], ...]
    """(candidates, steps) of each rung."""


def _lengths(settings: SearchSettings) -> _Lengths:
    """Shares the budget out; ConfigError when a part of the experiment would be too short."""
    positive = {"centre": settings.centre, "decades": settings.decades, "steps": settings.steps}
    for name, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{name} must be positive", values={name: value}, fix=f"{name}=1")
    if settings.seeds < 2:
        raise ConfigError(
            "one seed cannot show how far seeds disagree",
            values={"seeds": settings.seeds},
            fix="--seeds 2",
        )
    range_seeds = max(3, settings.seeds)
    left = settings.steps - NOISE_STEPS * range_seeds
    range_steps = int(RANGE_SHARE * left / range_seeds)
    whole = settings.candidates
    half = max(FEWEST, math.ceil(whole / 2))
    for field_sizes in ((whole, half, max(FEWEST, math.ceil(half / 2))), (whole, half)):
        weight = settings.seeds * sum(n * 2**i for i, n in enumerate(field_sizes))
        shortest = int((1 - RANGE_SHARE) * left / weight)
        if shortest >= LONG_RUNG:
            break
    if range_steps < SHORTEST_RANGE or shortest < SHORTEST_RUNG:
        least = max(
            SHORTEST_RANGE * range_seeds / RANGE_SHARE, SHORTEST_RUNG * weight / (1 - RANGE_SHARE)
        )
        raise ConfigError(
            "the budget is too small for a search that could be believed",
            values={"steps": settings.steps, "seeds": settings.seeds},
            fix=f"--steps {math.ceil(least) + NOISE_STEPS * range_seeds + 2}",
        )
    rungs = tuple((n, shortest * 2**i) for i, n in enumerate(field_sizes))
    return _Lengths(range_seeds, range_steps, rungs)


class _Search:
    """The state of one search. Each stage returns "" or the reason for which it cannot go on."""

    def __init__(
        self, sweep: Sweep, settings: SearchSettings, say: Callable[[str], None], plan: _Lengths
    ) -> None:
        self.sweep, self.settings, self.say, self.plan = sweep, settings, say, plan
        self.longest = plan.rungs[-1][1]
        self.spent = 0
        self.start = self.noise = math.nan
        self.points: list[Point] = []
        self.bounds: tuple[float, float] | None = None
        self.candidates: list[Candidate] = []
        self.scales: dict[int, Scale] = {}  # of each rung, by its steps
        self.whole: dict[tuple[int, int], int] = {}  # longest run yet, by (steps asked, seed)
        self.band: Band | None = None

    def run(self, rates: Sequence[float], seed: int) -> list[float]:
        """One run, counted; everything from the first value that is not finite is one inf."""
        losses = list(self.sweep(rates, self.settings.first_seed + seed))
        self.spent += len(losses)
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                return [*losses[:index], math.inf]
        return losses

    def noise_floor(self) -> str:
        """The spread of losses that no update explains, and the loss from which runs start."""
        seeds = self.plan.range_seeds
        self.say(f"noise floor: {NOISE_STEPS} steps at learning rate 0, {seeds} seeds")
        losses = [x for seed in range(seeds) for x in self.run([0.0] * NOISE_STEPS, seed)]
        if not losses or not all(map(math.isfinite, losses)):
            return "the loss is not finite before any update: the model or the data is at fault"
        self.start, self.noise = median(losses), pstdev(losses)
        return ""

    def range_test(self) -> str:
        """Exponential rise of the rate; bounds the search where the loss first falls and rises."""
        s, steps, seeds = self.settings, self.plan.range_steps, self.plan.range_seeds
        rates = [s.centre * 10 ** (s.decades * (i / (steps - 1) - 0.5)) for i in range(steps)]
        self.say(f"range test: {steps} steps from {rates[0]:.2g} to {rates[-1]:.2g}, {seeds} seeds")
        curves = [self.run(rates, seed) for seed in range(seeds)]
        medians = median_curve(curves)
        if not medians:
            return "the range test gave no loss at all"
        keep = 0.5 ** (40 / max(40, steps))  # half-life of a fortieth of the test, at least a step
        smooth = smoothed(medians, keep)
        self.points = [Point(*row) for row in zip(rates, medians, smooth, strict=False)]
        quiet = math.sqrt((1 - keep) / (1 + keep)) * 1.25 / math.sqrt(seeds)  # median, then EMA
        clear = s.sure * max(self.noise * quiet, s.quantum * abs(self.start))
        fell = first_where(smooth, lambda x: x < self.start - clear)
        lowest = min(range(len(smooth)), key=smooth.__getitem__)
        if fell is None:
            return self._never_fell(smooth, clear)
        self.noise = max(self.noise, roughness([curve[fell : lowest + 1] for curve in curves]))
        clear = s.sure * max(self.noise * quiet, s.quantum * abs(self.start))
        rose = first_where(smooth, lambda x: x > smooth[lowest] + clear, lowest)
        high = rates[len(smooth) - 1 if rose is None else rose]
        useful = USEFUL * (self.start - smooth[lowest])
        low = rates[first_where(smooth, lambda x: x < self.start - max(clear, useful)) or fell]
        self.bounds = (min(low, high / 10), high)
        edge = "rises again" if rose is not None else "the test ends, still without a rise,"
        self.say(f"the loss first falls at {low:.2g} and {edge} at {high:.2g}")
        return ""

    def _never_fell(self, smooth: Sequence[float], clear: float) -> str:
        low, high = self.points[0].lr, self.points[-1].lr
        if first_where(smooth, lambda x: x > self.start + clear) is not None:
            return (
                f"everything diverged: from {low:.2g} upwards the loss only rose;"
                " centre the search lower with optim.lr"
            )
        return (
            f"the loss never fell by more than the noise ({self.noise:.2g}) between {low:.2g} and"
            f" {high:.2g}; give it more steps, or centre the search elsewhere with optim.lr"
        )

    def halve(self) -> str:
        """Rungs of ever longer runs, each from step 0, for ever fewer candidates."""
        assert self.bounds is not None
        low, high = self.bounds
        count = self.settings.candidates
        self.candidates = [Candidate(low * (high / low) ** (i / (count - 1))) for i in range(count)]
        going = list(self.candidates)
        for size, steps in self.plan.rungs:
            going = sorted(going, key=Candidate.loss)[:size]
            self.rung(sorted(going, key=Candidate.rate), steps)
            going = [c for c in going if not c.diverged]
            if not going:
                return (
                    f"everything diverged: no rate from {low:.2g} to {high:.2g} held for {steps}"
                    " steps; centre the search lower with optim.lr"
                )
        return ""

    def rung(self, going: Sequence[Candidate], steps: int) -> None:
        """Runs the candidates for `steps` steps each. The final loss is a mean over the last
        quarter. A run that ended before others of its seed diverged: data ends for all alike."""
        s = self.settings
        self.say(
            f"{len(going)} rates from {going[0].lr:.2g} to {going[-1].lr:.2g}:"
            f" {steps} steps each, {s.seeds} seeds"
        )
        curves = [
            [self.run(warmed(c.lr, steps, s.warmup), seed) for seed in range(s.seeds)]
            for c in going
        ]
        for candidate in going:
            candidate.steps.append(steps)
            candidate.finals.append([])
        for seed in range(s.seeds):
            lengths = [len(c[seed]) for c in curves if math.inf not in c[seed]]
            whole = max([self.whole.get((steps, seed), 0), *lengths])
            self.whole[steps, seed] = whole
            for candidate, runs in zip(going, curves, strict=True):
                held = whole > 0 and len(runs[seed]) == whole and math.inf not in runs[seed]
                last = runs[seed][-_window(whole) :]
                candidate.finals[-1].append(fmean(last) if held else math.inf)
        for candidate in going:
            candidate.diverged = candidate.loss() > self.start + s.sure * self.noise
        self.weigh(steps)

    def weigh(self, steps: int) -> None:
        """Sets what counts as equal after `steps` steps; at least the noise of a final loss."""
        scale = scale_of(self.candidates, steps, self.floor(steps))
        if scale is not None:
            self.scales[steps] = scale

    def floor(self, steps: int) -> float:
        """Noise of a final loss after `steps` steps, or what does not matter anyway."""
        noise = self.noise / math.sqrt(self.settings.seeds * _window(steps))
        return max(noise, self.settings.quantum * abs(self.start))

    def finalists(self) -> list[Candidate]:
        """Candidates that held through the last rung, the best first."""
        held = [c for c in self.candidates if c.steps[-1] == self.longest and not c.diverged]
        return sorted(held, key=Candidate.loss)

    def find_band(self) -> Band:
        """The band around the best of the finalists."""
        self.candidates.sort(key=Candidate.rate)
        self.band = band_around(self.finalists()[0], self.candidates, self.scales)
        return self.band

    def settle(self) -> str:
        """The band: refined with what is left of the budget, or extended once past an edge that
        it touches; then the reasons for which it may say nothing."""
        s, band = self.settings, self.find_band()
        clear = s.sure * self.floor(self.longest)
        if self.finalists()[0].loss() > self.start - clear:
            return (
                f"no candidate's loss fell by more than the noise in {self.longest} steps;"
                " give it more steps"
            )
        if not band.touches:
            band = self.refine(band)
        if len(band.touches) == 1:
            band = self.extend(band)
        if len(band.touches) == 1:
            (edge,) = band.touches
            return (
                f"the best rates lie at the {edge} edge of the search, and extending it once did"
                " not help; centre it there with optim.lr, or give it more steps"
            )
        if band.touches or band.is_flat(s.widest):
            return (
                f"rates from {band.low:.2g} to {band.high:.2g} give the same loss within the noise;"
                " more steps or seeds may tell them apart"
            )
        best = best_of_seeds(self.finalists())
        if max(best) > 10.001 * min(best):
            rates = ", ".join(f"{lr:.2g}" for lr in best)
            return f"the seeds disagree by more than a decade: their best rates are {rates}"
        return ""

    def extend(self, band: Band) -> Band:
        """A decade or more of new candidates past the edge, at the length of the last rung."""
        (edge,) = band.touches
        ratio = max(10 ** (1 / 3), self.candidates[1].lr / self.candidates[0].lr)
        outermost = self.candidates[0 if edge == "lower" else -1].lr
        sign = -1 if edge == "lower" else 1
        self.say(f"the band touches the {edge} edge, {outermost:.2g}: extending the search once")
        return self.add([outermost * ratio ** (sign * i) for i in (1, 2, 3)])

    def refine(self, band: Band) -> Band:
        """Rates half-way to the neighbours of the best, if the budget still holds them: it does
        where candidates diverged early."""
        best = next(i for i, c in enumerate(self.candidates) if c is self.finalists()[0])
        beside = [c.lr for c in self.candidates[max(0, best - 1) : best + 2]]
        between = [math.sqrt(a * b) for a, b in pairwise(beside)]
        cost = len(between) * self.settings.seeds * self.longest
        return self.add(between) if self.spent + cost <= self.settings.steps else band

    def add(self, rates: Sequence[float]) -> Band:
        """More candidates, run at the length of the last rung."""
        new = [Candidate(lr) for lr in sorted(rates)]
        self.candidates += new
        self.rung(new, self.longest)
        return self.find_band()

    def finding(self, reason: str) -> Finding:
        """The search as a Finding; a suggestion only when nothing speaks against it."""
        rows = tuple(
            Row(c.lr, tuple(map(fmean, c.finals)), tuple(c.steps), c.diverged)
            for c in self.candidates
        )
        best = self.finalists()[0].lr if self.band else None
        band = (self.band.low, self.band.high) if self.band else None
        suggestion = None
        if best is not None and band is not None and not reason:
            suggestion = min(math.sqrt(band[0] * band[1]), best)
        return Finding(
            rows=rows,
            range_test=tuple(self.points),
            start=self.start,
            noise=self.noise,
            bounds=self.bounds,
            best=best,
            band=band,
            suggestion=suggestion,
            conclusive=not reason,
            reason=reason,
            steps_used=self.spent,
        )


def _window(steps: int) -> int:
    """Losses at a run's end over which its final loss is the mean."""
    return max(2, steps // 4)
