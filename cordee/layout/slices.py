"""Boxes: the part of a tensor that a rank or a file holds, as [start, stop) of every dim."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

Box = tuple[tuple[int, int], ...]
"""(start, stop) of every dim, 0 <= start <= stop; () for a scalar."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LocalSlice:
    """Where a rank's local tensor lies in the whole tensor of `shape`, and who else holds it.

    `replicated_axes` names the axes along which ranks hold the very same box: `replica_count` ranks
    in all, of which this one has number `replica_index`. What is shared along the same axes must be
    the same tensors on all these ranks.
    """

    box: Box
    shape: Shape
    replicated_axes: tuple[str, ...] = ()
    replica_index: int = 0
    replica_count: int = 1


def full_box(shape: Shape) -> Box:
    return tuple((0, size) for size in shape)


def box_shape(box: Box) -> Shape:
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """Elements of a box; a scalar is one."""
    return math.prod(box_shape(box))


def intersection(a: Box, b: Box) -> Box | None:
    """The common part of two boxes of one tensor; None if it has no element."""
    overlap = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return overlap if all(start < stop for start, stop in overlap) else None


def subtract_box(box: Box, hole: Box) -> list[Box]:
    """Boxes that tile the rest of `box` without `hole`, which lies in it."""
    pieces = []
    for dim, ((start, stop), (hole_start, hole_stop)) in enumerate(zip(box, hole, strict=True)):
        spans = ((start, hole_start), (hole_stop, stop))
        pieces += [(*hole[:dim], span, *box[dim + 1 :]) for span in spans if span[0] < span[1]]
    return pieces


def relative_box(box: Box, outer: Box) -> Box:
    """`box`, which lies in `outer`, relative to the first element of `outer`."""
    pairs = zip(box, outer, strict=True)
    return tuple((start - origin, stop - origin) for (start, stop), (origin, _) in pairs)


def first_coverage_error(boxes: Iterable[Box], shape: Shape) -> tuple[tuple[int, ...], int] | None:
    """The first element, in C order, that not exactly one box holds, and how many hold it.

    None if the boxes, all inside `shape`, tile it. Linear in the boxes, whatever they look like: a
    box adds 1 at its first corner and an alternating 1 where a dim of it stops (an n-dimensional
    difference array, whose prefix sums would be the counts), 2**k corners for k dims that stop
    before the tensor does. What differs from a single 1 at the origin differs first where the
    count does. Boxes without an element add nothing.
    """
    steps: defaultdict[tuple[int, ...], int] = defaultdict(int)
    if math.prod(shape):
        steps[(0,) * len(shape)] = -1
    for box in boxes:
        if not volume(box):
            continue
        ends = [
            ((start, 1), (stop, -1)) if stop < size else ((start, 1),)
            for (start, stop), size in zip(box, shape, strict=True)
        ]
        for corner in itertools.product(*ends):
            steps[tuple(coords for coords, _ in corner)] += math.prod(sign for _, sign in corner)
    errors = [coords for coords, step in steps.items() if step]
    return (min(errors), steps[min(errors)] + 1) if errors else None
