"""Mixtures against the slow, obvious dealing: shares, epochs, seeking and the way back."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.data.mixture import BLOCK, MOST_WEIGHT, Mixture, whole_weights
from cordee.data.order import Order
from cordee.errors import DataError


@st.composite
def mixtures(draw: st.DrawFn, most_rows: int = 400) -> Mixture:
    count = draw(st.integers(1, 6))
    rows = draw(st.lists(st.integers(1, most_rows), min_size=count, max_size=count))
    weights = draw(st.lists(st.integers(1, 60), min_size=count, max_size=count))
    return Mixture(draw(st.integers(0, 2**63 - 1)), tuple(rows), tuple(weights))


def deal_slow(mixture: Mixture, draws: int) -> list[tuple[int, int]]:
    """(source, draw of it) of the first draws: one after another, with counters at the nodes."""
    counters: Counter[tuple[int, int]] = Counter()

    def one(first: int, last: int) -> tuple[int, int]:
        n = counters[first, last]
        counters[first, last] += 1
        if last - first == 1:
            return first, n
        middle = (first + last) // 2
        left, whole = sum(mixture.weights[first:middle]), sum(mixture.weights[first:last])
        goes_left = (n + 1) * left // whole > n * left // whole
        return one(first, middle) if goes_left else one(middle, last)

    return [one(0, len(mixture.rows)) for _ in range(draws)]


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(1, 700))
def test_dealing_is_the_obvious_one(mixture: Mixture, draws: int) -> None:
    slow = [mixture.starts[s] + d % mixture.rows[s] for s, d in deal_slow(mixture, draws)]
    assert mixture.ids_in_turn(0, draws).tolist() == slow
    counts = Counter(source for source, _ in deal_slow(mixture, draws))
    assert mixture.counts(draws) == tuple(counts[s] for s in range(len(mixture.rows)))


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(0, 5000))
def test_every_source_has_its_share_after_any_number_of_draws(mixture: Mixture, n: int) -> None:
    levels, whole = ceil(log2(len(mixture.rows))), sum(mixture.weights)
    for count, weight in zip(mixture.counts(n), mixture.weights, strict=True):
        assert abs(count - Fraction(n * weight, whole)) <= levels
    assert sum(mixture.counts(n)) == n


@settings(max_examples=25, deadline=None)
@given(mixtures(), st.integers(1, 3))
def test_in_whole_blocks_every_row_comes_once_an_epoch(mixture: Mixture, blocks: int) -> None:
    ids = mixture.ids_at(np.arange(blocks * BLOCK, dtype=np.int64))
    uses = Counter(ids.tolist())
    drawn = mixture.counts(blocks * BLOCK)
    assert mixture.drawn(blocks * BLOCK) == drawn
    for source, rows in enumerate(mixture.rows):
        each = [uses[mixture.starts[source] + row] for row in range(rows)]
        assert sum(each) == drawn[source]
        assert set(each) <= {drawn[source] // rows, -(-drawn[source] // rows)}


@settings(max_examples=25, deadline=None)
@given(mixtures(), st.integers(0, 3 * BLOCK), st.data())
def test_uses_are_the_places_in_the_order(mixture: Mixture, stop: int, data: st.DataObject) -> None:
    ids = mixture.ids_at(np.arange(stop, dtype=np.int64))
    row = data.draw(st.integers(0, sum(mixture.rows) - 1))
    assert sorted(p for p, _ in mixture.uses_of(row, stop)) == np.flatnonzero(ids == row).tolist()
    sources = np.searchsorted(mixture.starts, ids, side="right") - 1
    assert mixture.drawn(stop) == tuple(np.bincount(sources, minlength=len(mixture.rows)).tolist())


@settings(max_examples=25, deadline=None)
@given(mixtures(), st.integers(0, 2**45), st.integers(1, 50))
def test_any_position_is_found_alone(mixture: Mixture, start: int, count: int) -> None:
    order = Order(1, sum(mixture.rows), 1, 1, mixture)
    together = order.rows_between(start, start + count).tolist()
    assert together == [int(order.rows_between(p, p + 1)[0]) for p in range(start, start + count)]


@given(mixtures(most_rows=40))
def test_once_is_the_longest_evaluation_without_a_row_twice(mixture: Mixture) -> None:
    ids = mixture.ids_in_turn(0, mixture.once + 1)
    assert len(set(ids[: mixture.once].tolist())) == mixture.once
    assert len(set(ids.tolist())) <= mixture.once


def test_the_pattern_of_sources_is_not_regular_and_depends_on_the_seed() -> None:
    one, two = (Mixture(seed, (10**6, 10**6), (1, 1)) for seed in (1, 2))
    first, second = (m.ids_at(np.arange(BLOCK, dtype=np.int64)) // 10**6 for m in (one, two))
    assert first.sum() == second.sum() == BLOCK // 2
    assert (first != second).mean() > 0.4
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.1


def test_weights_in_lowest_terms() -> None:
    assert whole_weights([Fraction("0.7"), Fraction("0.3")]) == (7, 3)
    assert whole_weights([Fraction(4), Fraction(2), Fraction("1e1")]) == (2, 1, 5)
    assert whole_weights([Fraction(5)]) == (1,)
    with pytest.raises(DataError, match="more than 0"):
        whole_weights([Fraction(1), Fraction(0)])
    with pytest.raises(DataError, match="too fine"):
        whole_weights([Fraction(1), Fraction(MOST_WEIGHT)])


def test_a_source_without_rows_and_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="a row and a weight"):
        Mixture(0, (5, 0), (1, 1))
    with pytest.raises(DataError, match="other rows"):
        Order(0, 11, 1, 1, Mixture(0, (5, 5), (1, 1)))
