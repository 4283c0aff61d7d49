"""Models that are not the built-in transformer: of transformers, or a caller's own module.

A model of transformers is built like the built-in one. A caller's module is sharded as it is. Both
are tried before training on one batch: the model over ranks must have the loss of the whole one,
and a small step must change parameters and loss of both alike. That finds what raises no error: a
library that keeps stale tensors, a hook in the wrong place.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cordee.config.run import Run
from cordee.dist.autograd_collectives import AxisComm
from cordee.dist.mesh import Mesh
from cordee.errors import ConfigError, LayoutError, RunError
from cordee.hf.keras import KerasModel
from cordee.hf.model import HubModel, empty_model, read_hub
from cordee.layout.axes import MODEL_AXES
from cordee.layout.stages import Stages
from cordee.layout.tensors import TensorSpec, parameter_group
from cordee.model.init_weights import seeded_rng
from cordee.model.layers import SequenceShard, autocast_dtype
from cordee.parallel.engine import Batch, Engine
from cordee.parallel.fsdp import Sharding, apply_fsdp, local_tensor, reshard
from cordee.parallel.hf_tensor_parallel import check_hf_layout, set_tensor_parallel
from cordee.parallel.parallelize import (
    LocalModel,
    LossFunction,
    allocate_parameters,
    make_comms,
    model_blocks,
    persistent_buffers,
    shrink_parameters,
    wrap_blocks,
)

ONE_STAGE = Stages(((0, 1),), 1, "gpipe")
PROBE_LR = 1e-3
"""Learning rate of the probe's step of plain SGD."""

MAX_FULL_MODEL_BYTES = 1 << 30
"""Largest model (parameters, fp32) that every rank builds whole to compare with."""

LOSS_TOLERANCE = 1e-5
"""Largest relative difference of two losses that are one in exact arithmetic, in fp32."""


def make_hf_model(
    run: Run, mesh: Mesh, vocabulary: int, device: str, sharding: Sharding
) -> LocalModel:
    """The model of the folder run.model.hub, cut by its own tensor-parallel plan, with values."""
    hub = read_hub(run.model.hub)
    all_specs = {spec.name: spec for spec in hub.specs()}
    check_hf_layout(hub, all_specs, mesh.layout)
    if hub.vocabulary < vocabulary:
        raise ConfigError(
            "the data has more symbols than the model's vocabulary",
            values={"model.hub": run.model.hub, "model": hub.vocabulary, "data": vocabulary},
            fix="data of that vocabulary (cordee data prepare)",
        )
    comms = make_comms(mesh)
    model = HubModel(hub)
    model.memory = run.memory
    model.autocast = autocast_dtype(run.run.precision)
    shrink_parameters(model, all_specs, mesh)
    model.tie_weights()
    set_tensor_parallel(model, comms["tensor"])
    wrap_blocks(model, all_specs, mesh, run, sharding, comms["shard"])
    allocate_parameters(model, device, sharding)
    model.tie_weights()
    model.reset_buffers()
    weight_reader = hub.initial_values(run.run.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local_tensor(parameter).copy_(
                weight_reader(name, all_specs[name].box(mesh.layout, mesh.coords))
            )
    specs = {name: all_specs[name] for name, _ in model.named_parameters()}
    return LocalModel(
        [model], specs, all_specs, make_buffer_specs(model), comms, ONE_STAGE, SequenceShard(),
        takes_dropout_key=hub.has_dropout,
    )  # fmt: skip


def wrap_user_module(
    model: nn.Module,
    loss_function: LossFunction | None,
    run: Run,
    mesh: Mesh,
    device: str,
    sharding: Sharding,
) -> LocalModel:
    """A caller's module, whole on each rank or sharded; it keeps its values."""
    if isinstance(model, KerasModel):
        model.check_layout(mesh.layout, run.run.exact)
    model.to(device)
    all_specs = {
        name: TensorSpec(name, tuple(parameter.shape), parameter_group(name, parameter.ndim))
        for name, parameter in model.named_parameters()
    }
    comms = make_comms(mesh)
    if mesh.shard_mesh is not None:
        # The caller's code may rely on fp32 parameters: they are gathered in their own type.
        module_sharding = replace(sharding, dtype=None)
        apply_fsdp(model, mesh.shard_mesh, model_blocks(model), {}, module_sharding, comms["shard"])
    return LocalModel(
        [model], all_specs, all_specs, make_buffer_specs(model), comms, ONE_STAGE, SequenceShard(),
        loss_function=loss_function, is_user_module=True,
    )  # fmt: skip


def make_buffer_specs(model: nn.Module) -> dict[str, TensorSpec]:
    """Buffers of a model's state, whole on every rank."""
    return {
        name: TensorSpec(name, tuple(buffer.shape), "buffers", shard=None)
        for name, buffer in persistent_buffers(model).items()
    }


def copy_full_model(model: nn.Module) -> nn.Module | None:
    """A copy from before the model is sharded, for the probe; None when it is too large."""
    size_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return copy.deepcopy(model) if size_bytes <= MAX_FULL_MODEL_BYTES else None


def make_full_hf_model(run: Run, device: str) -> nn.Module | None:
    """The model of run.model.hub, uncut, for the probe; None when it is too large."""
    hub = read_hub(run.model.hub)
    if sum(4 * spec.elements for spec in hub.specs()) > MAX_FULL_MODEL_BYTES:
        return None
    model = empty_model(hub, device)
    model.autocast = autocast_dtype(run.run.precision)
    weight_reader = hub.initial_values(run.run.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight_reader(name, tuple((0, size) for size in parameter.shape)))
    return model


def check_equivalence(engine: Engine, full_model: nn.Module | None, run: Run) -> None:
    """Compares the model over ranks with `full_model` on the run's first microbatch; RunError when
    they differ, LayoutError when an exact run's forward moves buffers."""
    engine.loader.begin(0, range(1))
    batch = engine.load_batch(0, 0)
    model, mesh = engine.local_model.stage_modules[0], engine.mesh
    has_full_gradients = engine.is_sharded and engine.step_spec.sharding.canonical
    # The probe's forwards must leave no trace in BatchNorm's statistics and the like.
    old_buffers = {name: buffer.clone() for name, buffer in engine.buffers.items()}
    if run.run.exact and mesh.layout.size > 1:
        _check_buffers_fixed(engine, model, batch)

    def step() -> None:
        _probe_backward(engine, model, batch)
        if has_full_gradients:
            gradients = engine.set_gradients(engine.pop_full_gradients())
        else:
            # Every shard sees the same batch, and FSDP2 adds their gradients up.
            gradients = engine.reduce_in_island()[0][1]
            torch._foreach_div_(gradients, float(mesh.size("shard")))
        sgd_step(list(engine.parameters.values()), gradients, PROBE_LR)

    local_probe = ModelProbe(functools.partial(_probe_loss, engine, model, batch), step)
    comm = AxisComm(mesh.group(*MODEL_AXES), mesh.size(*MODEL_AXES), mesh.index(*MODEL_AXES))
    full_probe = None if full_model is None else _make_full_probe(engine, full_model, batch)
    tolerance = 1e-5 if run.run.precision == "fp32" else 2e-2
    compare_probes(local_probe, list(engine.parameters.values()), comm, full_probe, tolerance)
    for name, buffer in engine.buffers.items():
        buffer.copy_(old_buffers[name])


def _check_buffers_fixed(engine: Engine, model: nn.Module, batch: Batch) -> None:
    """LayoutError when a training forward moves buffers: the result would depend on which rank
    computes which microbatch."""
    old_buffers = {name: buffer.clone() for name, buffer in engine.buffers.items()}
    model.train()
    with torch.no_grad(), seeded_rng(0, engine.device):
        engine.call_model(model, batch)
    reshard(model)
    changed_names = [
        name
        for name, old_value in old_buffers.items()
        if not torch.equal(old_value, engine.buffers[name])
    ]
    for name in changed_names:
        engine.buffers[name].copy_(old_buffers[name])
    if changed_names:
        raise LayoutError(
            "states that a forward moves (BatchNorm's) depend on which rank computes what",
            values={
                "run.exact": True,
                "moved": changed_names[:3],
                "ranks": engine.mesh.layout.size,
            },
            fix="run.exact=false, or one process, or a model without them",
        )


def _make_full_probe(engine: Engine, full_model: nn.Module, batch: Batch) -> ModelProbe:
    parameters = list(full_model.parameters())

    def step() -> None:
        _probe_backward(engine, full_model, batch)
        sgd_step(parameters, [p.grad for p in parameters], PROBE_LR)
        full_model.zero_grad()

    return ModelProbe(functools.partial(_probe_loss, engine, full_model, batch), step)


def _probe_loss(engine: Engine, model: nn.Module, batch: Batch) -> Tensor:
    model.eval()
    with torch.no_grad():
        loss = engine.call_model(model, batch) / engine.step_spec.step_tokens
    reshard(model)
    return loss


def _probe_backward(engine: Engine, model: nn.Module, batch: Batch) -> None:
    model.eval()
    torch.autograd.backward(engine.call_model(model, batch) / engine.step_spec.step_tokens)


# ---- comparing two models, whatever they are ----


@dataclass(frozen=True)
class ModelProbe:
    """`loss()` is the model's loss of the probe's batch, the same batch on every rank; `step()` is
    its backward and one step of plain SGD on complete gradients.

    Both leave parameters sharded (`fsdp.reshard`): after a forward without a backward FSDP2 keeps
    the root's gathered, and an optimiser made then would hold the wrong tensors.
    """

    loss: Callable[[], Tensor]
    step: Callable[[], object]


def compare_probes(
    local_probe: ModelProbe,
    parameters: Sequence[Tensor],
    comm: AxisComm,
    full_probe: ModelProbe | None = None,
    tolerance: float = LOSS_TOLERANCE,
) -> None:
    """RunError on every rank of `comm` when the two models' losses differ, before or after a step.

    `parameters` are this rank's parts of the parameters, which `local_probe.step` changes; they are
    restored bit for bit. `full_probe` is None where the whole model is too large.
    """
    old_values = [parameter.detach().clone() for parameter in parameters]
    try:
        loss_before = _loss_value(local_probe.loss)
        if _any_rank(not math.isfinite(loss_before), comm):
            raise RunError(
                "the loss of the run's first microbatch is not finite",
                values={"loss": loss_before},
                fix="look for NaN and infinities in the data, in the parameters and in the loss",
            )
        if full_probe is not None:
            _check_same("the cut model's loss is not that of the whole one",
                  loss_before, _loss_value(full_probe.loss), comm, tolerance)  # fmt: skip
        local_probe.step()
        has_moved = any(
            not torch.equal(a, b.detach()) for a, b in zip(old_values, parameters, strict=True)
        )
        loss_after = _loss_value(local_probe.loss)
        if full_probe is not None:
            full_probe.step()
            _check_same("a step does not move the cut model as it moves the whole one",
                  loss_after, _loss_value(full_probe.loss), comm, tolerance)  # fmt: skip
        if _any_rank(not has_moved, comm):
            raise RunError(
                "a step of the wrapped model changes no parameter on some rank",
                values={"this rank's changed": has_moved},
                fix="layout.shard=1, or another way to wrap the model",
            )
        if _any_rank(loss_before == loss_after, comm):
            raise RunError(
                "a step changes the parameters but not the loss: the model reads stale tensors",
                values={"loss": loss_before},
                fix="layout.shard=1, or a module whose forward reads its own parameters",
            )
    finally:
        with torch.no_grad():
            for parameter, old_value in zip(parameters, old_values, strict=True):
                parameter.copy_(old_value)


def sgd_step(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], lr: float) -> None:
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(gradient.to(parameter.dtype), alpha=lr)


def _loss_value(loss: Callable[[], Tensor]) -> float:
    return float(loss().detach())


def _check_same(
    message: str, local_loss: float, full_loss: float, comm: AxisComm, tolerance: float
) -> None:
    # Written so that a NaN on either side counts as a difference.
    differs = not abs(local_loss - full_loss) <= tolerance * abs(full_loss)
    if _any_rank(differs, comm):
        raise RunError(
            message,
            values={"cut": local_loss, "whole": full_loss, "tolerance": tolerance},
            fix="all degrees of layout at 1 for this model",
        )


def _any_rank(condition: bool, comm: AxisComm) -> bool:
    """Collective."""
    return bool(comm.max_no_grad(torch.tensor(float(condition))))
