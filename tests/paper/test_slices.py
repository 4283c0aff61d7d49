"""Boxes against counting every element of the tensor, which is the slow, obvious version."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.layout.slices import (
    Box,
    box_shape,
    first_coverage_error,
    full_box,
    intersection,
    relative_box,
    volume,
)
from tests.conftest import boxes, partitions

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def coverage_counts(pieces: list[Box], shape: tuple[int, ...]) -> np.ndarray:
    """How many of the boxes hold each element."""
    count = np.zeros(shape, dtype=int)
    for box in pieces:
        count[tuple(slice(*dim) for dim in box)] += 1
    return count


def coverage_error_slow(
    pieces: list[Box], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], int] | None:
    for index, count in np.ndenumerate(coverage_counts(pieces, shape)):
        if count != 1:
            return index, int(count)
    return None


@given(data=st.data(), shape=shapes)
def test_a_partition_tiles(data: st.DataObject, shape: tuple[int, ...]) -> None:
    tiles = data.draw(partitions(shape))
    assert first_coverage_error(data.draw(st.permutations(tiles)), shape) is None
    assert sum(volume(box) for box in tiles) == np.prod(shape, dtype=int)


@settings(max_examples=300)
@given(data=st.data(), shape=shapes)
def test_the_first_fault_is_the_first_element_not_held_once(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    tiles = data.draw(partitions(shape))
    for _ in range(data.draw(st.integers(0, 2))):
        if tiles and data.draw(st.booleans()):
            tiles.pop(data.draw(st.integers(0, len(tiles) - 1)))
        else:
            tiles.append(data.draw(boxes(shape)))
    assert first_coverage_error(tiles, shape) == coverage_error_slow(tiles, shape)


def test_a_tiling_that_no_straight_cut_makes() -> None:
    pinwheel = [
        ((0, 2), (0, 1)), ((0, 1), (1, 3)), ((1, 3), (2, 3)), ((2, 3), (0, 2)), ((1, 2), (1, 2)),
    ]  # fmt: skip
    assert first_coverage_error(pinwheel, (3, 3)) is None
    assert first_coverage_error(pinwheel[:-1], (3, 3)) == ((1, 1), 0)
    same_volume_tiles = [*pinwheel[:-1], ((0, 1), (0, 1))]
    assert first_coverage_error(same_volume_tiles, (3, 3)) == ((0, 0), 2)


def test_scalars_and_tensors_without_elements() -> None:
    assert first_coverage_error([()], ()) is None
    assert first_coverage_error([], ()) == ((), 0)
    assert first_coverage_error([(), ()], ()) == ((), 2)
    assert first_coverage_error([], (3, 0)) is None
    assert first_coverage_error([((0, 3), (0, 0))] * 2, (3, 0)) is None


def test_many_pieces() -> None:
    """Comparing each with each would take hours."""
    grid = [range(0, 400, 10)] * 3
    tiles = [tuple((start, start + 10) for start in corner) for corner in itertools.product(*grid)]
    assert len(tiles) == 64_000 and first_coverage_error(tiles, (400, 400, 400)) is None
    tiles[12_345] = tiles[12_344]
    assert first_coverage_error(tiles, (400, 400, 400)) == (tuple(a for a, _ in tiles[12_344]), 2)


@given(data=st.data(), shape=shapes)
def test_intersection(data: st.DataObject, shape: tuple[int, ...]) -> None:
    a, b = data.draw(boxes(shape)), data.draw(boxes(shape))
    overlap_mask = coverage_counts([a, b], shape) == 2
    overlap = intersection(a, b)
    assert (overlap is None) == (not overlap_mask.any()) and overlap == intersection(b, a)
    if overlap is not None:
        assert (coverage_counts([overlap], shape).astype(bool) == overlap_mask).all()
        assert intersection(overlap, full_box(shape)) == overlap
        overlap_in_a = relative_box(overlap, a)
        assert box_shape(overlap_in_a) == box_shape(overlap)
        array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        overlap_values = array[tuple(slice(*dim) for dim in a)][
            tuple(slice(*dim) for dim in overlap_in_a)
        ]
        assert (overlap_values == array[tuple(slice(*dim) for dim in overlap)]).all()
