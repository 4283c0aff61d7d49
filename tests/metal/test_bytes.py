"""Bytes on real processes: what ranks hold and send is what the tables say, to the byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cordee.config.load import load
from cordee.dist.process_group import RankProcess
from cordee.launcher.run_ranks import launch
from cordee.layout.axes import Layout
from cordee.layout.stages import Stages
from cordee.layout.tensors import tensor_specs
from cordee.model.moe import moe_layers
from cordee.planner.memory import rank_state_bytes
from cordee.planner.traffic import axis_bytes
from cordee.training.trainer import Trainer
from tests.metal.layouts import DENSE, make_trainer
from tests.metal.test_layouts import LAYOUTS_OF_TWO, layout_overrides

VOCABULARY = 64
"""Tokens of builtin:markov."""

MOE = (
    "model.moe.experts=4", "model.moe.active=2", "model.moe.width=16", "model.moe.shared=1",
    "model.moe.dense_layers=1", "model.moe.balance=loss",
)  # fmt: skip
RECOMPUTE = "memory.recompute=full"
JOBS_OF_TWO = [
    *LAYOUTS_OF_TWO,
    *(
        (*layout_overrides(tensor=2), lever)
        for lever in (RECOMPUTE, "memory.loss_chunk=24", "model.dropout=0.1")
    ),
    *((*layout_overrides(context=2, attention=kind), RECOMPUTE) for kind in ("gather", "ring")),
    *(
        (*layout_overrides(**{axis: 2}), "run.precision=bf16")
        for axis in ("tensor", "context", "pipeline")
    ),
    *(
        (*layout_overrides(shard=2), lever)
        for lever in ("sync.protocol=exchange", "optim.name=adamw")
    ),
    *((*layout_overrides(shard=2, zero=zero), "run.precision=bf16") for zero in (2, 3)),
    (*layout_overrides(shard=2, zero=3), "run.precision=fp16"),
    (*layout_overrides(tensor=2), "optim.name=adamw", "model.mlp=gated"),
    (*layout_overrides(tensor=2), *MOE),
    (*layout_overrides(context=2), *MOE, RECOMPUTE),
    (*layout_overrides(shard=2), *MOE),
    (*layout_overrides(expert=2), *MOE),
    (*layout_overrides(expert=2), *MOE, RECOMPUTE),
]
JOBS_OF_FOUR = [
    layout_overrides(tensor=2, shard=2),
    layout_overrides(tensor=2, pipeline=2),
    layout_overrides(tensor=2, context=2),
    layout_overrides(context=2, shard=2, attention="ring"),
    layout_overrides(pipeline=2, shard=2),
    layout_overrides(pipeline=2, context=2, schedule="zero_bubble"),
    layout_overrides(context=4),
    layout_overrides(pipeline=4),
    layout_overrides(islands=2, tensor=2),
    layout_overrides(shard=4, zero=3),
    (
        *layout_overrides(pipeline=2, schedule="interleaved", tensor=2),
        RECOMPUTE,
        "memory.recompute_every=2",
    ),
    (*layout_overrides(tensor=2, context=2), *MOE),
    (*layout_overrides(expert=4), *MOE),
    *(
        (*layout_overrides(**{"expert": 2, axis: 2}), *MOE)
        for axis in ("shard", "tensor", "context")
    ),
]


@dataclass(frozen=True)
class RankBytes:
    """What one rank held after a step, by item, what it sent in that step, by axis, and how many
    rows it had for every expert of every mixture."""

    layout: Layout
    stages: Stages
    zero: int
    held_bytes: dict[str, int]
    sent_bytes: dict[str, int]
    expert_load: torch.Tensor


def count_jobs(process: RankProcess, folder: str, jobs: list[tuple[str, ...]]) -> list[RankBytes]:
    """Two steps of every job, of which the second is counted."""
    torch.set_num_threads(1)
    return [count_bytes(make_trainer(process, folder, job)) for job in jobs]


def count_bytes(trainer: Trainer) -> RankBytes:
    trainer.train_step()
    bytes_before = trainer.engine.bytes_sent
    trainer.train_step()
    sent_bytes = {
        axis: total_bytes - bytes_before[axis]
        for axis, total_bytes in trainer.engine.bytes_sent.items()
    }
    loads = [moe.expert_load for chunk in trainer.model.stage_modules for moe in moe_layers(chunk)]
    expert_load = torch.stack(loads) if loads else torch.zeros(0, 0)
    gradients = [p.grad for p in trainer.parameters.values() if p.grad is not None]
    # Rules count their steps in tensors without a dim; those are no part of a parameter.
    optimizer_state = [t for t in trainer.optimizer.state_tensors().values() if t.ndim]
    held_bytes = {
        "parameters": sum(p.nbytes for p in trainer.parameters.values()),
        "gradients": sum(g.nbytes for g in gradients),
        "optimiser": sum(t.nbytes for t in optimizer_state),
    }
    del gradients
    trainer.engine.begin_step(2, 1.0)
    remaining_grads = [
        p.grad for p in (*trainer.parameters.values(), *trainer.model.module_parameters().values())
    ]
    assert not any(g is not None for g in remaining_grads), (
        "one step's gradients do not outlive the next"
    )
    layout, zero = trainer.plan.layout, trainer.plan.zero
    sent_bytes = {axis: size for axis, size in sent_bytes.items() if size}
    return RankBytes(layout, trainer.model.stages, zero, held_bytes, sent_bytes, expert_load)


def check_bytes(folder: Path, jobs: list[tuple[str, ...]], ranks: int) -> None:
    """Every rank of every job holds and sends what paper says."""
    jobs = [(*DENSE, *job) for job in jobs]
    results_by_rank = launch(count_jobs, str(folder), jobs, ranks=ranks, deadline_s=280)
    for job_index, job in enumerate(jobs):
        rank_results = [results[job_index] for results in results_by_rank]
        for rank, rank_bytes in enumerate(rank_results):
            print(job[len(DENSE) :], "rank", rank)
            run, coords = load(None, job).run, rank_bytes.layout.coordinates(rank)
            specs = tuple(tensor_specs(run.model, VOCABULARY))
            planned_bytes = rank_state_bytes(
                run, specs, rank_bytes.layout, rank_bytes.stages, coords
            )
            assert rank_bytes.held_bytes == planned_bytes
            planned_bytes = axis_bytes(
                run, specs, rank_bytes.layout, rank_bytes.stages, coords, rank_bytes.zero
            )
            if rank_bytes.layout.expert > 1:
                planned_expert, sent_expert = (
                    planned_bytes.pop("expert"),
                    rank_bytes.sent_bytes.pop("expert"),
                )
                assert sent_expert == routed_bytes(
                    rank_results, rank, run.memory.recompute == "full"
                )
                assert sent_expert == pytest.approx(planned_expert, rel=0.3), (
                    "routing is near balanced"
                )
            assert rank_bytes.sent_bytes == planned_bytes


def routed_bytes(rank_results: list[RankBytes], rank: int, is_recomputed: bool) -> int:
    """Bytes on the axis expert by what was routed: a rank's rows for experts elsewhere, and the
    others' rows for its own on their way back; forward and backward, and the counts."""
    layout = rank_results[rank].layout
    coords = layout.coordinates(rank)
    experts_per_rank = rank_results[rank].expert_load.shape[1] // layout.expert
    rows = 0
    for other in range(layout.expert):
        if other != coords["expert"]:
            other_load = rank_results[layout.rank({**coords, "expert": other})].expert_load
            rows += int(
                rank_results[rank]
                .expert_load[:, other * experts_per_rank : (other + 1) * experts_per_rank]
                .sum()
            )
            rows += int(
                other_load[
                    :,
                    coords["expert"] * experts_per_rank : (coords["expert"] + 1) * experts_per_rank,
                ].sum()
            )
    microbatches, moe_count = 8 // layout.dp_size, len(rank_results[rank].expert_load)
    counts = 8 * experts_per_rank * (layout.expert - 1) * microbatches * moe_count
    return (2 + is_recomputed) * rows * 32 * 4 + (1 + is_recomputed) * counts


def test_two_ranks(tmp_path: Path) -> None:
    check_bytes(tmp_path, JOBS_OF_TWO, 2)


def test_four_ranks(tmp_path: Path) -> None:
    check_bytes(tmp_path, JOBS_OF_FOUR, 4)
