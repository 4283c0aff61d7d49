"""What layout tests share: runs of many layouts inside one launch, and their curves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cordee.checkpoint.format import folder_name
from cordee.checkpoint.load import open_checkpoint
from cordee.checkpoint.train_state import parse_progress
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
from cordee.training.trainer import Trainer
from cordee.training.user_parts import Parts

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


def make_trainer(process: RankProcess, folder: str, overrides: tuple[str, ...]) -> Trainer:
    """A live run of all ranks of `process`, at a constant learning rate."""
    run = make_run(folder, *overrides)
    for is_first_turn in (True, False):
        if process.is_first is is_first_turn:
            data = prepare_dataset(run)
        if process.size > 1:
            torch.distributed.barrier()
    plan = make_plan(run, local_cluster(), data.vocabulary, process.size)
    return with_constant_lr(Trainer(run, plan, process, data, Parts()))


def with_constant_lr(trainer: Trainer) -> Trainer:
    """The trainer, at its peak rate from the first step on."""
    trainer.lr_schedule = lambda fraction, step: 1.0
    return trainer


def train_curve(process: RankProcess, folder: str, overrides: tuple[str, ...], steps: int) -> Curve:
    """Steps 0 to `steps` of a fresh run."""
    trainer = make_trainer(process, folder, overrides)
    results = [trainer.train_step() for _ in range(steps)]
    losses, norms = [r.loss for r in results], [r.grad_norm for r in results]
    return Curve(losses, norms, gather_parameters(trainer))


def train_curves(
    process: RankProcess, folder: str, jobs: list[tuple[str, ...]], steps: int
) -> list[Curve]:
    """One curve for each job, one after another in the same processes."""
    torch.manual_seed(0)
    all_curves = [train_curve(process, folder, overrides, steps) for overrides in jobs]
    return all_curves if process.is_first else []


def gather_parameters(trainer: Trainer) -> dict[str, Tensor]:
    """All parameters, whole (every rank must ask)."""
    with torch.no_grad():
        return {name: trainer.state.full_tensor(name).clone() for name in trainer.state.specs}


def save_checkpoint(trainer: Trainer) -> Path:
    """A checkpoint of this moment, complete when this returns."""
    assert trainer.save_checkpoint(), trainer.checkpointer.failure
    return trainer.folder / "checkpoints" / folder_name(trainer.progress.step, 0)


def restore_checkpoint(trainer: Trainer, path: Path) -> None:
    """Parameters, optimiser state and progress of a checkpoint."""
    checkpoint = open_checkpoint(path)
    trainer.state.load(checkpoint)
    trainer.set_progress(parse_progress(checkpoint.meta))


def resume_pairs(
    process: RankProcess, folder: str, pairs: list[tuple[tuple[str, ...], tuple[str, ...]]]
) -> list[tuple[list[float], list[float]]]:
    """For each (A, B): five losses of A after its fifth step, and of B from A's checkpoint."""
    results = []
    for index, (first_overrides, second_overrides) in enumerate(pairs):
        run_folder = f"{folder}/{index}"
        first_trainer = make_trainer(process, run_folder, first_overrides)
        for _ in range(5):
            first_trainer.train_step()
        path = save_checkpoint(first_trainer)
        reference_losses = [first_trainer.train_step().loss for _ in range(5)]
        second_trainer = make_trainer(process, run_folder, second_overrides)
        restore_checkpoint(second_trainer, path)
        results.append((reference_losses, [second_trainer.train_step().loss for _ in range(5)]))
    return results if process.is_first else []


def without_layout(run: Run) -> Run:
    """The same run without a layout."""
    return replace(run, layout=Run().layout)
