"""How a sequence is cut over a context group: every position once, and equal work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from cordee.errors import LayoutError
from cordee.layout.microbatches import context_chunks
from cordee.planner.traffic import context_layer_bytes


@given(parts=some.integers(1, 64), chunk=some.integers(1, 50))
def test_every_position_once_and_equal_work(parts: int, chunk: int) -> None:
    length = 2 * parts * chunk
    rank_chunks = [context_chunks(length, parts, index) for index in range(parts)]
    positions = [
        p for first_chunk, second_chunk in rank_chunks for p in (*first_chunk, *second_chunk)
    ]
    assert sorted(positions) == list(range(length))
    # Position p attends to p + 1 keys.
    assert (
        len(
            {
                sum(p + 1 for p in (*first_chunk, *second_chunk))
                for first_chunk, second_chunk in rank_chunks
            }
        )
        == 1
    )
    assert all(
        len(first_chunk) == len(second_chunk) == chunk for first_chunk, second_chunk in rank_chunks
    )


@given(length=some.integers(1, 999))
def test_one_part_is_the_whole_in_order(length: int) -> None:
    first_chunk, second_chunk = context_chunks(length, 1, 0)
    assert [*first_chunk, *second_chunk] == list(range(length))


@pytest.mark.parametrize(
    ("length", "parts", "nearest_length"), [(10, 2, 8), (257, 4, 256), (3, 2, 4), (15, 2, 16)]
)
def test_unequal_chunks_are_refused_with_the_nearest_length(
    length: int, parts: int, nearest_length: int
) -> None:
    with pytest.raises(LayoutError, match=rf"data\.sequence={nearest_length}$") as exc_info:
        context_chunks(length, parts, 0)
    assert exc_info.value.values == {"data.sequence": length, "layout.context": parts}


def test_bytes_of_a_layer_by_hand() -> None:
    # 2 rows of 64 positions over 4 ranks: 32 local positions, keys and values of width 8.
    local_elements = 2 * 32 * 8
    assert context_layer_bytes("gather", 128, 8, 4, 4) == 3 * local_elements * (4 + 4)
    assert context_layer_bytes("ring", 128, 8, 2, 4) == 3 * local_elements * (2 + 2 + 4)
    assert context_layer_bytes("ring", 128, 8, 4, 4, forwards=2) == 3 * local_elements * (
        4 + 4 + 4 + 4
    )
    assert (
        context_layer_bytes("ring", 128, 8, 4, 1)
        == context_layer_bytes("gather", 128, 8, 4, 1)
        == 0
    )
