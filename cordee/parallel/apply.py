"""THE recipe: from a model on paper to this rank's part of it, live on its device.

Order: stages on the meta device -> every parameter its local shape -> seams (tensor, context,
expert) -> recompute and compile -> shard -> memory -> values. Every parameter's numbers depend on
(seed, name) alone, so they are the same whatever the layout. Modules that a caller brings are
sharded as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cordee.config.run import Run
from cordee.dist.mesh import Mesh
from cordee.dist.wire import Wire
from cordee.layout.boxes import Box, Place
from cordee.layout.split import context_chunks
from cordee.layout.stages import Stages
from cordee.layout.tensors import TensorSpec, group_of, tensors
from cordee.model.initial import initial_tensor
from cordee.model.span import Span
from cordee.model.transformer import Transformer
from cordee.parallel.context import GatherAttention, RingAttention
from cordee.parallel.shard import Sharding, local, shard
from cordee.parallel.tensor import split_sequence


@dataclass(frozen=True)
class Live:
    """A model's part on this rank: `chunks` are its stages in order, `specs` describe its own
    parameters, `every` those of the whole model; `wires` count what each axis sends."""

    chunks: Sequence[nn.Module]
    specs: Mapping[str, TensorSpec]
    every: Mapping[str, TensorSpec]
    wires: Mapping[str, Wire]
    stages: Stages
    span: Span
    attend: GatherAttention | RingAttention | None = None

    def modules(self) -> dict[str, nn.Parameter]:
        """The modules' own parameters by name (DTensors where FSDP2 cuts them)."""
        return {name: p for chunk in self.chunks for name, p in chunk.named_parameters()}


def make_live(
    run: Run, stages: Stages, mesh: Mesh, vocabulary: int, device: str, sharding: Sharding
) -> Live:
    """Builds the transformer of `run` for the rank of `mesh`, with its initial values."""
    every = {spec.name: spec for spec in tensors(run.model, vocabulary)}
    wires = {
        axis: Wire(mesh.group(axis), mesh.size(axis), mesh.index(axis))
        for axis in ("tensor", "context", "expert")
    }
    span = make_span(mesh)
    attend = make_attention(run, mesh)
    chunks: list[nn.Module] = []
    for stage in stages.of_rank(mesh.at["pipeline"]):
        with torch.device("meta"):
            model = Transformer(run.model, vocabulary, range(*stages.parts[stage]))
        model.memory = run.memory
        model.autocast = compute_type(run)
        narrow(model, every, mesh)
        split_sequence(model, wires["tensor"], span)
        split_attention(model, attend)
        if mesh.shard_mesh is not None:
            dims = {name: every[name].shard for name, _ in model.named_parameters()}
            shard(model, mesh.shard_mesh, list(model.parts()), dims, sharding)
        model.to_empty(device=device)
        fill(model, every, mesh, run)
        model.forget_turns()
        chunks.append(model)
    names = [name for chunk in chunks for name, _ in chunk.named_parameters()]
    specs = {name: every[name] for name in names}
    return Live(chunks, specs, every, wires, stages, span, attend)


def take_live(model: nn.Module, mesh: Mesh, device: str, sharding: Sharding) -> Live:
    """A module that the caller brings, whole on each rank or sharded; its values stay."""
    model.to(device)
    every = {
        name: TensorSpec(name, tuple(p.shape), group_of(name, p.ndim))
        for name, p in model.named_parameters()
    }
    if mesh.shard_mesh is not None:
        blocks = getattr(model, "blocks", None)
        units = list(blocks.children()) if isinstance(blocks, nn.Module) else []
        shard(model, mesh.shard_mesh, units, {}, sharding)
    return Live([model], every, every, {}, Stages(((0, 1),), 1, "gpipe"), Span())


def make_span(mesh: Mesh) -> Span:
    """Which positions this rank holds."""
    parts, index = mesh.size("context"), mesh.index("context")
    return Span(
        context=parts, tensor=mesh.size("tensor"), tensor_index=mesh.index("tensor"),
        chunks=lambda length: context_chunks(length, parts, index),
    )  # fmt: skip


def make_attention(run: Run, mesh: Mesh) -> GatherAttention | RingAttention | None:
    """Attention over a cut sequence; None when this rank holds all of it."""
    parts = mesh.size("context")
    if parts == 1:
        return None
    kind = RingAttention if run.layout.attention == "ring" else GatherAttention
    return kind(mesh.group("context"), mesh.index("context"), parts, run.model.window)


def split_attention(model: Transformer, attend: GatherAttention | RingAttention | None) -> None:
    """Sets the seam of every attention."""
    if attend is not None:
        for block in model.parts():
            block.attention.attend = attend


def compute_type(run: Run) -> torch.dtype | None:
    """What matrix products compute in; None for fp32."""
    return torch.bfloat16 if run.run.precision == "bf16" else None


def narrow(model: nn.Module, every: Mapping[str, TensorSpec], mesh: Mesh) -> None:
    """Gives every parameter (on meta) the shape that expert and tensor cuts leave of it."""
    for name, parameter in list(model.named_parameters()):
        box = every[name].box(mesh.layout, mesh.at, upto="tensor")
        shape = tuple(stop - start for start, stop in box)
        if shape != tuple(parameter.shape):
            owner, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(owner), leaf, nn.Parameter(torch.empty(shape, device="meta"))
            )


def fill(model: nn.Module, every: Mapping[str, TensorSpec], mesh: Mesh, run: Run) -> None:
    """Initial values: each tensor is drawn whole and this rank keeps its box."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spec = every[name]
            whole = initial_tensor(name, spec.shape, run.initial, run.run.seed, run.model.layers)
            local(parameter).copy_(cut(whole, spec.box(mesh.layout, mesh.at)))


def place_of(spec: TensorSpec, mesh: Mesh) -> Place:
    """Where this rank's part of a tensor lies, and who else holds the same."""
    shared = spec.shared(mesh.layout)
    box = spec.box(mesh.layout, mesh.at)
    return Place(box, spec.shape, shared, mesh.index(*shared), mesh.size(*shared))


def cut(whole: Tensor, box: Box) -> Tensor:
    """The part of `whole` in `box` (a view)."""
    return whole[tuple(slice(start, stop) for start, stop in box)]
