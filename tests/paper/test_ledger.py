"""The ledger against the slow, obvious list of every position, and what its proof must not miss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.data.ledger import Use, prove, step_word, uses_of
from cordee.data.order import Order
from cordee.errors import DataError

orders = st.builds(
    Order,
    seed=st.integers(0, 2**63),
    rows=st.integers(1, 60),
    microbatch_rows=st.integers(1, 5),
    microbatches=st.integers(1, 5),
)


@given(orders, st.integers(0, 30), st.data())
def test_uses_are_the_places_in_the_order(order: Order, steps: int, data: st.DataObject) -> None:
    sample = data.draw(st.integers(0, order.rows - 1))
    obvious = []
    for step in range(steps):
        for microbatch in range(order.microbatches):
            for row, found in enumerate(order.rows_of(step, microbatch).tolist()):
                place = order.positions(step, microbatch)[row]
                if found == sample:
                    obvious.append(Use(step + 1, microbatch, row, place // order.rows))
    assert uses_of(order, sample, steps) == obvious
    whole = steps * order.step_rows // order.rows
    assert whole <= len(obvious) <= whole + 1, "once in every epoch"


def records(order: Order, steps: int) -> list[dict[str, Any]]:
    return [{"step": s, "samples": step_word(order, s - 1)} for s in range(1, steps + 1)]


@given(orders, st.integers(1, 12))
def test_a_run_that_kept_the_order_is_proved(order: Order, steps: int) -> None:
    rows = records(order, steps)
    rows[-1]["skipped"] = True
    proof = prove(order, rows)
    assert proof.holds and proof.steps == steps and proof.skipped == [steps]
    assert proof.epochs == steps * order.step_rows / order.rows


def test_what_went_wrong_is_found_at_its_step() -> None:
    order = Order(seed=1, rows=500, microbatch_rows=2, microbatches=4)
    rows = records(order, 9)
    assert prove(order, [*rows[:4], *rows[5:]]).missing == [5]
    assert prove(order, [*rows[:4], rows[3], *rows[4:]]).again == [4]
    assert prove(order, [*rows[:4], {"step": 5}, *rows[5:]]).unproved == [5]
    twice = {"step": 5, "samples": rows[3]["samples"]}
    assert prove(order, [*rows[:4], twice, *rows[5:]]).wrong == [5]
    for other in (replace(order, seed=2), replace(order, rows=300)):
        assert prove(other, rows).wrong == list(range(1, 10))
    for broken in ([*rows[:4], *rows[5:]], [*rows, rows[0]]):
        assert not prove(order, broken).holds


def test_a_sample_that_is_not_there() -> None:
    with pytest.raises(DataError, match="no such sample"):
        uses_of(Order(seed=1, rows=5, microbatch_rows=1, microbatches=1), 5, 3)
