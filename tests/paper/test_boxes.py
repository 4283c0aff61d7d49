"""Boxes against counting every element of the tensor, which is the slow, obvious version."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.layout.boxes import (
    Box,
    first_fault,
    intersection,
    moved,
    shape_of,
    volume,
    whole,
)
from tests.conftest import boxes, partitions

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def counted(held: list[Box], shape: tuple[int, ...]) -> np.ndarray:
    """How many of the boxes hold each element."""
    count = np.zeros(shape, dtype=int)
    for box in held:
        count[tuple(slice(*dim) for dim in box)] += 1
    return count


def first_fault_slow(held: list[Box], shape: tuple[int, ...]) -> tuple[tuple[int, ...], int] | None:
    for at, count in np.ndenumerate(counted(held, shape)):
        if count != 1:
            return at, int(count)
    return None


@given(data=st.data(), shape=shapes)
def test_a_partition_tiles(data: st.DataObject, shape: tuple[int, ...]) -> None:
    found = data.draw(partitions(shape))
    assert first_fault(data.draw(st.permutations(found)), shape) is None
    assert sum(volume(box) for box in found) == np.prod(shape, dtype=int)


@settings(max_examples=300)
@given(data=st.data(), shape=shapes)
def test_the_first_fault_is_the_first_element_not_held_once(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    found = data.draw(partitions(shape))
    for _ in range(data.draw(st.integers(0, 2))):
        if found and data.draw(st.booleans()):
            found.pop(data.draw(st.integers(0, len(found) - 1)))
        else:
            found.append(data.draw(boxes(shape)))
    assert first_fault(found, shape) == first_fault_slow(found, shape)


def test_a_tiling_that_no_straight_cut_makes() -> None:
    mill = [
        ((0, 2), (0, 1)), ((0, 1), (1, 3)), ((1, 3), (2, 3)), ((2, 3), (0, 2)), ((1, 2), (1, 2)),
    ]  # fmt: skip
    assert first_fault(mill, (3, 3)) is None
    assert first_fault(mill[:-1], (3, 3)) == ((1, 1), 0)
    same_volume = [*mill[:-1], ((0, 1), (0, 1))]
    assert first_fault(same_volume, (3, 3)) == ((0, 0), 2)


def test_scalars_and_tensors_without_elements() -> None:
    assert first_fault([()], ()) is None
    assert first_fault([], ()) == ((), 0)
    assert first_fault([(), ()], ()) == ((), 2)
    assert first_fault([], (3, 0)) is None
    assert first_fault([((0, 3), (0, 0))] * 2, (3, 0)) is None


def test_many_pieces() -> None:
    """Comparing each with each would take hours."""
    grid = [range(0, 400, 10)] * 3
    found = [tuple((at, at + 10) for at in corner) for corner in itertools.product(*grid)]
    assert len(found) == 64_000 and first_fault(found, (400, 400, 400)) is None
    found[12_345] = found[12_344]
    assert first_fault(found, (400, 400, 400)) == (tuple(a for a, _ in found[12_344]), 2)


@given(data=st.data(), shape=shapes)
def test_intersection(data: st.DataObject, shape: tuple[int, ...]) -> None:
    a, b = data.draw(boxes(shape)), data.draw(boxes(shape))
    both = counted([a, b], shape) == 2
    common = intersection(a, b)
    assert (common is None) == (not both.any()) and common == intersection(b, a)
    if common is not None:
        assert (counted([common], shape).astype(bool) == both).all()
        assert intersection(common, whole(shape)) == common
        inside = moved(common, a)
        assert shape_of(inside) == shape_of(common)
        array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        part = array[tuple(slice(*dim) for dim in a)][tuple(slice(*dim) for dim in inside)]
        assert (part == array[tuple(slice(*dim) for dim in common)]).all()
