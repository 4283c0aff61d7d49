"""Models that are not the house's own: of transformers, or brought by a caller; and their guard.

A model of transformers is built like the house's (meta, narrowed, seams by its own plan, shards,
values). A module that a caller brings is sharded as it is. Both are tried before training
(`probe.py`): the cut model must do what the whole one does.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from cordee.config.run import Run
from cordee.dist.autograd_collectives import AxisComm
from cordee.dist.mesh import Mesh
from cordee.errors import ConfigError, LayoutError
from cordee.hf.keras import KerasModel
from cordee.hf.model import HubModel, empty_model, read_hub
from cordee.layout.axes import MODEL_AXES
from cordee.layout.stages import Stages
from cordee.layout.tensors import TensorSpec, parameter_group
from cordee.model.init_weights import seeded_rng
from cordee.model.precision import autocast_dtype
from cordee.model.sequence_shard import SequenceShard
from cordee.parallel.engine import Batch, Engine
from cordee.parallel.equivalence import MAX_FULL_MODEL_BYTES, ModelProbe, compare_probes, sgd_step
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


def make_hf_model(
    run: Run, mesh: Mesh, vocabulary: int, device: str, sharding: Sharding
) -> LocalModel:
    """The model of the folder run.model.hub, cut by its own plan, with its values."""
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
    persistent_specs = make_buffer_specs(model)
    return LocalModel(
        [model],
        specs,
        all_specs,
        persistent_specs,
        comms,
        ONE_STAGE,
        SequenceShard(),
        takes_dropout_key=hub.has_dropout,
    )


def wrap_user_module(
    model: nn.Module,
    loss_function: LossFunction | None,
    run: Run,
    mesh: Mesh,
    device: str,
    sharding: Sharding,
) -> LocalModel:
    """A module that the caller brings, whole on each rank or sharded; its values stay."""
    if isinstance(model, KerasModel):
        model.check_layout(mesh.layout, run.run.exact)
    model.to(device)
    all_specs = {
        name: TensorSpec(name, tuple(parameter.shape), parameter_group(name, parameter.ndim))
        for name, parameter in model.named_parameters()
    }
    persistent_specs = make_buffer_specs(model)
    comms = make_comms(mesh)
    if mesh.shard_mesh is not None:
        # The caller's code may count on fp32 parameters: shards gather what it brought.
        module_sharding = replace(sharding, dtype=None)
        apply_fsdp(model, mesh.shard_mesh, model_blocks(model), {}, module_sharding, comms["shard"])
    sequence_shard = SequenceShard()
    return LocalModel(
        [model],
        all_specs,
        all_specs,
        persistent_specs,
        comms,
        ONE_STAGE,
        sequence_shard,
        loss_function=loss_function,
        is_user_module=True,
    )


def make_buffer_specs(model: nn.Module) -> dict[str, TensorSpec]:
    """Buffers of a model's state, whole on every rank."""
    model_buffers = persistent_buffers(model)
    return {
        name: TensorSpec(name, tuple(buffer.shape), "buffers", shard=None)
        for name, buffer in model_buffers.items()
    }


def copy_full_model(model: nn.Module) -> nn.Module | None:
    """The model as it is before it is cut, for the probe; None when it is too large."""
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
    """Tries the live model on the run's first microbatch; RunError when it is not the whole one."""
    engine.loader.begin(0, range(1))
    batch = engine.load_batch(0, 0)
    model, mesh = engine.local_model.stage_modules[0], engine.mesh
    has_full_gradients = engine.is_sharded and engine.step_spec.sharding.canonical
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
    """LayoutError when a forward of training moves what is not trained: which rank computes which
    microbatch would be in the result."""
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


Build = Callable[[], LocalModel]
