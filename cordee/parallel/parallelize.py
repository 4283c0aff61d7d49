"""From a model's settings to this rank's part of it on its device: where every axis is applied.

Order: stages on the meta device -> every parameter its local shape -> hooks (tensor, context,
expert) -> fp8 -> recompute and compile -> shard -> memory -> values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cordee.config.run import MemorySettings, Run
from cordee.dist.autograd_collectives import AxisComm
from cordee.dist.mesh import Mesh
from cordee.hf.convert import import_weights
from cordee.hf.safetensors_io import slice_box
from cordee.layout.axes import SEQUENCE_AXES
from cordee.layout.microbatches import context_chunks
from cordee.layout.slices import Box, LocalSlice
from cordee.layout.stages import Stages
from cordee.layout.tensors import TensorSpec, router_bias_specs, tensor_specs
from cordee.model.fp8 import use_fp8
from cordee.model.init_weights import initial_tensor
from cordee.model.layers import SequenceShard, autocast_dtype, checkpoint_wrapper
from cordee.model.moe import moe_layers
from cordee.model.transformer import Transformer
from cordee.parallel.context import GatherAttention, RingAttention
from cordee.parallel.expert import set_expert_dispatch
from cordee.parallel.fsdp import Sharding, apply_fsdp, fsdp_modules, local_tensor
from cordee.parallel.tensor import set_sequence_parallel

COMM_AXES = {
    "tensor": ("tensor",), "context": ("context",), "expert": ("expert",), "shard": ("shard",),
    "sequence": SEQUENCE_AXES,
}  # fmt: skip
"""Sets of axes with collectives inside a forward; a sequence is split by context and tensor."""

LossFunction = Callable[..., Tensor]
"""(model, *batch) -> summed loss of the batch."""


@dataclass(frozen=True)
class LocalModel:
    """A model's part on this rank.

    `stage_modules` are its pipeline stages in order, `specs` describe its own parameters,
    `all_specs` the whole model's, `buffer_specs` the whole model's saved buffers. `loss_function`
    computes a batch's loss where the model does not. `takes_dropout_key`: its forward takes a key
    for dropout. `is_user_module`: it is a caller's, and draws from torch's own generators.
    """

    stage_modules: Sequence[nn.Module]
    specs: Mapping[str, TensorSpec]
    all_specs: Mapping[str, TensorSpec]
    buffer_specs: Mapping[str, TensorSpec]
    comms: Mapping[str, AxisComm]
    stages: Stages
    sequence_shard: SequenceShard
    attention: GatherAttention | RingAttention | None = None
    loss_function: LossFunction | None = None
    takes_dropout_key: bool = False
    is_user_module: bool = False

    def buffers(self) -> dict[str, Tensor]:
        """This rank's saved buffers."""
        return {
            name: buffer
            for stage_module in self.stage_modules
            for name, buffer in persistent_buffers(stage_module).items()
        }

    def module_parameters(self) -> dict[str, nn.Parameter]:
        """DTensors where FSDP2 shards them."""
        return {
            name: parameter
            for stage_module in self.stage_modules
            for name, parameter in stage_module.named_parameters()
        }

    @property
    def bytes_sent(self) -> dict[str, int]:
        """Bytes that this rank has sent so far, by axis set; attention's are in "context"."""
        sent_bytes = {name: comm.bytes_sent for name, comm in self.comms.items()}
        if self.attention is not None:
            sent_bytes["context"] += self.attention.bytes_sent
        return sent_bytes


def make_local_model(
    run: Run, stages: Stages, mesh: Mesh, vocabulary: int, device: str, sharding: Sharding
) -> LocalModel:
    """This rank's part of the model of `run`, with its initial values, on `device`."""
    local_model = build_on_meta(run, stages, mesh, vocabulary, sharding)
    for stage_module in local_model.stage_modules:
        allocate_parameters(stage_module, device, sharding)
        load_initial_weights(stage_module, local_model.all_specs, mesh, run)
    return local_model


def build_on_meta(
    run: Run, stages: Stages, mesh: Mesh, vocabulary: int, sharding: Sharding
) -> LocalModel:
    """`make_local_model` without memory and values: modules, hooks and shards on meta."""
    all_specs = {spec.name: spec for spec in tensor_specs(run.model, vocabulary)}
    buffer_specs = {spec.name: spec for spec in router_bias_specs(run.model)}
    comms, sequence_shard = make_comms(mesh), make_sequence_shard(mesh)
    attention = make_context_attention(run, mesh)
    stage_modules: list[nn.Module] = []
    for stage in stages.rank_stages(mesh.coords["pipeline"]):
        with torch.device("meta"):
            model = make_stage_module(run, vocabulary, range(*stages.block_ranges[stage]))
        shrink_parameters(model, all_specs, mesh)
        if isinstance(model, Transformer):
            set_sequence_parallel(model, comms["tensor"], sequence_shard)
            set_expert_dispatch(model, comms["expert"], comms["sequence"])
            for block in model.parts():
                block.attention.attend = attention or block.attention.attend
        wrap_blocks(model, all_specs, mesh, run, sharding, comms["shard"])
        stage_modules.append(model)
    names = [name for stage_module in stage_modules for name, _ in stage_module.named_parameters()]
    specs = {name: all_specs[name] for name in names}
    return LocalModel(
        stage_modules, specs, all_specs, buffer_specs, comms, stages, sequence_shard, attention,
        takes_dropout_key=run.model.dropout > 0,
    )  # fmt: skip


def make_stage_module(run: Run, vocabulary: int, block_range: range) -> nn.Module:
    """Blocks `block_range` of the built-in model, on meta."""
    model = Transformer(run.model, vocabulary, block_range)
    model.memory = run.memory
    model.autocast = autocast_dtype(run.run.precision)
    return model


def make_comms(mesh: Mesh) -> dict[str, AxisComm]:
    return {
        name: AxisComm(mesh.group(*axes), mesh.size(*axes), mesh.index(*axes))
        for name, axes in COMM_AXES.items()
    }


def make_sequence_shard(mesh: Mesh) -> SequenceShard:
    context_size, context_index = mesh.size("context"), mesh.index("context")
    return SequenceShard(
        context_size=context_size,
        tensor_size=mesh.size("tensor"),
        tensor_index=mesh.index("tensor"),
        chunks=lambda length: context_chunks(length, context_size, context_index),
    )


def make_context_attention(run: Run, mesh: Mesh) -> GatherAttention | RingAttention | None:
    """Attention over a split sequence; None when this rank holds all of it."""
    context_size = mesh.size("context")
    if context_size == 1:
        return None
    attention_class = RingAttention if run.layout.attention == "ring" else GatherAttention
    return attention_class(
        mesh.group("context"), mesh.index("context"), context_size, run.model.window
    )


def shrink_parameters(model: nn.Module, all_specs: Mapping[str, TensorSpec], mesh: Mesh) -> None:
    """Gives every parameter (on meta) this rank's shape under the axes expert and tensor."""
    for name, parameter in list(model.named_parameters()):
        box = all_specs[name].box(mesh.layout, mesh.coords, last_axis="tensor")
        shape = tuple(stop - start for start, stop in box)
        if shape != tuple(parameter.shape):
            module_name, _, parameter_name = name.rpartition(".")
            local_parameter = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"))
            setattr(model.get_submodule(module_name), parameter_name, local_parameter)


def wrap_blocks(
    model: nn.Module, all_specs: Mapping[str, TensorSpec], mesh: Mesh, run: Run, sharding: Sharding,
    comm: AxisComm,
) -> None:  # fmt: skip
    """Applies fp8 and compilation to the blocks, then shards the model."""
    if run.run.precision == "fp8":
        for block in model_blocks(model):
            use_fp8(block)
    if run.run.compile == "blocks":
        compile_blocks(model, run.memory)
    if mesh.shard_mesh is not None:
        shard_dims = {name: all_specs[name].shard for name, _ in model.named_parameters()}
        apply_fsdp(model, mesh.shard_mesh, model_blocks(model), shard_dims, sharding, comm)


def model_blocks(model: nn.Module) -> list[nn.Module]:
    """The units of sharding, recomputing and compiling."""
    parts: Any = getattr(model, "parts", None)
    if parts is not None:
        return list(parts())
    blocks = getattr(model, "blocks", None)
    return list(blocks.children()) if isinstance(blocks, nn.Module) else []


def compile_blocks(model: Any, memory: MemorySettings) -> None:
    """torch.compile of every block's forward, in place; FSDP2's hooks stay outside.

    Recomputation moves inside, where the compiler decides what to keep: around compiled code,
    selective would keep no more than full.
    """
    for index, block in enumerate(model_blocks(model)):
        layer = int(getattr(block, "layer", index))
        inner_forward = block.forward
        is_recomputed = memory.recomputes(layer)
        if is_recomputed:
            inner_forward = checkpoint_wrapper(memory.recompute, inner_forward)
        block.forward = torch.compile(inner_forward)
    if hasattr(model, "memory"):
        model.memory = replace(memory, recompute="none")


def allocate_parameters(model: nn.Module, device: str, sharding: Sharding) -> None:
    """Memory without values: parameters on `device`, or on the host when they are offloaded."""
    parameter_device = "cpu" if sharding.offload else device

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=parameter_device)

    if fsdp_modules(model):
        model.to_empty(device=parameter_device)
    else:
        # As to_empty does, but for its empty_like: that, of a meta tensor, imports sympy (0.5 s).
        model._apply(empty)  # type: ignore[no-untyped-call]
    if sharding.offload:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)


def load_initial_weights(
    model: nn.Module, all_specs: Mapping[str, TensorSpec], mesh: Mesh, run: Run
) -> None:
    """Initial values: a folder's weights, or each tensor drawn whole; this rank keeps its box."""
    path = run.initial.weights
    weight_reader = import_weights(path, run.model) if path else None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spec = all_specs[name]
            box = spec.box(mesh.layout, mesh.coords)
            if weight_reader is not None:
                value = weight_reader(name, box)
            else:
                tensor = initial_tensor(
                    name, spec.shape, run.initial, run.run.seed, run.model.layers
                )
                value = slice_box(tensor, box)
            local_tensor(parameter).copy_(value)
    for moe in moe_layers(model):
        moe.reset_balance()
    if isinstance(model, Transformer):
        model.reset_rope_cache()


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are in the model's state_dict."""
    model_state = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in model_state}


def make_local_slice(spec: TensorSpec, mesh: Mesh) -> LocalSlice:
    """Where this rank's part of a tensor lies, and how many ranks hold the same."""
    replicated_axes = spec.replicated_axes(mesh.layout)
    box: Box = spec.box(mesh.layout, mesh.coords)
    return LocalSlice(
        box, spec.shape, replicated_axes, mesh.index(*replicated_axes), mesh.size(*replicated_axes)
    )
