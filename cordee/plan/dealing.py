"""How Muon's matrices are shared between ranks, and what their orthogonalisation costs.

The paper side of optim/muon.py. Not here: other rules, whose updates are element by element
(`costs.py`), and the time of messages (`network.py`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cordee.config.run import Run
from cordee.layout.axes import Layout
from cordee.layout.census import ORIGIN, Specs, census
from cordee.layout.stages import Part

MUON_ITERATIONS = 5
"""Newton-Schulz iterations of an orthogonalisation (Jordan 2024)."""


@dataclass(frozen=True)
class Deal:
    """Muon's matrices that one group of ranks shares: the most operations and elements of one
    rank, elements of all, matrices of one rank, and whether ranks hold parts of them (`cut`)."""

    axes: tuple[str, ...]
    ranks: int
    cut: bool
    flops: float
    elements: int
    all_elements: int
    matrices: int


def deals(
    run: Run, specs: Specs, layout: Layout, parts: Sequence[Part] | None = None
) -> list[Deal]:
    """How Muon's work is shared: matrices cut by tensor or shard among the ranks that hold their
    parts, others among all that hold the same (nobody where replicated work is compared)."""
    if run.optim.name != "muon":
        return []
    replicated = run.data.placement == "replicate"
    found: dict[tuple[bool, tuple[str, ...]], list[tuple[int, ...]]] = {}
    for held in census(specs).held(layout, ORIGIN, parts, "expert"):
        if held.spec.group != "matrices":
            continue
        axes = tuple(axis for axis, _ in held.spec.cuts(layout) if axis != "expert")
        cut = bool(axes)
        axes = axes or (() if replicated else held.spec.shared(layout))
        shape = held.shape if held.spec.stacked else (1, *held.shape)
        found.setdefault((cut, axes), []).extend([shape] * held.count)
    made = []
    for (cut, axes), shapes in found.items():
        ranks = math.prod(getattr(layout, axis) for axis in axes)
        flops, elements = dealt(shapes, ranks)
        each = -(-sum(shape[0] for shape in shapes) // ranks)
        made.append(Deal(axes, ranks, cut, flops, elements, sum(map(math.prod, shapes)), each))
    return made


def dealt(shapes: Sequence[tuple[int, ...]], ranks: int) -> tuple[float, int]:
    """Stacks of matrices dealt dearest first to the least loaded (optim/muon.py, `deal`).

    Returns the most (operations, elements) that one rank gets.
    """
    heap = [(0.0, rank, 0) for rank in range(min(ranks, len(shapes)))]
    for shape in sorted(shapes, key=newton_schulz_flops, reverse=True):
        flops, rank, elements = heap[0]
        added = (flops + newton_schulz_flops(shape), rank, elements + math.prod(shape))
        heapq.heapreplace(heap, added)
    return max(load[0] for load in heap), max(load[2] for load in heap)


def newton_schulz_flops(shape: tuple[int, ...]) -> float:
    """Operations of Muon's orthogonalisation of a stack [matrices, rows, columns ...]: 5 times
    X Xt, its square and a product with X."""
    matrices, rows, columns = shape[0], shape[1], math.prod(shape[2:])
    short, long = min(rows, columns), max(rows, columns)
    return matrices * MUON_ITERATIONS * (4.0 * short * short * long + 2.0 * short**3)
