"""What layout tests share: runs of many layouts inside one launch, and their curves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cordee.begin import lay_out_data, settle
from cordee.build import RunState, build
from cordee.checkpoint.folders import folder_name
from cordee.checkpoint.load import open_checkpoint
from cordee.checkpoint.state import pieces, reader
from cordee.config.load import load
from cordee.config.run import Run
from cordee.dist.mesh import Mesh
from cordee.dist.start import World
from cordee.layout.stages import make_stages
from cordee.model.initial import initialise
from cordee.model.transformer import Transformer
from cordee.parallel.apply import Live, make_live
from cordee.parallel.shard import Sharding
from cordee.parts import Parts
from cordee.plan.cluster import local_cluster
from cordee.plan.plan import make_plan
from cordee.train import whole
from cordee.trial import step

DENSE = (
    "model.preset=micro", "model.layers=4", "model.width=32", "model.heads=4", "model.kv_heads=2",
    "data.path=builtin:markov", "data.tokens=60000", "data.sequence=32", "batch.microbatch=2",
    "batch.microbatches=8", "run.precision=fp32", "run.steps=100", "launch.threads=1",
    "initial.residual=depth_scaled", "initial.head=same",
)  # fmt: skip
"""A dense model on which every axis can be 2, and most can be 4."""


@dataclass(frozen=True)
class Curve:
    """What a layout did: losses, gradient norms, parameters at the end (whole, from rank 0)."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]


def plain_model(run: Run, vocabulary: int = 256) -> Transformer:
    """The run's transformer on one CPU, whole, initialised, as a loop by hand would have it."""
    model = Transformer(run.model, vocabulary)
    model.memory = run.memory
    initialise(model, run.initial, run.run.seed, run.model.layers)
    return model


def live_model(run: Run, mesh: Mesh, sharding: Sharding, vocabulary: int = 256) -> Live:
    """The run's model for the rank of `mesh`, on the CPU."""
    stages = make_stages(run.model, vocabulary, run.layout, mesh.layout.pipeline)
    return make_live(run, stages, mesh, vocabulary, "cpu", sharding)


def run_of(folder: str, *words: str) -> Run:
    """The settled run of these words, with its data laid out in `folder` by who comes first."""
    return settle(load(None, [*words, f"run.dir={folder}"]).run)


def live(world: World, folder: str, words: tuple[str, ...]) -> RunState:
    """A live run of all ranks of `world`."""
    run = run_of(folder, *words)
    for turn in (True, False):
        if world.first is turn:
            data = lay_out_data(run)
        if world.size > 1:
            torch.distributed.barrier()
    plan = make_plan(run, local_cluster(), data.vocabulary, world.size)
    return build(run, plan, world, data, Parts())


def curve(world: World, folder: str, words: tuple[str, ...], steps: int) -> Curve:
    """Steps 0 to `steps` of a fresh run."""
    state = live(world, folder, words)
    walked = [step(state, number) for number in range(steps)]
    losses, norms = ([float(pair[i]) for pair in walked] for i in range(2))
    return Curve(losses, norms, parameters(state))


def curves(world: World, folder: str, jobs: list[tuple[str, ...]], steps: int) -> list[Curve]:
    """One curve for each job, one after another in the same processes."""
    torch.manual_seed(0)
    found = [curve(world, folder, words, steps) for words in jobs]
    return found if world.first else []


def parameters(state: RunState) -> dict[str, Tensor]:
    """All parameters, whole (every rank must ask)."""
    with torch.no_grad():
        return {name: whole(state, name).clone() for name in state.specs}


def save(state: RunState, number: int) -> Path:
    """A checkpoint of this moment, complete when this returns on rank 0 and a barrier passed."""
    state.saver.begin(number, 1, pieces(state.held()), {})
    state.saver.join()
    torch.distributed.barrier()
    if state.world.first:
        assert state.saver.commit() is not None, state.saver.failure
    torch.distributed.barrier()
    state.saver.finish()
    return Path(state.run.run.dir) / "checkpoints" / folder_name(number, 1)


def restore(state: RunState, path: Path) -> None:
    """Parameters and optimiser state of a checkpoint."""
    mine = reader(open_checkpoint(path), state.places)
    with torch.no_grad():
        for name, tensor in state.tensors.items():
            tensor.copy_(mine(f"model/{name}"))
    state.optimizer.load(lambda key: mine(f"optim/{key}"))


def moved(
    world: World, folder: str, pairs: list[tuple[tuple[str, ...], tuple[str, ...]]]
) -> list[tuple[list[float], list[float]]]:
    """For each (A, B): five losses of A after its fifth step, and of B from A's checkpoint."""
    found = []
    for place, (before, after) in enumerate(pairs):
        home = f"{folder}/{place}"
        one = live(world, home, before)
        for number in range(5):
            step(one, number)
        path = save(one, 5)
        undisturbed = [step(one, number)[0] for number in range(5, 10)]
        other = live(world, home, after)
        restore(other, path)
        found.append((undisturbed, [step(other, number)[0] for number in range(5, 10)]))
    return found if world.first else []


def alone(run: Run) -> Run:
    """The same run without a layout."""
    return replace(run, layout=Run().layout)
