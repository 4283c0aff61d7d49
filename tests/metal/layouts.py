"""What layout tests share: runs of many layouts inside one launch, and their curves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cordee.checkpoint.checkpointer import Checkpointer
from cordee.checkpoint.format import folder_name
from cordee.checkpoint.load import open_checkpoint
from cordee.checkpoint.train_state import make_reader, select_pieces
from cordee.config.load import load
from cordee.config.run import Run
from cordee.dist.mesh import Mesh
from cordee.dist.process_group import RankProcess
from cordee.launcher.prepare import prepare_dataset, resolve_config
from cordee.layout.stages import make_stages
from cordee.model.init_weights import init_weights
from cordee.model.transformer import Transformer
from cordee.parallel.fsdp import Sharding
from cordee.parallel.parallelize import LocalModel, make_local_model
from cordee.planner.cluster import local_cluster
from cordee.planner.plan import make_plan
from cordee.training.build import RunState, build_run_state
from cordee.training.lr_trial import trial_step
from cordee.training.user_parts import Parts
from cordee.training.worker import full_tensor

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


def build_full_model(run: Run, vocabulary: int = 256) -> Transformer:
    """The run's transformer on one CPU, whole, initialised, as a loop by hand would have it."""
    model = Transformer(run.model, vocabulary)
    model.memory = run.memory
    init_weights(model, run.initial, run.run.seed, run.model.layers)
    return model


def build_local_model(
    run: Run, mesh: Mesh, sharding: Sharding, vocabulary: int = 256
) -> LocalModel:
    """The run's model for the rank of `mesh`, on the CPU."""
    stages = make_stages(run.model, vocabulary, run.layout, mesh.layout.pipeline)
    return make_local_model(run, stages, mesh, vocabulary, "cpu", sharding)


def make_run(folder: str, *overrides: str) -> Run:
    """The settled run of these words, with its data laid out in `folder` by who comes first."""
    return resolve_config(load(None, [*overrides, f"run.dir={folder}"]).run)


def make_run_state(process: RankProcess, folder: str, overrides: tuple[str, ...]) -> RunState:
    """A live run of all ranks of `process`."""
    run = make_run(folder, *overrides)
    for is_first_turn in (True, False):
        if process.is_first is is_first_turn:
            data = prepare_dataset(run)
        if process.size > 1:
            torch.distributed.barrier()
    plan = make_plan(run, local_cluster(), data.vocabulary, process.size)
    return build_run_state(run, plan, process, data, Parts())


def train_curve(process: RankProcess, folder: str, overrides: tuple[str, ...], steps: int) -> Curve:
    """Steps 0 to `steps` of a fresh run."""
    state = make_run_state(process, folder, overrides)
    step_results = [trial_step(state, step_number) for step_number in range(steps)]
    losses, norms = ([float(pair[i]) for pair in step_results] for i in range(2))
    return Curve(losses, norms, gather_parameters(state))


def train_curves(
    process: RankProcess, folder: str, jobs: list[tuple[str, ...]], steps: int
) -> list[Curve]:
    """One curve for each job, one after another in the same processes."""
    torch.manual_seed(0)
    all_curves = [train_curve(process, folder, overrides, steps) for overrides in jobs]
    return all_curves if process.is_first else []


def gather_parameters(state: RunState) -> dict[str, Tensor]:
    """All parameters, whole (every rank must ask)."""
    with torch.no_grad():
        return {name: full_tensor(state, name).clone() for name in state.specs}


def save_checkpoint(state: RunState, step_number: int) -> Path:
    """A checkpoint of this moment, complete when this returns on rank 0 and a barrier passed."""
    folder, process = Path(state.run.run.dir) / "checkpoints", state.process
    checkpointer = Checkpointer(folder, process.rank, process.size, 2, state.drill.fault_point)
    checkpointer.begin(step_number, 1, select_pieces(state.state_tensors()), {})
    checkpointer.join()
    torch.distributed.barrier()
    if state.process.is_first:
        assert checkpointer.commit() is not None, checkpointer.failure
    torch.distributed.barrier()
    checkpointer.finish()
    return folder / folder_name(step_number, 1)


def restore_checkpoint(state: RunState, path: Path) -> None:
    """Parameters and optimiser state of a checkpoint."""
    read_local = make_reader(open_checkpoint(path), state.local_slices)
    with torch.no_grad():
        for name, tensor in state.model_tensors.items():
            tensor.copy_(read_local(f"model/{name}"))
    state.optimizer.load_state(lambda key: read_local(f"optim/{key}"))


def resume_pairs(
    process: RankProcess, folder: str, pairs: list[tuple[tuple[str, ...], tuple[str, ...]]]
) -> list[tuple[list[float], list[float]]]:
    """For each (A, B): five losses of A after its fifth step, and of B from A's checkpoint."""
    results = []
    for index, (first_overrides, second_overrides) in enumerate(pairs):
        run_folder = f"{folder}/{index}"
        first_state = make_run_state(process, run_folder, first_overrides)
        for step_number in range(5):
            trial_step(first_state, step_number)
        path = save_checkpoint(first_state, 5)
        reference_losses = [trial_step(first_state, step_number)[0] for step_number in range(5, 10)]
        second_state = make_run_state(process, run_folder, second_overrides)
        restore_checkpoint(second_state, path)
        results.append(
            (
                reference_losses,
                [trial_step(second_state, step_number)[0] for step_number in range(5, 10)],
            )
        )
    return results if process.is_first else []


def without_layout(run: Run) -> Run:
    """The same run without a layout."""
    return replace(run, layout=Run().layout)
