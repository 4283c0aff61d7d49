"""One rank of a plan: where it stands, what it holds and what it sends, from the tables alone.

What `cordee plan --dry-run --rank R` prints, and what building that rank's modules is held against.
Not here: the modules (`parallel/`), text (`report.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cordee.config.run import Run
from cordee.layout.axes import AXES
from cordee.layout.counts import TensorSpecs, count_tensors
from cordee.layout.stages import Stages
from cordee.planner.memory import rank_state_bytes
from cordee.planner.plan import Plan
from cordee.planner.traffic import axis_bytes


@dataclass(frozen=True, kw_only=True)
class RankView:
    """Rank `rank` of `rank_coordinates`. `layers` are [start, stop) blocks of each of its stages;
    `inspect_groups` the ranks that differ from it along one axis; `sent_bytes` of a step by
    axis."""

    rank: int
    ranks: int
    coordinates: Mapping[str, int]
    stages: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]
    worker: int
    microbatches: tuple[int, int]
    groups: Mapping[str, tuple[int, ...]]
    tensors: int
    parameters: int
    model_parameters: int
    state_bytes: Mapping[str, int]
    sent_bytes: Mapping[str, int]


def view_rank(run: Run, plan: Plan, rank: int, specs: TensorSpecs) -> RankView:
    """Rank `rank` of `plan`; LayoutError when there is no such rank."""
    tensor_counts, layout = count_tensors(specs), plan.layout
    coords = layout.coordinates(rank)
    stages = Stages(plan.stages, layout.pipeline, run.layout.schedule)
    rank_tensors = list(
        tensor_counts.rank_tensors(layout, coords, stages.layer_ranges(coords["pipeline"]))
    )
    dp_rank = layout.dp_rank(rank)
    return RankView(
        rank=rank,
        ranks=layout.size,
        coordinates=coords,
        stages=tuple(stages.rank_stages(coords["pipeline"])),
        layers=tuple(plan.stages[stage] for stage in stages.rank_stages(coords["pipeline"])),
        worker=dp_rank,
        microbatches=plan.splits[dp_rank],
        groups={
            axis: tuple(layout.rank({**coords, axis: i}) for i in range(getattr(layout, axis)))
            for axis in AXES
            if getattr(layout, axis) > 1
        },
        tensors=sum(tensors.count for tensors in rank_tensors if tensors.elements),
        parameters=sum(tensors.elements for tensors in rank_tensors),
        model_parameters=tensor_counts.parameters,
        state_bytes=rank_state_bytes(run, tensor_counts, layout, stages, coords),
        sent_bytes=axis_bytes(run, tensor_counts, layout, stages, coords, plan.zero),
    )
