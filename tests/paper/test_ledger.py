"""The ledger against the slow, obvious list of every position, and what its proof must not miss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.data.ledger import SampleUse, check_ledger, expected_step_digest, find_uses
from cordee.data.order import SampleOrder
from cordee.errors import DataError

orders = st.builds(
    SampleOrder,
    seed=st.integers(0, 2**63),
    rows=st.integers(1, 60),
    microbatch_rows=st.integers(1, 5),
    microbatches=st.integers(1, 5),
)


@given(orders, st.integers(0, 30), st.data())
def test_uses_are_the_places_in_the_order(
    order: SampleOrder, steps: int, data: st.DataObject
) -> None:
    sample = data.draw(st.integers(0, order.rows - 1))
    expected_uses = []
    for step in range(steps):
        for microbatch in range(order.microbatches):
            for row, row_id in enumerate(order.microbatch_row_ids(step, microbatch).tolist()):
                position = order.positions(step, microbatch)[row]
                if row_id == sample:
                    expected_uses.append(
                        SampleUse(step + 1, microbatch, row, position // order.rows)
                    )
    assert find_uses(order, sample, steps) == expected_uses
    epoch_count = steps * order.step_rows // order.rows
    assert epoch_count <= len(expected_uses) <= epoch_count + 1, "once in every epoch"


def make_rows(order: SampleOrder, steps: int) -> list[dict[str, Any]]:
    return [{"step": s, "samples": expected_step_digest(order, s - 1)} for s in range(1, steps + 1)]


@given(orders, st.integers(1, 12))
def test_a_run_that_kept_the_order_is_proved(order: SampleOrder, steps: int) -> None:
    rows = make_rows(order, steps)
    rows[-1]["skipped"] = True
    ledger_check = check_ledger(order, rows)
    assert (
        ledger_check.is_exactly_once
        and ledger_check.steps == steps
        and ledger_check.skipped == [steps]
    )
    assert ledger_check.epochs == steps * order.step_rows / order.rows


def test_what_went_wrong_is_found_at_its_step() -> None:
    order = SampleOrder(seed=1, rows=500, microbatch_rows=2, microbatches=4)
    rows = make_rows(order, 9)
    assert check_ledger(order, [*rows[:4], *rows[5:]]).missing == [5]
    assert check_ledger(order, [*rows[:4], rows[3], *rows[4:]]).again == [4]
    assert check_ledger(order, [*rows[:4], {"step": 5}, *rows[5:]]).unproved == [5]
    repeated_row = {"step": 5, "samples": rows[3]["samples"]}
    assert check_ledger(order, [*rows[:4], repeated_row, *rows[5:]]).wrong == [5]
    for other_order in (replace(order, seed=2), replace(order, rows=300)):
        assert check_ledger(other_order, rows).wrong == list(range(1, 10))
    for damaged_rows in ([*rows[:4], *rows[5:]], [*rows, rows[0]]):
        assert not check_ledger(order, damaged_rows).is_exactly_once


def test_a_sample_that_is_not_there() -> None:
    with pytest.raises(DataError, match="no such sample"):
        find_uses(SampleOrder(seed=1, rows=5, microbatch_rows=1, microbatches=1), 5, 3)
