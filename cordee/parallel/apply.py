"""THE recipe: from a model on paper to this rank's part of it, live on its device.

Order: stages on the meta device -> every parameter its local shape -> seams (tensor, context,
expert) -> fp8 -> recompute and compile -> shard -> memory -> values. Every parameter's numbers
depend on (seed, name) alone, so they are the same whatever the layout. Not here: models that are
not the house's own (`foreign.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cordee.config.run import MemorySettings, Run
from cordee.dist.mesh import Mesh
from cordee.dist.wire import Wire
from cordee.layout.boxes import Box, Place
from cordee.layout.split import context_chunks
from cordee.layout.stages import Stages
from cordee.layout.tensors import TensorSpec, buffers, tensors
from cordee.model.classifier import make_classifier
from cordee.model.equivalent import starting_weights
from cordee.model.folder import cut
from cordee.model.fp8 import use_fp8
from cordee.model.initial import initial_tensor
from cordee.model.moe import mixtures
from cordee.model.precision import autocast_dtype
from cordee.model.recompute import recomputed
from cordee.model.span import Span
from cordee.model.transformer import Transformer
from cordee.parallel.context import GatherAttention, RingAttention
from cordee.parallel.expert import deal_experts
from cordee.parallel.shard import Sharding, fsdp_modules, local, shard
from cordee.parallel.tensor import split_sequence

WIRES = {
    "tensor": ("tensor",), "context": ("context",), "expert": ("expert",), "shard": ("shard",),
    "sequence": ("context", "tensor"),
}  # fmt: skip
"""Sets of axes that talk inside a forward: split matrices, sequences, experts, shards, and both
halves of a sequence's split."""

Loss = Callable[..., Tensor]
"""(model, *batch) -> summed loss of the batch."""


@dataclass(frozen=True)
class Live:
    """A model's part on this rank: `chunks` are its stages in order, `specs` describe its own
    parameters, `every` those of the whole model, `kept` the whole model's buffers that survive;
    `wires` count what each axis sends. `loss` computes a batch's loss where the model does not;
    `keyed`: its forward takes a key for dropout; `brought`: it is a caller's, and draws from
    torch's own generators."""

    chunks: Sequence[nn.Module]
    specs: Mapping[str, TensorSpec]
    every: Mapping[str, TensorSpec]
    kept: Mapping[str, TensorSpec]
    wires: Mapping[str, Wire]
    stages: Stages
    span: Span
    attend: GatherAttention | RingAttention | None = None
    loss: Loss | None = None
    keyed: bool = False
    brought: bool = False

    def buffers(self) -> dict[str, Tensor]:
        """This rank's buffers that survive, by name."""
        return {n: b for chunk in self.chunks for n, b in surviving_buffers(chunk).items()}

    def modules(self) -> dict[str, nn.Parameter]:
        """The modules' own parameters by name (DTensors where FSDP2 cuts them)."""
        return {name: p for chunk in self.chunks for name, p in chunk.named_parameters()}

    @property
    def bytes_sent(self) -> dict[str, int]:
        """What this rank's wires have sent so far, keys and values of attention among it."""
        found = {name: wire.bytes_sent for name, wire in self.wires.items()}
        if self.attend is not None:
            found["context"] += self.attend.bytes_sent
        return found


def make_live(
    run: Run, stages: Stages, mesh: Mesh, vocabulary: int, device: str, sharding: Sharding
) -> Live:
    """Builds the model of `run` for the rank of `mesh`, with its initial values on `device`."""
    live = on_meta(run, stages, mesh, vocabulary, sharding)
    for model in live.chunks:
        to_memory(model, device, sharding)
        fill(model, live.every, mesh, run)
    return live


def on_meta(run: Run, stages: Stages, mesh: Mesh, vocabulary: int, sharding: Sharding) -> Live:
    """All of `make_live` but memory and values: modules, seams and shards on the meta device."""
    every = {spec.name: spec for spec in tensors(run.model, vocabulary)}
    kept = {spec.name: spec for spec in buffers(run.model)}
    wires, span, attend = make_wires(mesh), make_span(mesh), make_attention(run, mesh)
    chunks: list[nn.Module] = []
    for stage in stages.of_rank(mesh.at["pipeline"]):
        with torch.device("meta"):
            model = make_stage(run, vocabulary, range(*stages.parts[stage]))
        narrow(model, every, mesh)
        if isinstance(model, Transformer):
            split_sequence(model, wires["tensor"], span)
            deal_experts(model, wires["expert"], wires["sequence"])
            for block in model.parts():
                block.attention.attend = attend or block.attention.attend
        finish(model, every, mesh, run, sharding, wires["shard"])
        chunks.append(model)
    names = [name for chunk in chunks for name, _ in chunk.named_parameters()]
    specs = {name: every[name] for name in names}
    keyed = run.model.dropout > 0
    return Live(chunks, specs, every, kept, wires, stages, span, attend, keyed=keyed)


def make_stage(run: Run, vocabulary: int, part: range) -> nn.Module:
    """Blocks `part` of the house's model, with no values yet."""
    if run.model.classifies:
        return make_classifier(run.model)
    model = Transformer(run.model, vocabulary, part)
    model.memory = run.memory
    model.autocast = autocast_dtype(run.run.precision)
    return model


def make_wires(mesh: Mesh) -> dict[str, Wire]:
    """A wire for each of WIRES."""
    return {
        name: Wire(mesh.group(*axes), mesh.size(*axes), mesh.index(*axes))
        for name, axes in WIRES.items()
    }


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


def narrow(model: nn.Module, every: Mapping[str, TensorSpec], mesh: Mesh) -> None:
    """Gives every parameter (on meta) the shape that expert and tensor cuts leave of it."""
    for name, parameter in list(model.named_parameters()):
        box = every[name].box(mesh.layout, mesh.at, upto="tensor")
        shape = tuple(stop - start for start, stop in box)
        if shape != tuple(parameter.shape):
            owner, _, leaf = name.rpartition(".")
            part = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"))
            setattr(model.get_submodule(owner), leaf, part)


def finish(
    model: nn.Module, every: Mapping[str, TensorSpec], mesh: Mesh, run: Run, sharding: Sharding,
    wire: Wire,
) -> None:  # fmt: skip
    """What is done to blocks (fp8, recompute and compile), then the shards."""
    if run.run.precision == "fp8":
        for block in blocks_of(model):
            use_fp8(block)
    if run.run.compile == "blocks":
        compile_blocks(model, run.memory)
    if mesh.shard_mesh is not None:
        dims = {name: every[name].shard for name, _ in model.named_parameters()}
        shard(model, mesh.shard_mesh, blocks_of(model), dims, sharding, wire)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The units of a model that are gathered, recomputed and compiled one by one."""
    parts: Any = getattr(model, "parts", None)
    if parts is not None:
        return list(parts())
    blocks = getattr(model, "blocks", None)
    return list(blocks.children()) if isinstance(blocks, nn.Module) else []


def compile_blocks(model: Any, memory: MemorySettings) -> None:
    """torch.compile of every block's forward, in place: one code for all blocks alike.

    What is recomputed moves inside, where the compiler can tell what to keep (around compiled code,
    selective would keep no more than full). FSDP2's hooks stay outside.
    """
    for place, block in enumerate(blocks_of(model)):
        number = int(getattr(block, "layer", place))
        inner = block.forward
        again = memory.recomputes(number)
        forward = recomputed(memory.recompute, inner) if again else inner
        block.forward = torch.compile(forward)
    if hasattr(model, "memory"):
        model.memory = replace(memory, recompute="none")


def to_memory(model: nn.Module, device: str, sharding: Sharding) -> None:
    """Memory without values: parameters on `device`, or on the host when they are offloaded."""
    home = "cpu" if sharding.offload else device

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=home)

    if fsdp_modules(model):
        model.to_empty(device=home)
    else:
        # As to_empty does, but for its empty_like: that, of a meta tensor, imports sympy (0.5 s).
        model._apply(empty)  # type: ignore[no-untyped-call]
    if sharding.offload:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)


def fill(model: nn.Module, every: Mapping[str, TensorSpec], mesh: Mesh, run: Run) -> None:
    """Initial values: a folder's weights, or each tensor drawn whole; this rank keeps its box."""
    given = starting_weights(run.initial, run.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spec = every[name]
            box = spec.box(mesh.layout, mesh.at)
            if given is not None:
                value = given(name, box)
            else:
                layers, seed = run.model.layers, run.run.seed
                value = cut(initial_tensor(name, spec.shape, run.initial, seed, layers), box)
            local(parameter).copy_(value)
    for moe in mixtures(model):
        moe.forget_balance()
    if isinstance(model, Transformer):
        model.forget_turns()


def surviving_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a model's state."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def place_of(spec: TensorSpec, mesh: Mesh) -> Place:
    """Where this rank's part of a tensor lies, and who else holds the same."""
    shared = spec.shared(mesh.layout)
    box: Box = spec.box(mesh.layout, mesh.at)
    return Place(box, spec.shape, shared, mesh.index(*shared), mesh.size(*shared))
