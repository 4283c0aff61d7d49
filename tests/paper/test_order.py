"""The global order: a permutation for every length, well mixed, and the same for any split.

Not here: gathering tokens (tests/metal/test_data.py). Traded away: true randomness. Seeds are
fixed, so a statistical test that passes once passes always.
"""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.data.order import MAX_ROWS, SampleOrder, invert, measure_mixing, permute
from cordee.errors import DataError

POWERS = [2**k + d for k in range(1, 41) for d in (-1, 0, 1) if 2**k + d <= MAX_ROWS]
GOLDEN_ROWS = (
    [517, 84, 902, 917],
    [967, 873, 16, 188],
    [890496293934, 516699047395, 419841944300, 974255783248, 145882177970, 252370485712],
)


ROUNDS = 6
_MASK = (1 << 64) - 1
_GOLDEN_RATIO = 0x9E3779B97F4A7C15
_MIX_A = 0xBF58476D1CE4E5B9
_MIX_B = 0x94D049BB133111EB


def order_slow(seed: int, rows: int, position: int) -> int:
    """The obvious version of `SampleOrder.row_ids_at`: one position, plain integers."""
    epoch, value = divmod(position, rows)
    left_size = math.isqrt(rows - 1) + 1
    right_size = -(-rows // left_size)
    stream = _mix_slow(_mix_slow((seed & _MASK) ^ _GOLDEN_RATIO) ^ epoch)
    while True:
        left, right = divmod(value, right_size)
        for number in range(ROUNDS):
            key = _mix_slow((stream + (number + 1) * _GOLDEN_RATIO) & _MASK)
            if number % 2 == 0:
                left = (left + _round_slow(right, key, left_size)) % left_size
            else:
                right = (right + _round_slow(left, key, right_size)) % right_size
        value = left * right_size + right
        if value < rows:
            return value


def _mix_slow(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX_A) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_B) & _MASK
    return x ^ (x >> 31)


def _round_slow(half: int, key: int, modulus: int) -> int:
    x = ((half ^ key) * _MIX_A) & _MASK
    x = ((x ^ (x >> 32)) * _MIX_B) & _MASK
    return ((x >> 32) * modulus) >> 32


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    rows=st.one_of(st.integers(1, 200), st.integers(1, MAX_ROWS), st.sampled_from(POWERS)),
    start=st.integers(0, 2**50),
    count=st.integers(1, 20),
)
def test_fast_equals_slow(seed: int, rows: int, start: int, count: int) -> None:
    row_ids = SampleOrder(seed, rows, 1, 1).row_ids_between(start, start + count)
    assert row_ids.tolist() == [order_slow(seed, rows, p) for p in range(start, start + count)]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_length_to_2000_is_a_permutation(seed: int) -> None:
    for rows in range(1, 2001):
        epoch = permute(np.arange(rows), rows, seed, epoch=3)
        assert np.array_equal(np.sort(epoch), np.arange(rows)), rows
        assert np.array_equal(invert(epoch, rows, seed, epoch=3), np.arange(rows)), rows


@pytest.mark.parametrize("rows", [65_535, 65_537, 262_145, 1_048_575, 1_048_577])
def test_awkward_lengths_lose_and_double_nothing(rows: int) -> None:
    counts = np.bincount(permute(np.arange(rows), rows, seed=5), minlength=rows)
    assert counts.size == rows and (counts == 1).all()


def test_inverse_at_powers_of_two_and_their_neighbours() -> None:
    rng = np.random.default_rng(0)
    for rows in POWERS:
        positions = np.unique(np.concatenate([rng.integers(0, rows, 500), [0, rows - 1]]))
        row_ids = permute(positions, rows, seed=9, epoch=2)
        assert row_ids.min() >= 0 and row_ids.max() < rows
        assert np.unique(row_ids).size == positions.size
        assert np.array_equal(invert(row_ids, rows, seed=9, epoch=2), positions)


@pytest.mark.parametrize("rows", [10**6, 2**20, 2**20 + 1, 10**7, 10**9, 2**40])
def test_gaps_and_neighbours_look_random(rows: int) -> None:
    """Chance gives a chi-square of 255 +- 23 for the gaps and |lag-1| below 0.003."""
    for seed in range(10):
        row_ids = SampleOrder(seed, rows, 1, 1).row_ids_between(0, min(rows, 300_000))
        gaps = np.diff(row_ids) % rows
        counts = np.bincount(gaps * 256 // rows, minlength=256)
        expected = gaps.size / 256
        assert ((counts - expected) ** 2 / expected).sum() < 330, seed
        assert abs(np.corrcoef(row_ids[:-1], row_ids[1:])[0, 1]) < 0.03, seed


def test_batches_meet_as_many_parts_as_chance() -> None:
    for seed in range(10):
        stats = measure_mixing(SampleOrder(seed, 50_000, 1, 1))
        assert abs(stats.distinct / stats.chance - 1) < 0.02
        assert abs(stats.lag_one) < 0.03
    # A file read straight through is what the figure must tell apart.
    assert measure_mixing(SampleOrder(0, 1, 1, 1)).distinct == 1.0


def test_batch_means_spread_as_by_chance() -> None:
    rows, batch = 2**20, 32
    for seed in range(10):
        batches = SampleOrder(seed, rows, 1, 1).row_ids_between(0, rows).reshape(-1, batch)
        spread = batches.mean(axis=1).std() / (rows / np.sqrt(12 * batch))
        assert 0.9 < spread < 1.1, seed


def test_epochs_and_seeds_are_unrelated() -> None:
    rows = 100_000
    order = SampleOrder(1, rows, 1, 1)
    epochs = [order.row_ids_between(e * rows, (e + 1) * rows) for e in range(3)]
    epochs.append(SampleOrder(2, rows, 1, 1).row_ids_between(0, rows))
    for i, epoch_rows in enumerate(epochs):
        for other_rows in epochs[:i]:
            assert abs(np.corrcoef(epoch_rows, other_rows)[0, 1]) < 0.02
            assert (epoch_rows == other_rows).sum() < 10


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 60),
    microbatch_rows=st.integers(1, 7),
    microbatches=st.integers(1, 9),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    seed=st.integers(0, 2**32),
)
def test_every_row_once_an_epoch_for_any_split(
    rows: int, microbatch_rows: int, microbatches: int, ranks: list[int], seed: int
) -> None:
    """Ranks change from step to step; who takes which microbatch never shows in what is taken."""
    order = SampleOrder(seed, rows, microbatch_rows, microbatches)
    row_ids: list[int] = []
    step = 0
    while len(row_ids) < 3 * rows:
        count = ranks[step % len(ranks)]
        borders = [microbatches * r // count for r in range(count + 1)]
        shares = [range(a, b) for a, b in pairwise(borders)]
        row_ids += [
            row for share in shares for m in share for row in order.microbatch_row_ids(step, m)
        ]
        step += 1
    for epoch in range(3):
        assert sorted(row_ids[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert row_ids == order.row_ids_between(0, len(row_ids)).tolist()


def test_positions_are_contiguous_and_far_ones_cost_nothing() -> None:
    order = SampleOrder(3, MAX_ROWS, 4, 5)
    assert order.positions(2, 3) == range(2 * 20 + 12, 2 * 20 + 16)
    assert order.step_rows == 20
    far_rows = order.microbatch_row_ids(10**15 // 20, 4)
    assert far_rows.dtype == np.int64 and far_rows.shape == (4,)
    assert far_rows.tolist() == [
        order_slow(3, MAX_ROWS, p) for p in order.positions(10**15 // 20, 4)
    ]


def test_shape_is_kept_and_mixed_epochs_agree() -> None:
    order = SampleOrder(11, 1000, 2, 2)
    positions = np.random.default_rng(0).integers(0, 10**7, (300, 70))
    rows = order.row_ids_at(positions)
    assert rows.shape == positions.shape
    flat_positions = positions.reshape(-1)[:200].tolist()
    assert rows.reshape(-1)[:200].tolist() == [order_slow(11, 1000, p) for p in flat_positions]
    assert order.row_ids_at(np.empty(0, np.int64)).size == 0


def test_the_order_is_what_it_was() -> None:
    """Runs resume by step number alone: these numbers may never change."""
    order = SampleOrder(1234, 1000, 4, 4)
    assert order.microbatch_row_ids(0, 0).tolist() == GOLDEN_ROWS[0]
    assert order.microbatch_row_ids(70, 3).tolist() == GOLDEN_ROWS[1]
    assert SampleOrder(7, 2**40, 6, 1).microbatch_row_ids(10**9, 0).tolist() == GOLDEN_ROWS[2]


@pytest.mark.parametrize(
    "bad_counts", [(0, 1, 1), (MAX_ROWS + 1, 1, 1), (10, 0, 1), (10, 1, 0), (-3, 1, 1)]
)
def test_impossible_counts_are_refused(bad_counts: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="nearest fix"):
        SampleOrder(0, *bad_counts)


@pytest.mark.parametrize(("step", "microbatch"), [(-1, 0), (0, 4), (0, -1)])
def test_impossible_microbatches_are_refused(step: int, microbatch: int) -> None:
    with pytest.raises(DataError, match="no such microbatch"):
        SampleOrder(0, 10, 1, 4).microbatch_row_ids(step, microbatch)


def test_order_and_preparation_do_not_import_torch() -> None:
    script = (
        "import sys; import cordee.data.order, cordee.data.prepare; "
        "sys.exit('torch is imported' if 'torch' in sys.modules else 0)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
