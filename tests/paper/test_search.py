"""The search for a learning rate, on objectives whose answer is known.

Not here: the search on a real model (it needs torch). The objectives are slow, obvious descents in
plain Python, with the failure modes that shipped range tests have: a test that ends is called
diverged, a suggestion lies a decade too low, noise is taken for a slope.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from cordee.cli.arguments import make_parser, parse_arguments
from cordee.cli.lr import conclusion, result_table, run, train_command, write_result
from cordee.config.update_rules import UPDATE_RULES
from cordee.errors import ConfigError
from cordee.optim.lr_search import (
    LRSearchResult,
    LRSearchSettings,
    TrainFn,
    find_lr,
    warmup_schedule,
)
from cordee.optim.lr_statistics import (
    LRCandidate,
    curve_noise,
    excess,
    first_lasting_index,
    rung_scale,
    standard_error,
)

MAX_CURVATURE = 100.0
"""Largest curvature of the quadratic: rates above 2 / STEEPEST diverge."""


def make_quadratic(noise: float = 0.0, data_steps: int = 10**9) -> TrainFn:
    """Gradient descent on 8 curvatures over 3 decades; the noise is on the loss that is seen."""
    curvatures = [MAX_CURVATURE * 10 ** (-3 * i / 7) for i in range(8)]

    def train(rates: Sequence[float], seed: int) -> list[float]:
        rng = random.Random(seed)
        point = [math.sqrt(2 / (8 * h)) for h in curvatures]
        losses = []
        for rate in rates[:data_steps]:
            true_loss = sum(0.5 * h * x * x for h, x in zip(curvatures, point, strict=True))
            losses.append(true_loss + rng.gauss(0, noise))
            if true_loss > 1e6:
                return [*losses, math.inf]
            point = [x - rate * h * x for h, x in zip(curvatures, point, strict=True)]
        return losses

    return train


def exhaustive_best_lr(train_fn: TrainFn, steps: int, low_rate: float, high_rate: float) -> float:
    """The best rate by trying a hundred of them: the slow, obvious search."""
    rates = [low_rate * (high_rate / low_rate) ** (i / 99) for i in range(100)]

    def final_loss(rate: float) -> float:
        losses = train_fn(warmup_schedule(rate, steps, 0.2), 0)
        return fmean(losses[-steps // 4 :]) if len(losses) == steps else math.inf

    return float(min(rates, key=final_loss))


def run_search(train_fn: TrainFn, **overrides: float) -> tuple[LRSearchResult, list[str]]:
    log_lines: list[str] = []
    search_settings = LRSearchSettings(**{"centre": 0.01, "steps": 640, **overrides})  # type: ignore[arg-type]
    return find_lr(train_fn, search_settings, log_lines.append), log_lines


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("centre", [0.0003, 0.01, 0.3])
def test_quadratic_is_found_wherever_the_search_is_centred(noise: float, centre: float) -> None:
    result, log_lines = run_search(make_quadratic(noise), centre=centre)
    assert result.conclusive and result.reason == "", result.reason
    assert result.band and result.suggestion and result.best
    max_steps = max(row.steps[-1] for row in result.rows)
    best_lr = exhaustive_best_lr(make_quadratic(), max_steps, 1e-4, 1e-1)
    assert best_lr / 3 < result.suggestion <= result.best < 2 / MAX_CURVATURE * 1.25
    assert result.band[0] <= result.suggestion <= result.band[1]
    assert result.noise == pytest.approx(noise, rel=0.5, abs=0.002)
    assert result.steps_used <= 640 and len(log_lines) >= 4


def test_the_search_is_deterministic() -> None:
    assert run_search(make_quadratic(0.02))[0] == run_search(make_quadratic(0.02))[0]


@limits(max_examples=15, deadline=None)
@given(st.floats(min_value=-6, max_value=4))
def test_units_of_the_rate_do_not_matter(decades: float) -> None:
    factor = 10**decades
    train_fn = make_quadratic(0.01)
    base_result = run_search(train_fn)[0]
    scaled_result = run_search(
        lambda rates, seed: train_fn([x / factor for x in rates], seed), centre=0.01 * factor
    )[0]
    assert scaled_result.suggestion == pytest.approx(
        (base_result.suggestion or 0) * factor, rel=1e-6
    )


def test_flat_objective_is_refused() -> None:
    def flat_losses(rates: Sequence[float], seed: int) -> list[float]:
        rng = random.Random(seed)
        return [1 + rng.gauss(0, 0.05) for _ in rates]

    result, _ = run_search(flat_losses)
    assert not result.conclusive and result.suggestion is None
    assert "never fell" in result.reason


def test_always_diverging_is_refused() -> None:
    def diverging_losses(rates: Sequence[float], seed: int) -> list[float]:
        return [1.0, math.inf] if any(rates) else [1.0 for _ in rates]

    result, _ = run_search(diverging_losses)
    assert not result.conclusive and result.suggestion is None
    assert "diverged" in result.reason and "lower" in result.reason


def test_objective_that_only_rises_is_refused() -> None:
    def rising_losses(rates: Sequence[float], seed: int) -> list[float]:
        return [1 + sum(rates[:i]) for i in range(len(rates))]

    result, _ = run_search(rising_losses)
    assert not result.conclusive and "diverged" in result.reason


def test_broken_model_is_not_blamed_on_the_rate() -> None:
    result, _ = run_search(lambda rates, seed: [math.nan])
    assert not result.conclusive and "before any update" in result.reason


def test_optimum_past_the_edge_extends_once() -> None:
    result, log_lines = run_search(
        make_quadratic(0.002), centre=1.2e-5
    )  # the range test ends at 3.8e-3
    assert any("extending" in line for line in log_lines)
    assert result.conclusive and result.suggestion and 0.005 < result.suggestion < 0.025


def test_optimum_far_past_the_edge_is_refused() -> None:
    result, log_lines = run_search(make_quadratic(0.0002), centre=1e-6)  # ends at 3.2e-4
    assert sum("extending" in line for line in log_lines) == 1
    assert not result.conclusive and result.suggestion is None and "upper edge" in result.reason


def test_optimum_below_the_first_fall_extends_downwards() -> None:
    def low_rate_losses(rates: Sequence[float], seed: int) -> list[float]:
        """A rising rate helps only from about 10 on; a held rate is best at 3."""
        if rates[-1] > rates[len(rates) // 2]:
            fall = sum(1 for r in rates if r > 0.1) / len(rates)
            return [1 - fall * (i / len(rates)) ** 8 for i in range(len(rates))]
        distance = abs(math.log10(max(rates[-1], 1e-9) / 3))
        return [1 - i / len(rates) * math.exp(-distance) for i in range(len(rates))]

    result, log_lines = run_search(low_rate_losses, centre=1.0)
    assert any("lower edge" in line for line in log_lines)
    assert result.conclusive and result.suggestion and 1 < result.suggestion < 10


def test_runs_that_end_are_not_runs_that_diverged() -> None:
    """The range test's data ends while the loss still falls: no rise may be seen in that."""
    result, log_lines = run_search(make_quadratic(0.002, data_steps=45), centre=0.002)
    assert len(result.range_test) == 45 and result.range_test[-1].lr < 0.02
    assert any("without a rise" in line for line in log_lines)
    assert not any(row.diverged for row in result.rows if row.lr < 0.01)
    assert result.conclusive and result.suggestion and 0.005 < result.suggestion < 0.025


def test_run_shorter_than_its_rivals_diverged() -> None:
    def truncated_losses(rates: Sequence[float], seed: int) -> list[float]:
        losses = make_quadratic()(rates, seed)
        return [loss for loss in losses if loss < 1.05]

    result, _ = run_search(truncated_losses)
    assert any(row.diverged for row in result.rows if row.lr > 0.05)
    assert result.conclusive and result.suggestion and 0.005 < result.suggestion < 0.025


def test_seeds_whose_optima_lie_apart_are_refused() -> None:
    def seed_losses(rates: Sequence[float], seed: int) -> list[float]:
        """Two optima more than two decades apart, one of each seed."""
        if rates[-1] > rates[len(rates) // 2]:
            return [1 - 0.8 * (i / len(rates)) for i in range(len(rates))]
        decade = math.log10(max(rates[-1], 1e-9) / 0.01)
        gain = 0.7 * math.exp(-((decade - (1.2, -1.2)[seed % 2]) ** 2))
        return [1 - i / len(rates) * (0.2 + gain) for i in range(len(rates))]

    result, _ = run_search(seed_losses)
    assert not result.conclusive and result.suggestion is None
    assert "same loss" in result.reason


def test_seeds_that_disagree_by_more_than_a_decade_are_named() -> None:
    def seed_losses(rates: Sequence[float], seed: int) -> list[float]:
        """One shared optimum at 0.01, and for every second seed a deeper pit far above it."""
        if rates[-1] > rates[len(rates) // 2]:
            return [1 - 0.8 * (i / len(rates)) for i in range(len(rates))]
        decade = math.log10(max(rates[-1], 1e-9) / 0.01)
        gain = 0.6 * math.exp(-4 * decade**2) + (seed % 2) * 0.63 * (1.1 < decade < 1.9)
        return [1 - i / len(rates) * (0.2 + gain) for i in range(len(rates))]

    result, _ = run_search(seed_losses)
    assert not result.conclusive and result.suggestion is None
    assert "disagree" in result.reason, result.reason


def test_wide_plateau_is_refused() -> None:
    def plateau_losses(rates: Sequence[float], seed: int) -> list[float]:
        """Everything from 1e-4 to 1 learns alike: there is no best."""
        rng = random.Random(seed)
        improvements = [1e-4 < rate < 1 for rate in rates]
        return [
            1 - 0.5 * sum(improvements[:i]) / len(rates) + rng.gauss(0, 0.01)
            for i in range(len(rates))
        ]

    result, _ = run_search(plateau_losses)
    assert not result.conclusive and result.suggestion is None


def test_logistic_regression_is_not_suggested_a_decade_too_low() -> None:
    """32 features, Adam: the task on which a shipped range test was off by three decades."""
    true_weights = [math.sin(1 + i) for i in range(32)]

    def adam_losses(rates: Sequence[float], seed: int) -> list[float]:
        rng = random.Random(seed)
        point, moment_1, moment_2 = [0.0] * 32, [0.0] * 32, [0.0] * 32
        losses = []
        for step, rate in enumerate(rates, 1):
            gradient, loss = [0.0] * 32, 0.0
            for _ in range(16):
                x = [rng.gauss(0, 1) for _ in range(32)]
                label = sum(map(float.__mul__, x, true_weights)) > 0
                score = sum(map(float.__mul__, x, point)) * (1 if label else -1)
                loss += math.log1p(math.exp(-score)) if score > -30 else -score
                loss_slope = (-1 if label else 1) / (1 + math.exp(min(50.0, score)))
                gradient = [g + loss_slope * xi / 16 for g, xi in zip(gradient, x, strict=True)]
            losses.append(loss / 16)
            moment_1 = [0.9 * m + 0.1 * g for m, g in zip(moment_1, gradient, strict=True)]
            moment_2 = [0.99 * v + 0.01 * g * g for v, g in zip(moment_2, gradient, strict=True)]
            point = [
                a - rate * m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.99**step)) + 1e-8)
                for a, m, v in zip(point, moment_1, moment_2, strict=True)
            ]
        return losses

    result, _ = run_search(adam_losses, centre=0.001)
    assert result.conclusive and result.suggestion, result.reason
    rates = [1e-5 * 10 ** (i / 2) for i in range(13)]
    final_losses = {
        rate: fmean(adam_losses(warmup_schedule(rate, 60, 0.1), 99)[-10:]) for rate in rates
    }
    best_lr = min(final_losses, key=final_losses.__getitem__)
    assert best_lr / 10 < result.suggestion < best_lr * 10
    assert (
        fmean(adam_losses(warmup_schedule(result.suggestion, 60, 0.1), 99)[-10:])
        < min(final_losses.values()) + 0.1
    )


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_budget_too_small_names_one_that_works(seeds: int) -> None:
    with pytest.raises(ConfigError) as exc_info:
        run_search(make_quadratic(), steps=60, seeds=seeds)
    assert exc_info.value.fix is not None
    min_steps = int(exc_info.value.fix.removeprefix("--steps "))
    result, _ = run_search(make_quadratic(), steps=min_steps, seeds=seeds)
    assert result.steps_used <= min_steps * 4 / 3


def test_wrong_settings_are_refused() -> None:
    for bad_settings in ({"seeds": 1}, {"centre": 0.0}, {"centre": math.nan}, {"steps": -5}):
        with pytest.raises(ConfigError):
            run_search(make_quadratic(), **bad_settings)


def test_more_budget_runs_longer_rungs() -> None:
    result, _ = run_search(make_quadratic(0.01), steps=3000)
    lengths = sorted({steps for row in result.rows for steps in row.steps})
    assert len(lengths) == 3 and lengths[1:] == [2 * lengths[0], 4 * lengths[0]]
    assert result.steps_used <= 3000


def test_schedule_warms_up_from_zero_and_stays() -> None:
    assert warmup_schedule(1.0, 10, 0.2) == [0.5] + [1.0] * 9
    assert warmup_schedule(2.0, 1, 0.2) == [2.0]


def test_noise_is_seen_through_a_trend() -> None:
    rng = random.Random(1)
    curve = [5 - 0.1 * i + rng.gauss(0, 0.05) for i in range(400)]
    assert curve_noise([curve]) == pytest.approx(0.05, rel=0.15)
    assert curve_noise([[1.0, 2.0]]) == 0.0


def test_standard_error_takes_rate_and_seed_out() -> None:
    shifted_losses = [[1.0, 2.0, 3.0], [1.5, 2.5, 3.5], [0.0, 1.0, 2.0]]
    assert standard_error(shifted_losses) == pytest.approx(0, abs=1e-12)
    rng = random.Random(2)
    noisy_losses = [[r + rng.gauss(0, 1) for _ in range(4)] for r in range(500)]
    assert standard_error(noisy_losses) == pytest.approx(0.5, rel=0.1)


def test_excess_is_measured_within_a_rung() -> None:
    candidates = [
        LRCandidate(0.1, [[1.0, 1.2]], [10]),
        LRCandidate(0.2, [[0.9, 1.1], [0.5, 0.7]], [10, 20]),
        LRCandidate(0.4, [[math.inf, 1.0]], [10], has_diverged=True),
    ]
    scales = {steps: rung_scale(candidates, steps, 0.05) for steps in (10, 20)}
    known_scales = {steps: scale for steps, scale in scales.items() if scale}
    assert excess(candidates[0], known_scales) == pytest.approx(2.0)
    assert (
        excess(candidates[1], known_scales) == 0.0
        and excess(candidates[2], known_scales) == math.inf
    )


def test_a_fall_must_last() -> None:
    losses = [1.0, 0.5, 1.0, 0.4, 0.4, 0.4, 1.0, 0.1]
    assert first_lasting_index(losses, lambda x: x < 0.9) == 3
    assert first_lasting_index([1.0, 1.0, math.inf], lambda x: x > 2) == 2


def test_table_json_and_picture_say_the_same(tmp_path: Path) -> None:
    result, _ = run_search(make_quadratic(0.01))
    text = result_table(result, 4096)
    for row in result.rows:
        assert f"{row.lr:.3g}" in text
    write_result(result, tmp_path / "runs" / "a", 4096)
    fields = json.loads((tmp_path / "runs" / "a" / "lr.json").read_text())
    assert fields["suggestion"] == result.suggestion and fields["conclusive"] is True
    assert len(fields["rows"]) == len(result.rows)
    picture = ElementTree.parse(tmp_path / "runs" / "a" / "lr.svg").getroot()
    texts = [node.text for node in picture.findall(".//{*}text")]
    assert texts[0] == f"cordee lr: {result.suggestion:.3g}" and "candidates" in texts
    places = [
        tuple(map(float, place.split(",")))
        for line in picture.findall(".//{*}polyline")
        for place in line.attrib["points"].split()
    ]
    places += [
        (float(c.attrib["cx"]), float(c.attrib["cy"])) for c in picture.findall(".//{*}circle")
    ]
    assert len(places) > len(result.range_test) + len(result.rows)
    assert all(0 < x < 900 and 0 < y < 510 for x, y in places), "nothing leaves the picture"


@pytest.mark.parametrize(
    ("output", "fix"), [("rates.png", "rates.svg"), ("rates", "rates.svg"), ("no/a.svg", "a.svg")]
)
def test_picture_is_an_svg_in_a_folder(output: str, fix: str) -> None:
    with pytest.raises(ConfigError) as exc_info:
        run(["--output", output])
    assert exc_info.value.exit_code == 2 and f"--output {fix}" in str(exc_info.value.fix)


def test_command_that_uses_it_keeps_the_users_words() -> None:
    result, _ = run_search(make_quadratic(0.01))
    rate_text = f"{result.suggestion:.3g}"
    arguments = parse_arguments(
        make_parser("lr", "", ""), ["model.preset=small", "optim.name=adamw", "optim.lr=0.01"]
    )
    command = train_command(result, arguments.load().run, arguments)
    assert command == f"cordee train model.preset=small optim.name=adamw optim.lr={rate_text}"
    assert command in conclusion(result, command)
    arguments = parse_arguments(make_parser("lr", "", ""), [])
    muon_lr = UPDATE_RULES["muon"].default_lr
    assert arguments.load().run.optim.peak_lr == muon_lr
    adam_rate_text = f"{0.02 * result.suggestion / muon_lr:.3g}"
    command = train_command(result, arguments.load().run, arguments)
    assert command == f"cordee train optim.lr={rate_text} optim.adam_lr={adam_rate_text}"
    failed_result, _ = run_search(lambda rates, seed: [math.nan])
    assert train_command(failed_result, arguments.load().run, arguments) is None
    assert "inconclusive: the loss is not finite" in conclusion(failed_result, None)


def test_refusal_is_written_too(tmp_path: Path) -> None:
    result, _ = run_search(lambda rates, seed: [math.nan])
    write_result(result, tmp_path, 4096)
    fields = json.loads((tmp_path / "lr.json").read_text())
    assert fields["conclusive"] is False and fields["reason"] and fields["suggestion"] is None
    assert "nothing was measured" in (tmp_path / "lr.svg").read_text()
