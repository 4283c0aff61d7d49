"""The search for a learning rate, on objectives whose answer is known.

Not here: the search on a real model (it needs torch). The objectives are slow, obvious descents in
plain Python, with the failure modes that shipped range tests have: a test that ends is called
diverged, a suggestion lies a decade too low, noise is taken for a slope.
"""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from cordee.cli.arguments import parser, read
from cordee.cli.lr import conclusion, peak, table, use, write
from cordee.config.presets import DEFAULT_LR
from cordee.errors import ConfigError
from cordee.optim.compare import Candidate, excess, first_where, roughness, scale_of, standard_error
from cordee.optim.search import Finding, SearchSettings, Sweep, find_lr, warmed

STEEPEST = 100.0
"""Largest curvature of the quadratic: rates above 2 / STEEPEST diverge."""


def quadratic(noise: float = 0.0, data_ends: int = 10**9) -> Sweep:
    """Gradient descent on 8 curvatures over 3 decades; the noise is on the loss that is seen."""
    curvatures = [STEEPEST * 10 ** (-3 * i / 7) for i in range(8)]

    def sweep(rates: Sequence[float], seed: int) -> list[float]:
        chance = random.Random(seed)
        at = [math.sqrt(2 / (8 * h)) for h in curvatures]
        losses = []
        for rate in rates[:data_ends]:
            true = sum(0.5 * h * x * x for h, x in zip(curvatures, at, strict=True))
            losses.append(true + chance.gauss(0, noise))
            if true > 1e6:
                return [*losses, math.inf]
            at = [x - rate * h * x for h, x in zip(curvatures, at, strict=True)]
        return losses

    return sweep


def best_of(sweep: Sweep, steps: int, low: float, high: float) -> float:
    """The best rate by trying a hundred of them: the slow, obvious search."""
    rates = [low * (high / low) ** (i / 99) for i in range(100)]

    def final(rate: float) -> float:
        losses = sweep(warmed(rate, steps, 0.2), 0)
        return fmean(losses[-steps // 4 :]) if len(losses) == steps else math.inf

    return float(min(rates, key=final))


def search(sweep: Sweep, **settings: float) -> tuple[Finding, list[str]]:
    said: list[str] = []
    given_settings = SearchSettings(**{"centre": 0.01, "steps": 640, **settings})  # type: ignore[arg-type]
    return find_lr(sweep, given_settings, said.append), said


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("centre", [0.0003, 0.01, 0.3])
def test_quadratic_is_found_wherever_the_search_is_centred(noise: float, centre: float) -> None:
    found, said = search(quadratic(noise), centre=centre)
    assert found.conclusive and found.reason == "", found.reason
    assert found.band and found.suggestion and found.best
    longest = max(row.steps[-1] for row in found.rows)
    truth = best_of(quadratic(), longest, 1e-4, 1e-1)
    assert truth / 3 < found.suggestion <= found.best < 2 / STEEPEST * 1.25
    assert found.band[0] <= found.suggestion <= found.band[1]
    assert found.noise == pytest.approx(noise, rel=0.5, abs=0.002)
    assert found.steps_used <= 640 and len(said) >= 4


def test_the_search_is_deterministic() -> None:
    assert search(quadratic(0.02))[0] == search(quadratic(0.02))[0]


@limits(max_examples=15, deadline=None)
@given(st.floats(min_value=-6, max_value=4))
def test_units_of_the_rate_do_not_matter(decades: float) -> None:
    factor = 10**decades
    sweep = quadratic(0.01)
    here = search(sweep)[0]
    there = search(lambda r, s: sweep([x / factor for x in r], s), centre=0.01 * factor)[0]
    assert there.suggestion == pytest.approx((here.suggestion or 0) * factor, rel=1e-6)


def test_flat_objective_is_refused() -> None:
    def flat(rates: Sequence[float], seed: int) -> list[float]:
        chance = random.Random(seed)
        return [1 + chance.gauss(0, 0.05) for _ in rates]

    found, _ = search(flat)
    assert not found.conclusive and found.suggestion is None
    assert "never fell" in found.reason


def test_always_diverging_is_refused() -> None:
    def explodes(rates: Sequence[float], seed: int) -> list[float]:
        return [1.0, math.inf] if any(rates) else [1.0 for _ in rates]

    found, _ = search(explodes)
    assert not found.conclusive and found.suggestion is None
    assert "diverged" in found.reason and "lower" in found.reason


def test_objective_that_only_rises_is_refused() -> None:
    def climbs(rates: Sequence[float], seed: int) -> list[float]:
        return [1 + sum(rates[:i]) for i in range(len(rates))]

    found, _ = search(climbs)
    assert not found.conclusive and "diverged" in found.reason


def test_broken_model_is_not_blamed_on_the_rate() -> None:
    found, _ = search(lambda rates, seed: [math.nan])
    assert not found.conclusive and "before any update" in found.reason


def test_optimum_past_the_edge_extends_once() -> None:
    found, said = search(quadratic(0.002), centre=1.2e-5)  # the range test ends at 3.8e-3
    assert any("extending" in line for line in said)
    assert found.conclusive and found.suggestion and 0.005 < found.suggestion < 0.025


def test_optimum_far_past_the_edge_is_refused() -> None:
    found, said = search(quadratic(0.0002), centre=1e-6)  # ends at 3.2e-4
    assert sum("extending" in line for line in said) == 1
    assert not found.conclusive and found.suggestion is None and "upper edge" in found.reason


def test_optimum_below_the_first_fall_extends_downwards() -> None:
    def slow_is_better(rates: Sequence[float], seed: int) -> list[float]:
        """A rising rate helps only from about 10 on; a held rate is best at 3."""
        if rates[-1] > rates[len(rates) // 2]:
            falls = sum(1 for r in rates if r > 0.1) / len(rates)
            return [1 - falls * (i / len(rates)) ** 8 for i in range(len(rates))]
        best = abs(math.log10(max(rates[-1], 1e-9) / 3))
        return [1 - i / len(rates) * math.exp(-best) for i in range(len(rates))]

    found, said = search(slow_is_better, centre=1.0)
    assert any("lower edge" in line for line in said)
    assert found.conclusive and found.suggestion and 1 < found.suggestion < 10


def test_runs_that_end_are_not_runs_that_diverged() -> None:
    """The range test's data ends while the loss still falls: no rise may be seen in that."""
    found, said = search(quadratic(0.002, data_ends=45), centre=0.002)
    assert len(found.range_test) == 45 and found.range_test[-1].lr < 0.02
    assert any("without a rise" in line for line in said)
    assert not any(row.diverged for row in found.rows if row.lr < 0.01)
    assert found.conclusive and found.suggestion and 0.005 < found.suggestion < 0.025


def test_run_shorter_than_its_rivals_diverged() -> None:
    def stops_without_a_word(rates: Sequence[float], seed: int) -> list[float]:
        losses = quadratic()(rates, seed)
        return [loss for loss in losses if loss < 1.05]

    found, _ = search(stops_without_a_word)
    assert any(row.diverged for row in found.rows if row.lr > 0.05)
    assert found.conclusive and found.suggestion and 0.005 < found.suggestion < 0.025


def test_seeds_whose_optima_lie_apart_are_refused() -> None:
    def by_seed(rates: Sequence[float], seed: int) -> list[float]:
        """Two optima more than two decades apart, one of each seed."""
        if rates[-1] > rates[len(rates) // 2]:
            return [1 - 0.8 * (i / len(rates)) for i in range(len(rates))]
        place = math.log10(max(rates[-1], 1e-9) / 0.01)
        good = 0.7 * math.exp(-((place - (1.2, -1.2)[seed % 2]) ** 2))
        return [1 - i / len(rates) * (0.2 + good) for i in range(len(rates))]

    found, _ = search(by_seed)
    assert not found.conclusive and found.suggestion is None
    assert "same loss" in found.reason


def test_seeds_that_disagree_by_more_than_a_decade_are_named() -> None:
    def by_seed(rates: Sequence[float], seed: int) -> list[float]:
        """One shared optimum at 0.01, and for every second seed a deeper pit far above it."""
        if rates[-1] > rates[len(rates) // 2]:
            return [1 - 0.8 * (i / len(rates)) for i in range(len(rates))]
        place = math.log10(max(rates[-1], 1e-9) / 0.01)
        good = 0.6 * math.exp(-4 * place**2) + (seed % 2) * 0.63 * (1.1 < place < 1.9)
        return [1 - i / len(rates) * (0.2 + good) for i in range(len(rates))]

    found, _ = search(by_seed)
    assert not found.conclusive and found.suggestion is None
    assert "disagree" in found.reason, found.reason


def test_wide_plateau_is_refused() -> None:
    def plateau(rates: Sequence[float], seed: int) -> list[float]:
        """Everything from 1e-4 to 1 learns alike: there is no best."""
        chance = random.Random(seed)
        learns = [1e-4 < rate < 1 for rate in rates]
        return [
            1 - 0.5 * sum(learns[:i]) / len(rates) + chance.gauss(0, 0.01)
            for i in range(len(rates))
        ]

    found, _ = search(plateau)
    assert not found.conclusive and found.suggestion is None


def test_logistic_regression_is_not_suggested_a_decade_too_low() -> None:
    """32 features, Adam: the task on which a shipped range test was off by three decades."""
    weights = [math.sin(1 + i) for i in range(32)]

    def adam(rates: Sequence[float], seed: int) -> list[float]:
        chance = random.Random(seed)
        at, first, second = [0.0] * 32, [0.0] * 32, [0.0] * 32
        losses = []
        for step, rate in enumerate(rates, 1):
            slope, loss = [0.0] * 32, 0.0
            for _ in range(16):
                x = [chance.gauss(0, 1) for _ in range(32)]
                label = sum(map(float.__mul__, x, weights)) > 0
                score = sum(map(float.__mul__, x, at)) * (1 if label else -1)
                loss += math.log1p(math.exp(-score)) if score > -30 else -score
                pull = (-1 if label else 1) / (1 + math.exp(min(50.0, score)))
                slope = [g + pull * xi / 16 for g, xi in zip(slope, x, strict=True)]
            losses.append(loss / 16)
            first = [0.9 * m + 0.1 * g for m, g in zip(first, slope, strict=True)]
            second = [0.99 * v + 0.01 * g * g for v, g in zip(second, slope, strict=True)]
            at = [
                a - rate * m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.99**step)) + 1e-8)
                for a, m, v in zip(at, first, second, strict=True)
            ]
        return losses

    found, _ = search(adam, centre=0.001)
    assert found.conclusive and found.suggestion, found.reason
    rates = [1e-5 * 10 ** (i / 2) for i in range(13)]
    final = {rate: fmean(adam(warmed(rate, 60, 0.1), 99)[-10:]) for rate in rates}
    best = min(final, key=final.__getitem__)
    assert best / 10 < found.suggestion < best * 10
    assert fmean(adam(warmed(found.suggestion, 60, 0.1), 99)[-10:]) < min(final.values()) + 0.1


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_budget_too_small_names_one_that_works(seeds: int) -> None:
    with pytest.raises(ConfigError) as caught:
        search(quadratic(), steps=60, seeds=seeds)
    assert caught.value.fix is not None
    enough = int(caught.value.fix.removeprefix("--steps "))
    found, _ = search(quadratic(), steps=enough, seeds=seeds)
    assert found.steps_used <= enough * 4 / 3


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"seeds": 1}, {"centre": 0.0}, {"centre": math.nan}, {"steps": -5}):
        with pytest.raises(ConfigError):
            search(quadratic(), **wrong)


def test_more_budget_runs_longer_rungs() -> None:
    found, _ = search(quadratic(0.01), steps=3000)
    lengths = sorted({steps for row in found.rows for steps in row.steps})
    assert len(lengths) == 3 and lengths[1:] == [2 * lengths[0], 4 * lengths[0]]
    assert found.steps_used <= 3000


def test_schedule_warms_up_from_zero_and_stays() -> None:
    assert warmed(1.0, 10, 0.2) == [0.5] + [1.0] * 9
    assert warmed(2.0, 1, 0.2) == [2.0]


def test_noise_is_seen_through_a_trend() -> None:
    chance = random.Random(1)
    curve = [5 - 0.1 * i + chance.gauss(0, 0.05) for i in range(400)]
    assert roughness([curve]) == pytest.approx(0.05, rel=0.15)
    assert roughness([[1.0, 2.0]]) == 0.0


def test_standard_error_takes_rate_and_seed_out() -> None:
    shifted = [[1.0, 2.0, 3.0], [1.5, 2.5, 3.5], [0.0, 1.0, 2.0]]
    assert standard_error(shifted) == pytest.approx(0, abs=1e-12)
    chance = random.Random(2)
    noisy = [[r + chance.gauss(0, 1) for _ in range(4)] for r in range(500)]
    assert standard_error(noisy) == pytest.approx(0.5, rel=0.1)


def test_excess_is_measured_within_a_rung() -> None:
    field = [
        Candidate(0.1, [[1.0, 1.2]], [10]),
        Candidate(0.2, [[0.9, 1.1], [0.5, 0.7]], [10, 20]),
        Candidate(0.4, [[math.inf, 1.0]], [10], diverged=True),
    ]
    scales = {steps: scale_of(field, steps, 0.05) for steps in (10, 20)}
    held = {steps: scale for steps, scale in scales.items() if scale}
    assert excess(field[0], held) == pytest.approx(2.0)
    assert excess(field[1], held) == 0.0 and excess(field[2], held) == math.inf


def test_a_fall_must_last() -> None:
    dip = [1.0, 0.5, 1.0, 0.4, 0.4, 0.4, 1.0, 0.1]
    assert first_where(dip, lambda x: x < 0.9) == 3
    assert first_where([1.0, 1.0, math.inf], lambda x: x > 2) == 2


def test_table_json_and_picture_say_the_same(tmp_path: Path) -> None:
    found, _ = search(quadratic(0.01))
    text = table(found, 4096)
    for row in found.rows:
        assert f"{row.lr:.3g}" in text
    write(found, tmp_path / "runs" / "a", 4096)
    saved = json.loads((tmp_path / "runs" / "a" / "lr.json").read_text())
    assert saved["suggestion"] == found.suggestion and saved["conclusive"] is True
    assert len(saved["rows"]) == len(found.rows)
    data = (tmp_path / "runs" / "a" / "lr.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    at = data.index(b"IDAT")
    (size,) = struct.unpack(">I", data[at - 4 : at])
    rows = zlib.decompress(data[at + 4 : at + 4 + size])
    assert len(rows) == height * (1 + 3 * width)
    assert len(set(rows)) > 20, "the picture is not blank"


def test_command_that_uses_it_keeps_the_users_words() -> None:
    found, _ = search(quadratic(0.01))
    rate = f"{found.suggestion:.3g}"
    words = read(parser("lr", "", ""), ["model.preset=small", "optim.name=adamw", "optim.lr=0.01"])
    command = use(found, words.load().run, words)
    assert command == f"cordee train model.preset=small optim.name=adamw optim.lr={rate}"
    assert command in conclusion(found, command)
    words = read(parser("lr", "", ""), [])
    assert peak(words.load().run) == DEFAULT_LR["muon"]
    other = f"{0.02 * found.suggestion / DEFAULT_LR['muon']:.3g}"
    command = use(found, words.load().run, words)
    assert command == f"cordee train optim.lr={rate} optim.adam_lr={other}"
    refused, _ = search(lambda rates, seed: [math.nan])
    assert use(refused, words.load().run, words) is None
    assert "inconclusive: the loss is not finite" in conclusion(refused, None)


def test_refusal_is_written_too(tmp_path: Path) -> None:
    found, _ = search(lambda rates, seed: [math.nan])
    write(found, tmp_path, 4096)
    saved = json.loads((tmp_path / "lr.json").read_text())
    assert saved["conclusive"] is False and saved["reason"] and saved["suggestion"] is None
    assert (tmp_path / "lr.png").stat().st_size > 500
