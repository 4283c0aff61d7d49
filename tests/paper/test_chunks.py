"""How a sequence is cut over a context group: every position once, and equal work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from cordee.errors import LayoutError
from cordee.layout.split import context_chunks
from cordee.layout.traffic import context_bytes


@given(parts=some.integers(1, 64), chunk=some.integers(1, 50))
def test_every_position_once_and_equal_work(parts: int, chunk: int) -> None:
    length = 2 * parts * chunk
    held = [context_chunks(length, parts, index) for index in range(parts)]
    positions = [p for first, second in held for p in (*first, *second)]
    assert sorted(positions) == list(range(length))
    # Position p attends to p + 1 keys.
    assert len({sum(p + 1 for p in (*first, *second)) for first, second in held}) == 1
    assert all(len(first) == len(second) == chunk for first, second in held)


@given(length=some.integers(1, 999))
def test_one_part_is_the_whole_in_order(length: int) -> None:
    first, second = context_chunks(length, 1, 0)
    assert [*first, *second] == list(range(length))


@pytest.mark.parametrize(
    ("length", "parts", "near"), [(10, 2, 8), (257, 4, 256), (3, 2, 4), (15, 2, 16)]
)
def test_unequal_chunks_are_refused_with_the_nearest_length(
    length: int, parts: int, near: int
) -> None:
    with pytest.raises(LayoutError, match=rf"data\.sequence={near}$") as raised:
        context_chunks(length, parts, 0)
    assert raised.value.values == {"data.sequence": length, "layout.context": parts}


def test_bytes_of_a_layer_by_hand() -> None:
    # 2 rows of 64 positions over 4 ranks: 32 local positions, keys and values of width 8.
    local = 2 * 32 * 8
    assert context_bytes("gather", 128, 8, 4, 4) == 3 * local * (4 + 4)
    assert context_bytes("ring", 128, 8, 2, 4) == 3 * local * (2 + 2 + 4)
    assert context_bytes("ring", 128, 8, 4, 4, forwards=2) == 3 * local * (4 + 4 + 4 + 4)
    assert context_bytes("ring", 128, 8, 4, 1) == context_bytes("gather", 128, 8, 4, 1) == 0
