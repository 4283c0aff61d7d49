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
from cordee.dist.mesh import Mesh
from cordee.dist.wire import Wire
from cordee.errors import ConfigError, LayoutError
from cordee.layout.axes import INSIDE
from cordee.layout.stages import Stages
from cordee.layout.tensors import TensorSpec, group_of
from cordee.model.hub import HubModel, empty_model, read_hub
from cordee.model.initial import seeded
from cordee.model.keras import KerasModel
from cordee.model.precision import autocast_dtype
from cordee.model.span import Span
from cordee.parallel.apply import (
    Live,
    Loss,
    blocks_of,
    finish,
    make_wires,
    narrow,
    surviving_buffers,
    to_memory,
)
from cordee.parallel.engine import Batch, Engine
from cordee.parallel.probe import WHOLE_BYTES, Tried, descend, probe
from cordee.parallel.seams import check_hub_layout, set_seams
from cordee.parallel.shard import Sharding, local, reshard, shard

ONE_STAGE = Stages(((0, 1),), 1, "gpipe")
RATE = 1e-3
"""Learning rate of the probe's step of plain SGD."""


def make_hub(run: Run, mesh: Mesh, vocabulary: int, device: str, sharding: Sharding) -> Live:
    """The model of the folder run.model.hub, cut by its own plan, with its values."""
    hub = read_hub(run.model.hub)
    every = {spec.name: spec for spec in hub.specs()}
    check_hub_layout(hub, every, mesh.layout)
    if hub.vocabulary < vocabulary:
        raise ConfigError(
            "the data has more symbols than the model's vocabulary",
            values={"model.hub": run.model.hub, "model": hub.vocabulary, "data": vocabulary},
            fix="data of that vocabulary (cordee data prepare)",
        )
    wires = make_wires(mesh)
    model = HubModel(hub)
    model.memory = run.memory
    model.autocast = autocast_dtype(run.run.precision)
    narrow(model, every, mesh)
    model.retie()
    set_seams(model, wires["tensor"])
    finish(model, every, mesh, run, sharding, wires["shard"])
    to_memory(model, device, sharding)
    model.retie()
    model.remake_buffers()
    values = hub.values(run.run.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local(parameter).copy_(values(name, every[name].box(mesh.layout, mesh.at)))
    specs = {name: every[name] for name, _ in model.named_parameters()}
    kept = buffer_specs(model)
    return Live([model], specs, every, kept, wires, ONE_STAGE, Span(), keyed=hub.dropout)


def take(
    model: nn.Module, loss: Loss | None, run: Run, mesh: Mesh, device: str, sharding: Sharding
) -> Live:
    """A module that the caller brings, whole on each rank or sharded; its values stay."""
    if isinstance(model, KerasModel):
        model.check(mesh.layout, run.run.exact)
    model.to(device)
    every = {
        name: TensorSpec(name, tuple(p.shape), group_of(name, p.ndim))
        for name, p in model.named_parameters()
    }
    kept = buffer_specs(model)
    wires = make_wires(mesh)
    if mesh.shard_mesh is not None:
        # The caller's code may count on fp32 parameters: shards gather what it brought.
        plain = replace(sharding, dtype=None)
        shard(model, mesh.shard_mesh, blocks_of(model), {}, plain, wires["shard"])
    span = Span()
    return Live([model], every, every, kept, wires, ONE_STAGE, span, loss=loss, brought=True)


def buffer_specs(model: nn.Module) -> dict[str, TensorSpec]:
    """Buffers of a model's state, whole on every rank."""
    found = surviving_buffers(model)
    return {n: TensorSpec(n, tuple(b.shape), "buffers", shard=None) for n, b in found.items()}


def whole_copy(model: nn.Module) -> nn.Module | None:
    """The model as it is before it is cut, for the probe; None when it is too large."""
    size = sum(p.nbytes for p in model.parameters())
    return copy.deepcopy(model) if size <= WHOLE_BYTES else None


def whole_hub(run: Run, device: str) -> nn.Module | None:
    """The model of run.model.hub, uncut, for the probe; None when it is too large."""
    hub = read_hub(run.model.hub)
    if sum(4 * spec.elements for spec in hub.specs()) > WHOLE_BYTES:
        return None
    model = empty_model(hub, device)
    model.autocast = autocast_dtype(run.run.precision)
    values = hub.values(run.run.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values(name, tuple((0, size) for size in parameter.shape)))
    return model


def guard(engine: Engine, whole: nn.Module | None, run: Run) -> None:
    """Tries the live model on the run's first microbatch; RunError when it is not the whole one."""
    engine.loader.begin(0, range(1))
    batch = engine.batch(0, 0)
    model, mesh = engine.live.chunks[0], engine.mesh
    whole_gradients = engine.sharded and engine.work.sharding.canonical
    states = {name: buffer.clone() for name, buffer in engine.buffers.items()}
    if run.run.exact and mesh.layout.size > 1:
        _check_still(engine, model, batch)

    def step() -> None:
        _backward(engine, model, batch)
        if whole_gradients:
            gradients = engine.place(engine.take())
        else:
            # Every shard sees the same batch, and FSDP2 adds their gradients up.
            gradients = engine.collect()[0][1]
            torch._foreach_div_(gradients, float(mesh.size("shard")))
        descend(list(engine.parameters.values()), gradients, RATE)

    cut = Tried(functools.partial(_loss, engine, model, batch), step)
    wire = Wire(mesh.group(*INSIDE), mesh.size(*INSIDE), mesh.index(*INSIDE))
    tried = None if whole is None else _whole(engine, whole, batch)
    tolerance = 1e-5 if run.run.precision == "fp32" else 2e-2
    probe(cut, list(engine.parameters.values()), wire, tried, tolerance)
    for name, buffer in engine.buffers.items():
        buffer.copy_(states[name])


def _check_still(engine: Engine, model: nn.Module, batch: Batch) -> None:
    """LayoutError when a forward of training moves what is not trained: which rank computes which
    microbatch would be in the result."""
    held = {name: buffer.clone() for name, buffer in engine.buffers.items()}
    model.train()
    with torch.no_grad(), seeded(0, engine.device):
        engine.call(model, batch)
    reshard(model)
    moved = [name for name, old in held.items() if not torch.equal(old, engine.buffers[name])]
    for name in moved:
        engine.buffers[name].copy_(held[name])
    if moved:
        raise LayoutError(
            "states that a forward moves (BatchNorm's) depend on which rank computes what",
            values={"run.exact": True, "moved": moved[:3], "ranks": engine.mesh.layout.size},
            fix="run.exact=false, or one process, or a model without them",
        )


def _whole(engine: Engine, whole: nn.Module, batch: Batch) -> Tried:
    parts = list(whole.parameters())

    def step() -> None:
        _backward(engine, whole, batch)
        descend(parts, [p.grad for p in parts], RATE)
        whole.zero_grad()

    return Tried(functools.partial(_loss, engine, whole, batch), step)


def _loss(engine: Engine, model: nn.Module, batch: Batch) -> Tensor:
    model.eval()
    with torch.no_grad():
        found = engine.call(model, batch) / engine.work.tokens
    reshard(model)
    return found


def _backward(engine: Engine, model: nn.Module, batch: Batch) -> None:
    model.eval()
    torch.autograd.backward(engine.call(model, batch) / engine.work.tokens)


Build = Callable[[], Live]
