"""Layers to pipeline stages, balanced by cost, and stages to ranks.

Not here: when a stage computes what (torch.distributed.pipelining's schedules do). The embedding
belongs to the first stage, last norm and head to the last one. A rank has one stage, several in a
loop (interleaved), or two in a V (zero_bubble: the first and last stage meet on one rank).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cordee.config.model import ModelSettings
from cordee.config.run import LayoutSettings
from cordee.layout.tensors import tensors


@dataclass(frozen=True)
class Part:
    """The layers of one stage: [start, stop) blocks, and whether embedding or head are with them.

    `first` and `last` are the layers as tensors know them: -1 is the embedding's, the number of
    blocks the head's.
    """

    start: int
    stop: int
    embeds: bool
    heads: bool

    @property
    def first(self) -> int:
        """First layer, the embedding's included."""
        return -1 if self.embeds else self.start

    @property
    def last(self) -> int:
        """Last layer, the head's included."""
        return self.stop if self.heads else self.stop - 1


@dataclass(frozen=True)
class Stages:
    """`parts[s]` are the [start, stop) layers of stage s; `ranks` share them as `schedule` says."""

    parts: tuple[tuple[int, int], ...]
    ranks: int
    schedule: str

    @property
    def last(self) -> int:
        """Number of the last stage."""
        return len(self.parts) - 1

    def rank_of(self, stage: int) -> int:
        """The pipeline coordinate that computes `stage`."""
        if self.schedule == "zero_bubble" and self.ranks > 1:
            return min(stage, 2 * self.ranks - 1 - stage)
        return stage % self.ranks

    def of_rank(self, rank: int) -> list[int]:
        """Stages that the pipeline coordinate `rank` computes, in order."""
        return [stage for stage in range(len(self.parts)) if self.rank_of(stage) == rank]

    def held(self, rank: int) -> list[Part]:
        """What the pipeline coordinate `rank` holds, stage by stage."""
        return [Part(*self.parts[s], s == 0, s == self.last) for s in self.of_rank(rank)]

    def stage_of(self, layer: int) -> int:
        """The stage that holds block `layer`; -1 and the number of layers are the two ends."""
        if layer < 0:
            return 0
        inside = (s for s, (start, stop) in enumerate(self.parts) if start <= layer < stop)
        return next(inside, self.last)

    def home(self, layer: int) -> int:
        """The pipeline coordinate that holds block `layer`."""
        return self.rank_of(self.stage_of(layer))


def stage_count(settings: LayoutSettings, ranks: int) -> int:
    """Stages of a pipeline over `ranks`: one, `chunks` or two a rank, by the schedule."""
    if ranks == 1:
        return 1
    each = {"interleaved": settings.chunks, "zero_bubble": 2}.get(settings.schedule, 1)
    return ranks * each


def make_stages(
    model: ModelSettings, vocabulary: int, settings: LayoutSettings, ranks: int
) -> Stages:
    """The stages of a built-in model over `ranks` pipeline ranks (at most one stage a layer)."""
    if ranks == 1:
        return Stages(((0, model.layers),), 1, settings.schedule)
    blocks, head = layer_costs(model, vocabulary)
    ends = balance([*blocks[:-1], blocks[-1] + head], stage_count(settings, ranks))
    return Stages(tuple(ends), ranks, settings.schedule)


def layer_costs(model: ModelSettings, vocabulary: int) -> tuple[list[float], float]:
    """Multiplications per token of each block and of the head: weights that a token meets.

    Attention's own products are the same in every block and left out.
    """
    costs = [0.0] * model.layers
    for spec in tensors(model, vocabulary):
        if spec.group == "matrices":
            met = model.moe.active / model.moe.experts if spec.stacked else 1.0
            costs[spec.layer] += spec.elements * met
    return costs, float((model.vocabulary or vocabulary) * model.width)


def balance(costs: Sequence[float], parts: int) -> list[tuple[int, int]]:
    """Contiguous [start, stop) parts, none empty, whose dearest part is as cheap as can be.

    Exact: the least ceiling is among the sums of runs; found by bisection over them, then parts
    are filled greedily. Of equally good cuts the first parts are the longest.
    """
    low, high = max(costs), sum(costs)
    for _ in range(60):
        middle = (low + high) / 2
        if len(_fill(costs, middle, parts)) <= parts:
            high = middle
        else:
            low = middle
    return _fill(costs, high, parts)


def _fill(costs: Sequence[float], ceiling: float, parts: int) -> list[tuple[int, int]]:
    """Greedy parts of at most `ceiling`, leaving at least one item for each part to come."""
    found: list[tuple[int, int]] = []
    start = 0
    while start < len(costs):
        most = len(costs) - max(0, parts - len(found) - 1)
        stop, held = start + 1, costs[start]
        while stop < most and held + costs[stop] <= ceiling * (1 + 1e-12):
            held += costs[stop]
            stop += 1
        found.append((start, stop))
        start = stop
    return found
