"""Layers to pipeline stages, balanced by cost, and stages to ranks.

The embedding belongs to the first stage, last norm and head to the last one. A rank has one stage,
several in a loop (interleaved), or two in a V (zero_bubble: first and last stage on one rank).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cordee.config.model import ModelSettings
from cordee.config.run import LayoutSettings
from cordee.layout.tensors import tensor_specs


@dataclass(frozen=True)
class LayerRange:
    """The layers of one stage: [start, stop) blocks, and whether embedding or head are with them.

    `first_layer` and `last_layer` are the layers as tensors know them: -1 is the embedding's, the
    number of blocks the head's.
    """

    start: int
    stop: int
    has_embedding: bool
    has_head: bool

    @property
    def first_layer(self) -> int:
        return -1 if self.has_embedding else self.start

    @property
    def last_layer(self) -> int:
        return self.stop if self.has_head else self.stop - 1


@dataclass(frozen=True)
class Stages:
    """`block_ranges[s]` are the [start, stop) layers of stage s, which `ranks` pipeline ranks share
    as `schedule` says."""

    block_ranges: tuple[tuple[int, int], ...]
    ranks: int
    schedule: str

    @property
    def last_stage(self) -> int:
        return len(self.block_ranges) - 1

    def rank_of(self, stage: int) -> int:
        """The pipeline coordinate that computes `stage`."""
        if self.schedule == "zero_bubble" and self.ranks > 1:
            return min(stage, 2 * self.ranks - 1 - stage)
        return stage % self.ranks

    def rank_stages(self, rank: int) -> list[int]:
        """Stages that the pipeline coordinate `rank` computes, in order."""
        return [stage for stage in range(len(self.block_ranges)) if self.rank_of(stage) == rank]

    def layer_ranges(self, rank: int) -> list[LayerRange]:
        """The layers of the pipeline coordinate `rank`, stage by stage."""
        return [
            LayerRange(*self.block_ranges[stage], stage == 0, stage == self.last_stage)
            for stage in self.rank_stages(rank)
        ]

    def stage_of(self, layer: int) -> int:
        """The stage that holds block `layer`; -1 and the number of layers are the two ends."""
        if layer < 0:
            return 0
        ranges = enumerate(self.block_ranges)
        stages = (stage for stage, (start, stop) in ranges if start <= layer < stop)
        return next(stages, self.last_stage)

    def rank_of_layer(self, layer: int) -> int:
        """The pipeline coordinate that holds block `layer`."""
        return self.rank_of(self.stage_of(layer))


def stage_count(settings: LayoutSettings, ranks: int) -> int:
    """Stages of a pipeline over `ranks`: one, `chunks` or two a rank, by the schedule."""
    if ranks == 1:
        return 1
    stages_per_rank = {"interleaved": settings.chunks, "zero_bubble": 2}.get(settings.schedule, 1)
    return ranks * stages_per_rank


def make_stages(
    model: ModelSettings, vocabulary: int, settings: LayoutSettings, ranks: int
) -> Stages:
    """The stages of a built-in model over `ranks` pipeline ranks (at most one stage a layer)."""
    if ranks == 1:
        return Stages(((0, model.layers),), 1, settings.schedule)
    costs, head_cost = layer_costs(model, vocabulary)
    costs[-1] += head_cost
    block_ranges = partition_costs(costs, stage_count(settings, ranks))
    return Stages(tuple(block_ranges), ranks, settings.schedule)


def layer_costs(model: ModelSettings, vocabulary: int) -> tuple[list[float], float]:
    """Multiplications per token of each block and of the head: weights that a token meets.

    Attention's own products are the same in every block and left out.
    """
    costs = [0.0] * model.layers
    for spec in tensor_specs(model, vocabulary):
        if spec.group == "matrices":
            active_share = model.moe.active / model.moe.experts if spec.is_stacked else 1.0
            costs[spec.layer] += spec.elements * active_share
    return costs, float((model.vocabulary or vocabulary) * model.width)


def partition_costs(costs: Sequence[float], count: int) -> list[tuple[int, int]]:
    """Contiguous [start, stop) parts, none empty, whose dearest part is as cheap as can be.

    Exact: the least ceiling is among the sums of runs; found by bisection over them, then parts
    are filled greedily. Of equally good cuts the first parts are the longest.
    """
    low_ceiling, high_ceiling = max(costs), sum(costs)
    for _ in range(60):
        middle = (low_ceiling + high_ceiling) / 2
        if len(_fill_greedily(costs, middle, count)) <= count:
            high_ceiling = middle
        else:
            low_ceiling = middle
    return _fill_greedily(costs, high_ceiling, count)


def _fill_greedily(costs: Sequence[float], ceiling: float, count: int) -> list[tuple[int, int]]:
    """Greedy parts of at most `ceiling`, leaving at least one item for each part to come."""
    ranges: list[tuple[int, int]] = []
    start = 0
    while start < len(costs):
        max_stop = len(costs) - max(0, count - len(ranges) - 1)
        stop, cost = start + 1, costs[start]
        while stop < max_stop and cost + costs[stop] <= ceiling * (1 + 1e-12):
            cost += costs[stop]
            stop += 1
        ranges.append((start, stop))
        start = stop
    return ranges
