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
from cordee.layout.counts import ORIGIN, TensorSpecs, count_tensors
from cordee.layout.stages import LayerRange

MUON_ITERATIONS = 5
"""Newton-Schulz iterations of an orthogonalisation (Jordan 2024)."""


@dataclass(frozen=True)
class MuonGroup:
    """Muon's matrices that one group of ranks shares: the most operations and elements of one rank,
    elements of all, matrices of one rank, and whether ranks hold parts of them (`is_sharded`)."""

    axes: tuple[str, ...]
    ranks: int
    is_sharded: bool
    flops: float
    elements: int
    all_elements: int
    matrices: int


def muon_groups(
    run: Run, specs: TensorSpecs, layout: Layout, layer_ranges: Sequence[LayerRange] | None = None
) -> list[MuonGroup]:
    """How Muon's work is shared: matrices cut by tensor or shard among the ranks that hold their
    parts, others among all that hold the same (nobody where replicated work is compared)."""
    if run.optim.name != "muon":
        return []
    is_replicated = run.data.placement == "replicate"
    shapes_by_group: dict[tuple[bool, tuple[str, ...]], list[tuple[int, ...]]] = {}
    for tensors in count_tensors(specs).rank_tensors(layout, ORIGIN, layer_ranges, "expert"):
        if tensors.spec.group != "matrices":
            continue
        axes = tuple(axis for axis, _ in tensors.spec.cuts(layout) if axis != "expert")
        is_sharded = bool(axes)
        axes = axes or (() if is_replicated else tensors.spec.replicated_axes(layout))
        shape = tensors.shape if tensors.spec.is_stacked else (1, *tensors.shape)
        shapes_by_group.setdefault((is_sharded, axes), []).extend([shape] * tensors.count)
    groups = []
    for (is_sharded, axes), shapes in shapes_by_group.items():
        ranks = math.prod(getattr(layout, axis) for axis in axes)
        flops, elements = max_rank_load(shapes, ranks)
        rank_matrices = -(-sum(shape[0] for shape in shapes) // ranks)
        groups.append(
            MuonGroup(
                axes, ranks, is_sharded, flops, elements, sum(map(math.prod, shapes)), rank_matrices
            )
        )
    return groups


def max_rank_load(shapes: Sequence[tuple[int, ...]], ranks: int) -> tuple[float, int]:
    """Stacks of matrices dealt dearest first to the least loaded (optim/muon.py, `deal`).

    Returns the most (operations, elements) that one rank gets.
    """
    heap = [(0.0, rank, 0) for rank in range(min(ranks, len(shapes)))]
    for shape in sorted(shapes, key=newton_schulz_flops, reverse=True):
        flops, rank, elements = heap[0]
        new_load = (flops + newton_schulz_flops(shape), rank, elements + math.prod(shape))
        heapq.heapreplace(heap, new_load)
    return max(load[0] for load in heap), max(load[2] for load in heap)


def newton_schulz_flops(shape: tuple[int, ...]) -> float:
    """Operations of Muon's orthogonalisation of a stack [matrices, rows, columns ...]: 5 times
    X Xt, its square and a product with X."""
    matrices, rows, columns = shape[0], shape[1], math.prod(shape[2:])
    short_side, long_side = min(rows, columns), max(rows, columns)
    return (
        matrices
        * MUON_ITERATIONS
        * (4.0 * short_side * short_side * long_side + 2.0 * short_side**3)
    )
