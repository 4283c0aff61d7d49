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
from cordee.layout.shares import (
    GAIN,
    HOLD,
    PATIENCE,
    WINDOW,
    Balance,
    deal,
    explain,
    shares,
    slowest,
)

SPEEDS = st.lists(st.floats(0.001, 100.0), min_size=1, max_size=4)


def by_hand(
    seconds: Sequence[float], total: int, unit: int, least: int, most: Sequence[int]
) -> float:
    """The least time of all legal shares, by trying every one."""
    choices = [[n for n in range(0, m + 1, unit) if n >= least] for m in most]
    legal = [given for given in itertools.product(*choices) if sum(given) == total]
    return min((slowest(given, seconds) for given in legal), default=float("inf"))


@given(SPEEDS, st.integers(1, 10), st.integers(1, 3), st.integers(0, 2), st.data())
def test_no_other_shares_are_faster(
    seconds: list[float], units: int, unit: int, least: int, data: st.DataObject
) -> None:
    total = units * unit
    most = [data.draw(st.integers(0, total + 2)) for _ in seconds]
    best = by_hand(seconds, total, unit, least, most)
    if best == float("inf"):
        with pytest.raises(LayoutError):
            shares(seconds, total, unit, least, most)
        return
    found = shares(seconds, total, unit, least, most)
    assert sum(found) == total and all(n % unit == 0 and n >= least for n in found)
    assert all(n <= m for n, m in zip(found, most, strict=True))
    assert slowest(found, seconds) <= best * (1 + 1e-6)


@given(SPEEDS, st.integers(1, 400))
def test_large_steps_start_where_small_ones_would_come(seconds: list[float], total: int) -> None:
    slow = [0] * len(seconds)
    for _ in range(total):  # one by one, to whoever would be done with it first
        slow[min(range(len(slow)), key=lambda i: ((slow[i] + 1) * seconds[i], i))] += 1
    assert slowest(shares(seconds, total), seconds) <= slowest(slow, seconds) * (1 + 1e-6)


def test_known_shares() -> None:
    assert shares([1, 3], 12) == [9, 3]
    assert shares([1, 1, 1], 4) == [2, 1, 1]  # the lower number of two
    assert shares([1, 30], 4) == [4, 0]
    assert shares([1, 30], 4, least=1) == [3, 1]
    assert shares([1, 1], 12, most=[4, 12]) == [4, 8]
    assert shares([1, 3], 16, unit=4) == [12, 4]
    assert len(shares([1.0] * 10_000, 100_000)) == 10_000


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 4))
def test_dealt_ranges_follow_each_other(counts: list[int], workers: int) -> None:
    counts = [count * workers for count in counts]
    dealt = deal(counts, workers)
    assert [i for start, stop in dealt for i in range(start, stop)] == [*range(sum(counts))]
    assert [b - a for a, b in dealt] == [n // workers for n in counts for _ in range(workers)]


def test_the_sentence() -> None:
    told = "island 1 takes 3.0 times as long for a microbatch; 9 + 3 of 12 microbatches"
    assert explain([9, 3], [0.1, 0.3]) == told
    assert "2 there, 2 to 6 elsewhere, of 50" in explain([2] + [6] * 8, [0.3] + [0.1] * 8)


Speeds = Callable[[int], Sequence[float]]
"""Seconds for a microbatch of each island in a step (from 0)."""


def changes(
    balance: Balance, steps: int, speeds: Speeds, noise: float = 0.0, seed: int = 0
) -> list[tuple[int, list[int]]]:
    """(steps that were made, new shares) of every change."""
    chance, found = random.Random(seed), []
    for step in range(steps):
        loud = [s * max(0.2, chance.gauss(1.0, noise)) for s in speeds(step)]
        balance.feed([n * s for n, s in zip(balance.counts, loud, strict=True)])
        after = balance.decide()
        if after is not None:
            assert after == balance.counts
            found.append((step + 1, after))
    return found


@given(
    st.integers(2, 6), st.integers(1, 16), st.integers(0, 1000), st.sampled_from([0.0, 0.05, 0.1])
)
def test_settles_within_ten_steps_of_a_slowdown(
    islands: int, each: int, seed: int, noise: float
) -> None:
    assume(each > 1)
    now = [1.0] * (islands - 1) + [3.0]
    balance = Balance([each] * islands)
    begun = 20
    changes(balance, begun, lambda _: [1.0] * islands, noise, seed)
    changes(balance, 10, lambda _: now, noise, seed + 1)
    best = slowest(shares(now, each * islands), now)
    # One microbatch more than the best, or as near as noise lets anybody know.
    assert slowest(balance.counts, now) <= max(best + 3.0, best * (1 + GAIN + 3 * noise))


def test_settles_at_once_at_the_start_and_back_again() -> None:
    found = changes(Balance([6, 6]), 60, lambda step: [1, 3] if step < 30 else [1, 1])
    assert found == [(HOLD, [9, 3]), (30 + WINDOW, [6, 6])]


@pytest.mark.parametrize("islands,total", [(2, 12), (2, 256), (4, 16), (8, 64), (32, 256)])
def test_noise_moves_little(islands: int, total: int) -> None:
    """10 % of Gaussian noise, 300 steps each: next to nothing changes, and never back and forth."""
    counts = []
    for seed in range(10):
        balance = Balance([total // islands] * islands)
        counts.append(len(changes(balance, 300, lambda _: [1.0] * islands, 0.1, seed)))
    assert sum(counts) <= 10 and max(counts) <= 3, counts


@given(st.integers(0, 1000), st.integers(0, 1), st.floats(1.5, 100.0), st.integers(5, 9))
def test_single_steps_move_nothing(seed: int, who: int, times: float, apart: int) -> None:
    """A save, an evaluation, a compilation: once in a while a step takes many times as long."""

    def speeds(step: int) -> list[float]:
        return [times if i == who and step % apart == 0 else 1.0 for i in range(2)]

    assert not changes(Balance([32, 32]), 100, speeds, 0.02, seed)


def test_small_differences_are_left_alone() -> None:
    assert not changes(Balance([32, 32]), 100, lambda _: [1.0, 1.06])
    assert not changes(Balance([2, 2]), 100, lambda _: [1.0, 1.5])  # 3 + 1 is no faster


def test_changes_are_some_steps_apart() -> None:
    chance = random.Random(5)
    wild = [[chance.uniform(0.5, 5), chance.uniform(0.5, 5)] for _ in range(60)]
    found = changes(Balance([32, 32]), 600, lambda step: wild[step // 10])
    steps = [0, *(step for step, _ in found)]
    assert len(found) > 10
    assert all(after - before >= HOLD for before, after in itertools.pairwise(steps))


def test_an_idle_island_is_tried_again() -> None:
    balance = Balance([2, 2])
    found = changes(balance, 400, lambda step: [1.0, 20.0 if step < 100 else 1.0])
    first, trial, back, again, found_out = found
    assert first == (HOLD, [4, 0])
    assert trial == (HOLD + PATIENCE, [3, 1])
    assert back == (trial[0] + HOLD, [4, 0])
    assert again == (back[0] + 2 * PATIENCE, [3, 1])
    assert found_out == (again[0] + HOLD, [2, 2])


def test_an_island_that_must_work_keeps_a_unit() -> None:
    balance = Balance([8, 8], unit=4, least=4)
    assert changes(balance, 200, lambda _: [1.0, 50.0]) == [(HOLD, [12, 4])]
