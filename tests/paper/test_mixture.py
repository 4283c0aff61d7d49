"""Mixtures against the slow, obvious dealing: shares, epochs, seeking and the way back."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.data.mixture import BLOCK_POSITIONS, MAX_WEIGHT_SUM, MixtureOrder, integer_weights
from cordee.data.order import SampleOrder
from cordee.errors import DataError


@st.composite
def mixtures(draw: st.DrawFn, most_rows: int = 400) -> MixtureOrder:
    count = draw(st.integers(1, 6))
    rows = draw(st.lists(st.integers(1, most_rows), min_size=count, max_size=count))
    weights = draw(st.lists(st.integers(1, 60), min_size=count, max_size=count))
    return MixtureOrder(draw(st.integers(0, 2**63 - 1)), tuple(rows), tuple(weights))


def draw_slow(mixture: MixtureOrder, draws: int) -> list[tuple[int, int]]:
    """(source, draw of it) of the first draws: one after another, with counters at the nodes."""
    counters: Counter[tuple[int, int]] = Counter()

    def draw_one(first: int, last: int) -> tuple[int, int]:
        n = counters[first, last]
        counters[first, last] += 1
        if last - first == 1:
            return first, n
        middle = (first + last) // 2
        left_weight, total_weight = (
            sum(mixture.weights[first:middle]),
            sum(mixture.weights[first:last]),
        )
        is_left = (n + 1) * left_weight // total_weight > n * left_weight // total_weight
        return draw_one(first, middle) if is_left else draw_one(middle, last)

    return [draw_one(0, len(mixture.rows)) for _ in range(draws)]


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(1, 700))
def test_fast_draws_equal_slow_draws(mixture: MixtureOrder, draws: int) -> None:
    expected_ids = [mixture.starts[s] + d % mixture.rows[s] for s, d in draw_slow(mixture, draws)]
    assert mixture.unshuffled_row_ids(0, draws).tolist() == expected_ids
    counts = Counter(source for source, _ in draw_slow(mixture, draws))
    assert mixture.draw_counts(draws) == tuple(counts[s] for s in range(len(mixture.rows)))


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(0, 5000))
def test_every_source_has_its_share_after_any_number_of_draws(
    mixture: MixtureOrder, draws: int
) -> None:
    levels, total_weight = ceil(log2(len(mixture.rows))), sum(mixture.weights)
    for count, weight in zip(mixture.draw_counts(draws), mixture.weights, strict=True):
        assert abs(count - Fraction(draws * weight, total_weight)) <= levels
    assert sum(mixture.draw_counts(draws)) == draws


@settings(max_examples=25, deadline=None)
@given(mixtures(), st.integers(1, 3))
def test_in_whole_blocks_every_row_comes_once_an_epoch(mixture: MixtureOrder, blocks: int) -> None:
    ids = mixture.row_ids_at(np.arange(blocks * BLOCK_POSITIONS, dtype=np.int64))
    uses = Counter(ids.tolist())
    draw_counts = mixture.draw_counts(blocks * BLOCK_POSITIONS)
    assert mixture.counts_below(blocks * BLOCK_POSITIONS) == draw_counts
    for source, rows in enumerate(mixture.rows):
        row_uses = [uses[mixture.starts[source] + row] for row in range(rows)]
        assert sum(row_uses) == draw_counts[source]
        assert set(row_uses) <= {draw_counts[source] // rows, -(-draw_counts[source] // rows)}


@settings(max_examples=25, deadline=None)
@given(mixtures(), st.integers(0, 3 * BLOCK_POSITIONS), st.data())
def test_uses_are_the_places_in_the_order(
    mixture: MixtureOrder, stop: int, data: st.DataObject
) -> None:
    ids = mixture.row_ids_at(np.arange(stop, dtype=np.int64))
    row = data.draw(st.integers(0, sum(mixture.rows) - 1))
    assert sorted(p for p, _ in mixture.find_uses(row, stop)) == np.flatnonzero(ids == row).tolist()
    sources = np.searchsorted(mixture.starts, ids, side="right") - 1
    assert mixture.counts_below(stop) == tuple(
        np.bincount(sources, minlength=len(mixture.rows)).tolist()
    )


@settings(max_examples=25, deadline=None)
@given(mixtures(), st.integers(0, 2**45), st.integers(1, 50))
def test_any_position_is_found_alone(mixture: MixtureOrder, start: int, count: int) -> None:
    order = SampleOrder(1, sum(mixture.rows), 1, 1, mixture)
    row_ids = order.row_ids_between(start, start + count).tolist()
    assert row_ids == [int(order.row_ids_between(p, p + 1)[0]) for p in range(start, start + count)]


@given(mixtures(most_rows=40))
def test_draws_without_repeat_are_the_most(mixture: MixtureOrder) -> None:
    ids = mixture.unshuffled_row_ids(0, mixture.max_draws_without_repeat + 1)
    assert (
        len(set(ids[: mixture.max_draws_without_repeat].tolist()))
        == mixture.max_draws_without_repeat
    )
    assert len(set(ids.tolist())) <= mixture.max_draws_without_repeat


def test_the_pattern_of_sources_is_not_regular_and_depends_on_the_seed() -> None:
    mixture_1, mixture_2 = (MixtureOrder(seed, (10**6, 10**6), (1, 1)) for seed in (1, 2))
    sources_1, sources_2 = (
        m.row_ids_at(np.arange(BLOCK_POSITIONS, dtype=np.int64)) // 10**6
        for m in (mixture_1, mixture_2)
    )
    assert sources_1.sum() == sources_2.sum() == BLOCK_POSITIONS // 2
    assert (sources_1 != sources_2).mean() > 0.4
    assert abs(np.corrcoef(sources_1[:-1], sources_1[1:])[0, 1]) < 0.1


def test_weights_in_lowest_terms() -> None:
    assert integer_weights([Fraction("0.7"), Fraction("0.3")]) == (7, 3)
    assert integer_weights([Fraction(4), Fraction(2), Fraction("1e1")]) == (2, 1, 5)
    assert integer_weights([Fraction(5)]) == (1,)
    with pytest.raises(DataError, match="more than 0"):
        integer_weights([Fraction(1), Fraction(0)])
    with pytest.raises(DataError, match="too fine"):
        integer_weights([Fraction(1), Fraction(MAX_WEIGHT_SUM)])


def test_a_source_without_rows_and_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="a row and a weight"):
        MixtureOrder(0, (5, 0), (1, 1))
    with pytest.raises(DataError, match="other rows"):
        SampleOrder(0, 11, 1, 1, MixtureOrder(0, (5, 5), (1, 1)))
