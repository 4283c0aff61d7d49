"""Bytes on real processes: what ranks hold and send is what the tables say, to the byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cordee.build import RunState
from cordee.config.load import load
from cordee.dist.start import World
from cordee.layout.axes import Layout
from cordee.layout.stages import Stages
from cordee.layout.tensors import tensors
from cordee.model.moe import mixtures
from cordee.plan.memory import rank_state_bytes
from cordee.plan.wires import axis_bytes
from cordee.testing import launch
from cordee.trial import step
from tests.metal.layouts import DENSE, live
from tests.metal.test_layouts import TWO, words

VOCABULARY = 64
"""Tokens of builtin:markov."""

MOE = (
    "model.moe.experts=4", "model.moe.active=2", "model.moe.width=16", "model.moe.shared=1",
    "model.moe.dense_layers=1", "model.moe.balance=loss",
)  # fmt: skip
AGAIN = "memory.recompute=full"
AT_TWO = [
    *TWO,
    *((*words(tensor=2), lever) for lever in (AGAIN, "memory.loss_chunk=24", "model.dropout=0.1")),
    *((*words(context=2, attention=kind), AGAIN) for kind in ("gather", "ring")),
    *((*words(**{axis: 2}), "run.precision=bf16") for axis in ("tensor", "context", "pipeline")),
    *((*words(shard=2), lever) for lever in ("sync.protocol=exchange", "optim.name=adamw")),
    *((*words(shard=2, zero=zero), "run.precision=bf16") for zero in (2, 3)),
    (*words(shard=2, zero=3), "run.precision=fp16"),
    (*words(tensor=2), "optim.name=adamw", "model.mlp=gated"),
    (*words(tensor=2), *MOE), (*words(context=2), *MOE, AGAIN), (*words(shard=2), *MOE),
    (*words(expert=2), *MOE), (*words(expert=2), *MOE, AGAIN),
]  # fmt: skip
AT_FOUR = [
    words(tensor=2, shard=2), words(tensor=2, pipeline=2), words(tensor=2, context=2),
    words(context=2, shard=2, attention="ring"), words(pipeline=2, shard=2),
    words(pipeline=2, context=2, schedule="zero_bubble"), words(context=4),
    words(pipeline=4), words(islands=2, tensor=2), words(shard=4, zero=3),
    (*words(pipeline=2, schedule="interleaved", tensor=2), AGAIN, "memory.recompute_every=2"),
    (*words(tensor=2, context=2), *MOE), (*words(expert=4), *MOE),
    *((*words(**{"expert": 2, axis: 2}), *MOE) for axis in ("shard", "tensor", "context")),
]  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """What one rank held after a step, by item, what it sent in that step, by axis, and how many
    rows it had for every expert of every mixture."""

    layout: Layout
    stages: Stages
    zero: int
    held: dict[str, int]
    sent: dict[str, int]
    load: torch.Tensor


def count(world: World, folder: str, jobs: list[tuple[str, ...]]) -> list[Counted]:
    """Two steps of every job, of which the second is counted."""
    torch.set_num_threads(1)
    return [counted(live(world, folder, job)) for job in jobs]


def counted(state: RunState) -> Counted:
    step(state, 0)
    before = state.engine.bytes_sent
    step(state, 1)
    sent = {axis: now - before[axis] for axis, now in state.engine.bytes_sent.items()}
    loads = [moe.load for chunk in state.live.chunks for moe in mixtures(chunk)]
    load = torch.stack(loads) if loads else torch.zeros(0, 0)
    gradients = [p.grad for p in state.parameters.values() if p.grad is not None]
    # Rules count their steps in tensors without a dim; those are no part of a parameter.
    rule = [t for t in state.optimizer.tensors().values() if t.ndim]
    held = {
        "parameters": sum(p.nbytes for p in state.parameters.values()),
        "gradients": sum(g.nbytes for g in gradients),
        "optimiser": sum(t.nbytes for t in rule),
    }
    del gradients
    state.engine.begin(2, 1.0)
    left = [p.grad for p in (*state.parameters.values(), *state.live.modules().values())]
    assert not any(g is not None for g in left), "one step's gradients do not outlive the next"
    layout, zero = state.plan.layout, state.plan.zero
    sent = {axis: size for axis, size in sent.items() if size}
    return Counted(layout, state.live.stages, zero, held, sent, load)


def hold(folder: Path, jobs: list[tuple[str, ...]], ranks: int) -> None:
    """Every rank of every job holds and sends what paper says."""
    jobs = [(*DENSE, *job) for job in jobs]
    found = launch(count, str(folder), jobs, ranks=ranks, deadline_s=280)
    for place, job in enumerate(jobs):
        mine = [of_rank[place] for of_rank in found]
        for rank, seen in enumerate(mine):
            print(job[len(DENSE) :], "rank", rank)
            run, at = load(None, job).run, seen.layout.coordinates(rank)
            specs = tuple(tensors(run.model, VOCABULARY))
            told = rank_state_bytes(run, specs, seen.layout, seen.stages, at)
            assert seen.held == told
            told = axis_bytes(run, specs, seen.layout, seen.stages, at, seen.zero)
            if seen.layout.expert > 1:
                planned, sent = told.pop("expert"), seen.sent.pop("expert")
                assert sent == routed_bytes(mine, rank, run.memory.recompute == "full")
                assert sent == pytest.approx(planned, rel=0.3), "routing is near balanced"
            assert seen.sent == told


def routed_bytes(seen: list[Counted], rank: int, twice: bool) -> int:
    """Bytes on the axis expert by what was routed: a rank's rows for experts elsewhere, and the
    others' rows for its own on their way back; forward and backward, and the counts."""
    layout = seen[rank].layout
    at = layout.coordinates(rank)
    each = seen[rank].load.shape[1] // layout.expert
    rows = 0
    for other in range(layout.expert):
        if other != at["expert"]:
            theirs = seen[layout.rank({**at, "expert": other})].load
            rows += int(seen[rank].load[:, other * each : (other + 1) * each].sum())
            rows += int(theirs[:, at["expert"] * each : (at["expert"] + 1) * each].sum())
    microbatches, mixed = 8 // layout.workers, len(seen[rank].load)
    counts = 8 * each * (layout.expert - 1) * microbatches * mixed
    return (2 + twice) * rows * 32 * 4 + (1 + twice) * counts


def test_two_ranks(tmp_path: Path) -> None:
    hold(tmp_path, AT_TWO, 2)


def test_four_ranks(tmp_path: Path) -> None:
    hold(tmp_path, AT_FOUR, 4)
