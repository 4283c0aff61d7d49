"""The learning rate by experiment: noise floor, range test, successive halving, a band.

An algorithm over a callable that trains, so that tests give it objectives whose answer is known.
Short runs forgive a high rate a little more than long ones do; hence the suggestion is the middle
of the band and never above the best rate tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from statistics import fmean, median, pstdev

from cordee.errors import ConfigError
from cordee.optim.lr_statistics import (
    LRBand,
    LRCandidate,
    RungScale,
    band_around,
    best_lr_by_seed,
    curve_noise,
    exponential_average,
    first_lasting_index,
    median_curve,
    rung_scale,
)

TrainFn = Callable[[Sequence[float], int], list[float]]
"""(learning rate of each step, seed) -> loss before each update. A run that diverged ends with a
value that is not finite; a list that is only shorter is of a run whose data ended."""

NOISE_STEPS = 6
RANGE_SHARE = 0.35  # of the budget; the rest goes to the candidates
MIN_RANGE_STEPS, MIN_RUNG_STEPS, LONG_RUNG_STEPS = 30, 8, 12
USEFUL_FRACTION = 0.05  # of the range test's whole fall, after which a rate is worth trying
MIN_CANDIDATES = 3  # not halved further, so that a band has neighbours on both sides


@dataclass(frozen=True, kw_only=True)
class LRSearchSettings:
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
    sigma_threshold: float = 3.0
    """A fall or a rise counts when it exceeds this many standard deviations of the noise."""
    min_relative_change: float = 1e-3
    """Differences below this part of the starting loss do not matter, however small the noise."""
    max_band_decades: float = 1.5
    """Decades; a wider band without a slope means that the experiment cannot tell."""

    def check(self) -> None:
        """ConfigError when the budget cannot hold the experiment."""
        _share_budget(self)


@dataclass(frozen=True)
class RangeTestPoint:
    """A step of the range test: median loss over the seeds, and its smoothed curve."""

    lr: float
    loss: float
    smoothed: float


@dataclass(frozen=True)
class RateResult:
    """A candidate: final smoothed loss (mean over seeds, inf if it diverged) of each rung it ran,
    and the length of those rungs in steps."""

    lr: float
    losses: tuple[float, ...]
    steps: tuple[int, ...]
    diverged: bool


@dataclass(frozen=True)
class LRSearchResult:
    """`noise` is the standard deviation of one loss, in the loss's unit; `band` the rates that the
    noise does not separate from the best; `reason` says why a search is inconclusive."""

    rows: tuple[RateResult, ...]
    range_test: tuple[RangeTestPoint, ...]
    start: float
    noise: float
    bounds: tuple[float, float] | None
    best: float | None
    band: tuple[float, float] | None
    suggestion: float | None
    conclusive: bool
    reason: str
    steps_used: int


def find_lr(
    train_fn: TrainFn, settings: LRSearchSettings, log: Callable[[str], None]
) -> LRSearchResult:
    """Searches a learning rate; deterministic if `train_fn` is. `log` gets a line before each part.

    ConfigError when the budget cannot hold the experiment; every other failure is a result with
    `conclusive` False and a reason.
    """
    search = _LRSearch(train_fn, settings, log, _share_budget(settings))
    reason = (
        search.measure_noise()
        or search.run_range_test()
        or search.successive_halving()
        or search.conclude()
    )
    return search.result(reason)


def warmup_schedule(lr: float, steps: int, warmup: float) -> list[float]:
    """A candidate's schedule: linear from 0 over the first part `warmup`, then constant."""
    warmup_steps = max(1, round(warmup * steps))
    return [lr * min(1.0, (step + 1) / warmup_steps) for step in range(steps)]


@dataclass(frozen=True)
class _SearchBudget:
    range_seeds: int
    range_steps: int
    rungs: tuple[tuple[int, int], ...]
    """(candidates, steps) of each rung."""


def _share_budget(settings: LRSearchSettings) -> _SearchBudget:
    """Shares the budget out; ConfigError when a part of the experiment would be too short."""
    for name in ("centre", "decades", "steps"):
        if not (value := getattr(settings, name)) > 0:
            raise ConfigError(f"{name} must be positive", values={name: value}, fix=f"{name}=1")
    if settings.seeds < 2:
        raise ConfigError(
            "one seed cannot show how far seeds disagree",
            values={"seeds": settings.seeds},
            fix="--seeds 2",
        )
    range_seeds = max(3, settings.seeds)
    remaining_steps = settings.steps - NOISE_STEPS * range_seeds
    range_steps = int(RANGE_SHARE * remaining_steps / range_seeds)
    candidate_count = settings.candidates
    half_count = max(MIN_CANDIDATES, math.ceil(candidate_count / 2))
    for rung_sizes in (
        (candidate_count, half_count, max(MIN_CANDIDATES, math.ceil(half_count / 2))),
        (candidate_count, half_count),
    ):
        weight = settings.seeds * sum(n * 2**i for i, n in enumerate(rung_sizes))
        rung_steps = int((1 - RANGE_SHARE) * remaining_steps / weight)
        if rung_steps >= LONG_RUNG_STEPS:
            break
    if range_steps < MIN_RANGE_STEPS or rung_steps < MIN_RUNG_STEPS:
        min_steps = max(
            MIN_RANGE_STEPS * range_seeds / RANGE_SHARE, MIN_RUNG_STEPS * weight / (1 - RANGE_SHARE)
        )
        raise ConfigError(
            "the budget is too small for a search that could be believed",
            values={"steps": settings.steps, "seeds": settings.seeds},
            fix=f"--steps {math.ceil(min_steps) + NOISE_STEPS * range_seeds + 2}",
        )
    rungs = tuple((n, rung_steps * 2**i) for i, n in enumerate(rung_sizes))
    return _SearchBudget(range_seeds, range_steps, rungs)


class _LRSearch:
    """The state of one search. Each stage returns "" or the reason for which it cannot go on."""

    def __init__(
        self,
        train_fn: TrainFn,
        settings: LRSearchSettings,
        log: Callable[[str], None],
        budget: _SearchBudget,
    ) -> None:
        self.train_fn, self.settings, self.log, self.budget = train_fn, settings, log, budget
        self.longest_rung = budget.rungs[-1][1]
        self.steps_used = 0
        self.start = self.noise = math.nan
        self.points: list[RangeTestPoint] = []
        self.bounds: tuple[float, float] | None = None
        self.candidates: list[LRCandidate] = []
        self.scales: dict[int, RungScale] = {}  # by steps of the rung
        self.full_lengths: dict[tuple[int, int], int] = {}  # longest run, by (steps, seed)
        self.band: LRBand | None = None

    def run_trial(self, rates: Sequence[float], seed: int) -> list[float]:
        """One run's losses; from the first that is not finite on, a single inf."""
        losses = list(self.train_fn(rates, self.settings.first_seed + seed))
        self.steps_used += len(losses)
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                return [*losses[:index], math.inf]
        return losses

    def measure_noise(self) -> str:
        """The spread of losses without an update, and the loss from which runs start."""
        seeds = self.budget.range_seeds
        self.log(f"noise floor: {NOISE_STEPS} steps at learning rate 0, {seeds} seeds")
        losses = [x for seed in range(seeds) for x in self.run_trial([0.0] * NOISE_STEPS, seed)]
        if not losses or not all(map(math.isfinite, losses)):
            return "the loss is not finite before any update: the model or the data is at fault"
        self.start, self.noise = median(losses), pstdev(losses)
        return ""

    def run_range_test(self) -> str:
        """Exponential rise of the rate; bounds the search where the loss first falls and rises."""
        s, steps, seeds = self.settings, self.budget.range_steps, self.budget.range_seeds
        rates = [s.centre * 10 ** (s.decades * (i / (steps - 1) - 0.5)) for i in range(steps)]
        self.log(f"range test: {steps} steps from {rates[0]:.2g} to {rates[-1]:.2g}, {seeds} seeds")
        curves = [self.run_trial(rates, seed) for seed in range(seeds)]
        medians = median_curve(curves)
        if not medians:
            return "the range test gave no loss at all"
        decay = 0.5 ** (40 / max(40, steps))  # half-life of a fortieth of the test, at least a step
        averages = exponential_average(medians, decay)
        self.points = [RangeTestPoint(*row) for row in zip(rates, medians, averages, strict=False)]
        # What averaging leaves of the noise: 1.25 / sqrt(seeds) is that of a median.
        noise_share = math.sqrt((1 - decay) / (1 + decay)) * 1.25 / math.sqrt(seeds)
        threshold = self._threshold(noise_share)
        fall_index = first_lasting_index(averages, lambda x: x < self.start - threshold)
        lowest_index = min(range(len(averages)), key=averages.__getitem__)
        if fall_index is None:
            return self._no_fall_reason(averages, threshold)
        falls = [curve[fall_index : lowest_index + 1] for curve in curves]
        self.noise = max(self.noise, curve_noise(falls))
        threshold, lowest = self._threshold(noise_share), averages[lowest_index]
        rise_index = first_lasting_index(averages, lambda x: x > lowest + threshold, lowest_index)
        high = rates[len(averages) - 1 if rise_index is None else rise_index]
        useful_fall = max(threshold, USEFUL_FRACTION * (self.start - lowest))
        low_index = first_lasting_index(averages, lambda x: x < self.start - useful_fall)
        low = rates[low_index or fall_index]
        self.bounds = (min(low, high / 10), high)
        ending = "rises again" if rise_index is not None else "the test ends, still without a rise,"
        self.log(f"the loss first falls at {low:.2g} and {ending} at {high:.2g}")
        return ""

    def _threshold(self, noise_share: float) -> float:
        """Change of an averaged loss that counts."""
        s = self.settings
        smallest_change = s.min_relative_change * abs(self.start)
        return s.sigma_threshold * max(self.noise * noise_share, smallest_change)

    def _no_fall_reason(self, averages: Sequence[float], threshold: float) -> str:
        low, high = self.points[0].lr, self.points[-1].lr
        if first_lasting_index(averages, lambda x: x > self.start + threshold) is not None:
            return (
                f"everything diverged: from {low:.2g} upwards the loss only rose;"
                " centre the search lower with optim.lr"
            )
        return (
            f"the loss never fell by more than the noise ({self.noise:.2g}) between {low:.2g} and"
            f" {high:.2g}; give it more steps, or centre the search elsewhere with optim.lr"
        )

    def successive_halving(self) -> str:
        """Rungs of longer and longer runs, each from step 0, for fewer and fewer candidates."""
        assert self.bounds is not None
        low, high = self.bounds
        count = self.settings.candidates
        self.candidates = [
            LRCandidate(low * (high / low) ** (i / (count - 1))) for i in range(count)
        ]
        survivors = list(self.candidates)
        for size, steps in self.budget.rungs:
            survivors = sorted(survivors, key=LRCandidate.mean_loss)[:size]
            self.run_rung(sorted(survivors, key=attrgetter("lr")), steps)
            survivors = [c for c in survivors if not c.has_diverged]
            if not survivors:
                return (
                    f"everything diverged: no rate from {low:.2g} to {high:.2g} held for {steps}"
                    " steps; centre the search lower with optim.lr"
                )
        return ""

    def run_rung(self, candidates: Sequence[LRCandidate], steps: int) -> None:
        """Runs the candidates for `steps` steps each. The final loss is a mean over the last
        quarter. A run that ended before others of its seed diverged: data ends for all alike."""
        s = self.settings
        self.log(
            f"{len(candidates)} rates from {candidates[0].lr:.2g} to {candidates[-1].lr:.2g}:"
            f" {steps} steps each, {s.seeds} seeds"
        )
        schedules = [warmup_schedule(c.lr, steps, s.warmup) for c in candidates]
        curves = [[self.run_trial(rates, seed) for seed in range(s.seeds)] for rates in schedules]
        for candidate in candidates:
            candidate.steps.append(steps)
            candidate.final_losses.append([])
        for seed in range(s.seeds):
            lengths = [len(c[seed]) for c in curves if math.inf not in c[seed]]
            full_length = max([self.full_lengths.get((steps, seed), 0), *lengths])
            self.full_lengths[steps, seed] = full_length
            for candidate, runs in zip(candidates, curves, strict=True):
                losses = runs[seed]
                is_complete = len(losses) == full_length > 0 and math.inf not in losses
                last_losses = losses[-_final_window(full_length) :]
                candidate.final_losses[-1].append(fmean(last_losses) if is_complete else math.inf)
        for candidate in candidates:
            highest_loss = self.start + s.sigma_threshold * self.noise
            candidate.has_diverged = candidate.mean_loss() > highest_loss
        scale = rung_scale(self.candidates, steps, self.loss_tolerance(steps))
        if scale is not None:
            self.scales[steps] = scale

    def loss_tolerance(self, steps: int) -> float:
        """Noise of a final loss after `steps` steps, at least `min_relative_change`."""
        noise = self.noise / math.sqrt(self.settings.seeds * _final_window(steps))
        return max(noise, self.settings.min_relative_change * abs(self.start))

    def finalists(self) -> list[LRCandidate]:
        """Candidates that held through the last rung, the best first."""
        survivors = [
            c for c in self.candidates if c.steps[-1] == self.longest_rung and not c.has_diverged
        ]
        return sorted(survivors, key=LRCandidate.mean_loss)

    def find_band(self) -> LRBand:
        """The band around the best of the finalists."""
        self.candidates.sort(key=attrgetter("lr"))
        self.band = band_around(self.finalists()[0], self.candidates, self.scales)
        return self.band

    def conclude(self) -> str:
        """Refines the band with what is left of the budget, or extends it once past an edge that it
        touches; the reason where it is inconclusive."""
        s, band = self.settings, self.find_band()
        threshold = s.sigma_threshold * self.loss_tolerance(self.longest_rung)
        if self.finalists()[0].mean_loss() > self.start - threshold:
            return (
                f"no candidate's loss fell by more than the noise in {self.longest_rung} steps;"
                " give it more steps"
            )
        if not band.edge_names:
            band = self.refine_band(band)
        if len(band.edge_names) == 1:
            band = self.extend_band(band)
        if len(band.edge_names) == 1:
            (edge,) = band.edge_names
            return (
                f"the best rates lie at the {edge} edge of the search, and extending it once did"
                " not help; centre it there with optim.lr, or give it more steps"
            )
        if band.edge_names or band.is_flat(s.max_band_decades):
            return (
                f"rates from {band.low:.2g} to {band.high:.2g} give the same loss within the noise;"
                " more steps or seeds may tell them apart"
            )
        best = best_lr_by_seed(self.finalists())
        if max(best) > 10.001 * min(best):
            rates = ", ".join(f"{lr:.2g}" for lr in best)
            return f"the seeds disagree by more than a decade: their best rates are {rates}"
        return ""

    def extend_band(self, band: LRBand) -> LRBand:
        """A decade or more of new candidates past the edge, at the length of the last rung."""
        (edge,) = band.edge_names
        ratio = max(10 ** (1 / 3), self.candidates[1].lr / self.candidates[0].lr)
        edge_lr = self.candidates[0 if edge == "lower" else -1].lr
        sign = -1 if edge == "lower" else 1
        self.log(f"the band touches the {edge} edge, {edge_lr:.2g}: extending the search once")
        return self.add_candidates([edge_lr * ratio ** (sign * i) for i in (1, 2, 3)])

    def refine_band(self, band: LRBand) -> LRBand:
        """Rates half-way to the neighbours of the best, if the budget still holds them: it does
        where candidates diverged early."""
        best = next(i for i, c in enumerate(self.candidates) if c is self.finalists()[0])
        neighbour_lrs = [c.lr for c in self.candidates[max(0, best - 1) : best + 2]]
        midpoint_lrs = [math.sqrt(a * b) for a, b in pairwise(neighbour_lrs)]
        cost = len(midpoint_lrs) * self.settings.seeds * self.longest_rung
        is_affordable = self.steps_used + cost <= self.settings.steps
        return self.add_candidates(midpoint_lrs) if is_affordable else band

    def add_candidates(self, rates: Sequence[float]) -> LRBand:
        candidates = [LRCandidate(lr) for lr in sorted(rates)]
        self.candidates += candidates
        self.run_rung(candidates, self.longest_rung)
        return self.find_band()

    def result(self, reason: str) -> LRSearchResult:
        """The search's result; a suggestion only without a reason against it."""
        rows = tuple(
            RateResult(c.lr, tuple(map(fmean, c.final_losses)), tuple(c.steps), c.has_diverged)
            for c in self.candidates
        )
        best = self.finalists()[0].lr if self.band else None
        band = (self.band.low, self.band.high) if self.band else None
        suggestion = None
        if best is not None and band is not None and not reason:
            suggestion = min(math.sqrt(band[0] * band[1]), best)
        return LRSearchResult(
            rows=rows, range_test=tuple(self.points), start=self.start, noise=self.noise,
            bounds=self.bounds, best=best, band=band, suggestion=suggestion,
            conclusive=not reason, reason=reason, steps_used=self.steps_used,
        )  # fmt: skip


def _final_window(steps: int) -> int:
    """Losses at a run's end over which its final loss is the mean."""
    return max(2, steps // 4)
