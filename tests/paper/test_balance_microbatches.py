"""Shares of unequal islands: the optimum against brute force, and a balance that neither sleeps nor
flaps, on simulated speeds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cordee.errors import LayoutError
from cordee.layout.load_balance import (
    CHANGE_INTERVAL_STEPS,
    MIN_GAIN,
    RETRY_STEPS,
    WINDOW,
    LoadBalancer,
    balance_microbatches,
    describe_balance,
    microbatch_ranges,
    slowest_island_s,
)

SPEEDS = st.lists(st.floats(0.001, 100.0), min_size=1, max_size=4)


def brute_force_s(
    seconds: Sequence[float], total: int, unit: int, min_share: int, max_shares: Sequence[int]
) -> float:
    """The least time of all legal shares, by trying every one."""
    choices = [[n for n in range(0, m + 1, unit) if n >= min_share] for m in max_shares]
    legal_counts = [counts for counts in itertools.product(*choices) if sum(counts) == total]
    return min((slowest_island_s(counts, seconds) for counts in legal_counts), default=float("inf"))


@given(SPEEDS, st.integers(1, 10), st.integers(1, 3), st.integers(0, 2), st.data())
def test_no_other_shares_are_faster(
    seconds: list[float], units: int, unit: int, min_share: int, data: st.DataObject
) -> None:
    total = units * unit
    max_shares = [data.draw(st.integers(0, total + 2)) for _ in seconds]
    best_s = brute_force_s(seconds, total, unit, min_share, max_shares)
    if best_s == float("inf"):
        with pytest.raises(LayoutError):
            balance_microbatches(seconds, total, unit, min_share, max_shares)
        return
    counts = balance_microbatches(seconds, total, unit, min_share, max_shares)
    assert sum(counts) == total and all(n % unit == 0 and n >= min_share for n in counts)
    assert all(n <= m for n, m in zip(counts, max_shares, strict=True))
    assert slowest_island_s(counts, seconds) <= best_s * (1 + 1e-6)


@given(SPEEDS, st.integers(1, 400))
def test_large_steps_start_where_small_ones_would_come(seconds: list[float], total: int) -> None:
    counts = [0] * len(seconds)
    for _ in range(total):  # one by one, to whoever would be done with it first
        counts[min(range(len(counts)), key=lambda i: ((counts[i] + 1) * seconds[i], i))] += 1
    assert slowest_island_s(balance_microbatches(seconds, total), seconds) <= slowest_island_s(
        counts, seconds
    ) * (1 + 1e-6)


def test_known_shares() -> None:
    assert balance_microbatches([1, 3], 12) == [9, 3]
    assert balance_microbatches([1, 1, 1], 4) == [2, 1, 1]  # the lower number of two
    assert balance_microbatches([1, 30], 4) == [4, 0]
    assert balance_microbatches([1, 30], 4, min_share=1) == [3, 1]
    assert balance_microbatches([1, 1], 12, max_shares=[4, 12]) == [4, 8]
    assert balance_microbatches([1, 3], 16, unit=4) == [12, 4]
    assert len(balance_microbatches([1.0] * 10_000, 100_000)) == 10_000


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 4))
def test_microbatch_ranges_are_contiguous(counts: list[int], workers: int) -> None:
    counts = [count * workers for count in counts]
    ranges = microbatch_ranges(counts, workers)
    assert [i for start, stop in ranges for i in range(start, stop)] == [*range(sum(counts))]
    assert [b - a for a, b in ranges] == [n // workers for n in counts for _ in range(workers)]


def test_the_balance_is_described() -> None:
    sentence = "island 1 takes 3.0 times as long for a microbatch; 9 + 3 of 12 microbatches"
    assert describe_balance([9, 3], [0.1, 0.3]) == sentence
    assert "2 there, 2 to 6 elsewhere, of 50" in describe_balance([2] + [6] * 8, [0.3] + [0.1] * 8)


Speeds = Callable[[int], Sequence[float]]
"""Seconds for a microbatch of each island in a step (from 0)."""


def share_changes(
    balancer: LoadBalancer, steps: int, speeds: Speeds, noise: float = 0.0, seed: int = 0
) -> list[tuple[int, list[int]]]:
    """(steps that were made, new shares) of every change."""
    rng, changes = random.Random(seed), []
    for step in range(steps):
        noisy_seconds = [s * max(0.2, rng.gauss(1.0, noise)) for s in speeds(step)]
        balancer.add_step([n * s for n, s in zip(balancer.counts, noisy_seconds, strict=True)])
        new_counts = balancer.next_counts()
        if new_counts is not None:
            assert new_counts == balancer.counts
            changes.append((step + 1, new_counts))
    return changes


@given(
    st.integers(2, 6), st.integers(1, 16), st.integers(0, 1000), st.sampled_from([0.0, 0.05, 0.1])
)
def test_settles_within_ten_steps_of_a_slowdown(
    islands: int, share: int, seed: int, noise: float
) -> None:
    assume(share > 1)
    slow_seconds = [1.0] * (islands - 1) + [3.0]
    balancer = LoadBalancer([share] * islands)
    warmup_steps = 20
    share_changes(balancer, warmup_steps, lambda _: [1.0] * islands, noise, seed)
    share_changes(balancer, 10, lambda _: slow_seconds, noise, seed + 1)
    best_s = slowest_island_s(balance_microbatches(slow_seconds, share * islands), slow_seconds)
    # One microbatch more than the best, or as near as noise lets anybody know.
    assert slowest_island_s(balancer.counts, slow_seconds) <= max(
        best_s + 3.0, best_s * (1 + MIN_GAIN + 3 * noise)
    )


def test_settles_at_once_at_the_start_and_back_again() -> None:
    changes = share_changes(LoadBalancer([6, 6]), 60, lambda step: [1, 3] if step < 30 else [1, 1])
    assert changes == [(CHANGE_INTERVAL_STEPS, [9, 3]), (30 + WINDOW, [6, 6])]


@pytest.mark.parametrize("islands,total", [(2, 12), (2, 256), (4, 16), (8, 64), (32, 256)])
def test_noise_moves_little(islands: int, total: int) -> None:
    """10 % of Gaussian noise, 300 steps each: next to nothing changes, and never back and forth."""
    change_counts = []
    for seed in range(10):
        balancer = LoadBalancer([total // islands] * islands)
        change_counts.append(
            len(share_changes(balancer, 300, lambda _: [1.0] * islands, 0.1, seed))
        )
    assert sum(change_counts) <= 10 and max(change_counts) <= 3, change_counts


@given(st.integers(0, 1000), st.integers(0, 1), st.floats(1.5, 100.0), st.integers(5, 9))
def test_single_steps_move_nothing(
    seed: int, slow_island: int, slowdown: float, period: int
) -> None:
    """A save, an evaluation, a compilation: once in a while a step takes many times as long."""

    def speeds(step: int) -> list[float]:
        return [slowdown if i == slow_island and step % period == 0 else 1.0 for i in range(2)]

    assert not share_changes(LoadBalancer([32, 32]), 100, speeds, 0.02, seed)


def test_small_differences_are_left_alone() -> None:
    assert not share_changes(LoadBalancer([32, 32]), 100, lambda _: [1.0, 1.06])
    assert not share_changes(LoadBalancer([2, 2]), 100, lambda _: [1.0, 1.5])  # 3 + 1 is no faster


def test_changes_are_some_steps_apart() -> None:
    rng = random.Random(5)
    island_seconds = [[rng.uniform(0.5, 5), rng.uniform(0.5, 5)] for _ in range(60)]
    changes = share_changes(LoadBalancer([32, 32]), 600, lambda step: island_seconds[step // 10])
    steps = [0, *(step for step, _ in changes)]
    assert len(changes) > 10
    assert all(
        step_b - step_a >= CHANGE_INTERVAL_STEPS for step_a, step_b in itertools.pairwise(steps)
    )


def test_an_idle_island_is_tried_again() -> None:
    balancer = LoadBalancer([2, 2])
    changes = share_changes(balancer, 400, lambda step: [1.0, 20.0 if step < 100 else 1.0])
    first_change, trial_change, revert_change, second_trial, last_change = changes
    assert first_change == (CHANGE_INTERVAL_STEPS, [4, 0])
    assert trial_change == (CHANGE_INTERVAL_STEPS + RETRY_STEPS, [3, 1])
    assert revert_change == (trial_change[0] + CHANGE_INTERVAL_STEPS, [4, 0])
    assert second_trial == (revert_change[0] + 2 * RETRY_STEPS, [3, 1])
    assert last_change == (second_trial[0] + CHANGE_INTERVAL_STEPS, [2, 2])


def test_an_island_that_must_work_keeps_a_unit() -> None:
    balancer = LoadBalancer([8, 8], unit=4, min_share=4)
    assert share_changes(balancer, 200, lambda _: [1.0, 50.0]) == [(CHANGE_INTERVAL_STEPS, [12, 4])]
