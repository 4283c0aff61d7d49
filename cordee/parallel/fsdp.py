"""Parameters, gradients and optimiser state sharded over an island with FSDP2.

Each block is a unit, and the rest is one. ZeRO level 1 keeps parameters and gradients whole between
uses, 2 parameters, 3 nothing (Rajbhandari et al. 2020). Canonical sharding takes whole gradients
after each microbatch for the tree all-reduce: the same bits as unsharded, for more memory. FSDP2
and DTensor are imported at first use: 0.7 s of processor time that a run without shards saves.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from cordee.dist.autograd_collectives import AxisComm
from cordee.dist.collectives import all_gather_flat, reduce_scatter_flat
from cordee.dist.tree_all_reduce import all_gather_rows
from cordee.errors import RunError
from cordee.model.layers import use_fp32_embedding_grads

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


BUCKET_BYTES = 1 << 26
"""Gradients that are summed over shards in one collective."""


@dataclass(frozen=True)
class Sharding:
    """How a model is sharded: ZeRO level, whether gradients stay whole (canonical), whether shards
    and their gradients live in the host's memory (offload), the type that parameters are gathered
    in (None: their own), and whether it is a caller's module, of which ranks may use different
    parts in their microbatches."""

    zero: int = 1
    canonical: bool = False
    offload: bool = False
    dtype: torch.dtype | None = None
    is_user_module: bool = False

    @property
    def gathers_before_forward(self) -> bool:
        """Whether all units are gathered before a forward, in one order on every rank, instead of
        each when it runs: where parameters stay whole until the backward anyway."""
        return self.is_user_module and (self.canonical or self.zero < 3)

    @property
    def reduces_after_backward(self) -> bool:
        """Whether gradients are summed over shards after the backward, in one order, instead of
        unit by unit within it."""
        return self.gathers_before_forward and not self.canonical


class _CountedCollective:
    """FSDP2's collectives, counted: this rank sends each other rank one part, which is as large as
    the input of an all-gather or the output of a reduce-scatter."""

    def __init__(self, comm: AxisComm) -> None:
        self.comm = comm

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Called by FSDP2 for its buffers."""
        return torch.empty(*size, dtype=dtype, device=device)

    def count_bytes(self, part: Tensor) -> None:
        self.comm.bytes_sent += (self.comm.size - 1) * part.nbytes


class _CountedAllGather(_CountedCollective):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        self.count_bytes(input_tensor)
        return all_gather_flat(output_tensor, input_tensor, group=group, async_op=async_op)


class _CountedReduceScatter(_CountedCollective):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any,
        async_op: bool = False,
    ) -> Any:  # fmt: skip
        self.count_bytes(output_tensor)
        return reduce_scatter_flat(
            output_tensor, input_tensor, op=op, group=group, async_op=async_op
        )


def apply_fsdp(
    model: nn.Module,
    mesh: DeviceMesh,
    units: Sequence[nn.Module],
    shard_dims: Mapping[str, int | None],
    sharding: Sharding,
    comm: AxisComm,
) -> None:
    """Shards every parameter over `mesh`, in dim 0 or the one that `shard_dims` gives; `units` are
    wrapped one by one, then the root. `comm` counts what FSDP2 sends."""
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )
    from torch.distributed.tensor import Shard

    all_gather: Any = _CountedAllGather(comm)
    reduce_scatter: Any = _CountedReduceScatter(comm)
    pin_memory = mesh.device_type != "cpu"
    offload_policy = (
        CPUOffloadPolicy(pin_memory=pin_memory) if sharding.offload else OffloadPolicy()
    )
    # Autocast decides what is computed in which type, so inputs stay as they are; sums are fp32.
    reduce_dtype = None if sharding.dtype is None else torch.float32
    precision = MixedPrecisionPolicy(sharding.dtype, reduce_dtype, cast_forward_inputs=False)
    if sharding.dtype is not None:
        use_fp32_embedding_grads(model)
    placements = {p: Shard(shard_dims.get(name) or 0) for name, p in model.named_parameters()}
    for module in (*units, model):
        # The root's own parameters are used last in a forward and first in the backward.
        reshards = sharding.zero == 3 and module is not model
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshards,
            shard_placement_fn=placements.__getitem__,
            offload_policy=offload_policy,
            mp_policy=precision,
        )
    for fsdp_module in fsdp_modules(model):
        # Losses are divided by the global token count already; gloo has no pre-multiplied sum.
        fsdp_module.set_force_sum_reduction_for_comms(True)
        fsdp_module.set_gradient_divide_factor(1.0)
        fsdp_module.set_custom_all_gather(all_gather)
        fsdp_module.set_custom_reduce_scatter(reduce_scatter)
        if sharding.canonical or sharding.reduces_after_backward:
            fsdp_module.set_requires_gradient_sync(False)
        if sharding.canonical or sharding.zero < 3:
            fsdp_module.set_reshard_after_backward(False)
    _fix_unit_order(model, sharding, comm)


def _fix_unit_order(model: nn.Module, sharding: Sharding, comm: AxisComm) -> None:
    """Makes ranks run collectives in one order although each may use other parts of a caller's
    module: all units are gathered first, or every unit checks that all ranks have come to it."""
    fsdp_units = fsdp_modules(model)
    if sharding.gathers_before_forward:

        def gather_all(*_: object) -> None:
            for unit in fsdp_units:
                unit.unshard()

        model.register_forward_pre_hook(gather_all)  # runs after FSDP2's own, which sets it up
    elif sharding.is_user_module:
        for unit_index, unit in enumerate(fsdp_units):
            hook = functools.partial(_unit_order_hook, unit_index, comm)
            cast(nn.Module, unit).register_forward_pre_hook(hook, prepend=True)


def _unit_order_hook(unit_index: int, comm: AxisComm, *_: object) -> None:
    check_unit_order(comm, unit_index)


def check_unit_order(comm: AxisComm, unit_index: int) -> None:
    """RunError on every shard when they have come to different units (-1: the end of a forward),
    whose collectives would mix or abort."""
    unit_indices = all_gather_rows(torch.tensor([unit_index]), comm.group, comm.size)[:, 0].tolist()
    if len(set(unit_indices)) > 1:
        raise RunError(
            "the shards use different parts of the model in a microbatch",
            values={"layout.zero": 3, "unit by shard": unit_indices},
            fix="layout.zero=2, which gathers all parts whatever is used",
        )


def reduce_scatter_gradients(
    full_gradients: Sequence[Tensor], local_parameters: Sequence[Tensor], comm: AxisComm
) -> list[Tensor]:
    """This rank's parts, shaped like `local_parameters`, of the sums over shards: cut in dim 0 as
    FSDP2 cuts, one collective per bucket of BUCKET_BYTES, the same on all ranks."""
    reduce_scatter, shard_gradients = _CountedReduceScatter(comm), []
    for first, last in _bucket_ranges(full_gradients):
        # Row r holds rank r's shards of all gradients of the bucket: one collective for them.
        rows = [_pad_rows(gradient, comm.size) for gradient in full_gradients[first:last]]
        input_rows = torch.cat(rows, 1)
        output_row = input_rows.new_empty(input_rows.shape[1])
        reduce_scatter(output_row, input_rows.flatten(), comm.group, dist.ReduceOp.SUM)
        pieces = torch.split(output_row, [row.shape[1] for row in rows])
        shard_gradients += [
            piece[: parameter.numel()].view(parameter.shape)
            for piece, parameter in zip(pieces, local_parameters[first:last], strict=True)
        ]
    return shard_gradients


def _bucket_ranges(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    starts, bucket_bytes = [0], 0
    for index, tensor in enumerate(tensors):
        if bucket_bytes and bucket_bytes + tensor.nbytes > BUCKET_BYTES:
            starts, bucket_bytes = [*starts, index], 0
        bucket_bytes += tensor.nbytes
    return list(zip(starts, [*starts[1:], len(tensors)], strict=True))


def _pad_rows(gradient: Tensor, shard_count: int) -> Tensor:
    """[shards, elements]: each shard's rows of dim 0, with zeros where it has fewer."""
    rows_per_shard = -(-gradient.shape[0] // shard_count)
    missing_rows = shard_count * rows_per_shard - gradient.shape[0]
    padding = gradient.new_zeros(missing_rows, *gradient.shape[1:])
    return torch.cat([gradient, padding]).view(shard_count, -1)


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Every unit that FSDP2 manages; [] where it was never imported."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []


def set_gradient_sync(units: Sequence[FSDPModule], is_last: bool, sharding: Sharding) -> None:
    """Whether the next backward reduces gradients; until then they add up on this rank."""
    if sharding.canonical:
        return
    for module in units:
        reduces = is_last or sharding.zero > 1
        module.set_requires_gradient_sync(reduces, recurse=False)
        # FSDP2 frees its send buffers only after a "last" backward.
        module.set_is_last_backward(reduces)


def reshard(model: nn.Module) -> None:
    """Back to shards: `model.parameters()` are the optimiser's tensors again."""
    for module in fsdp_modules(model):
        module.reshard()


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, in the same memory."""
    local_part: Tensor = getattr(tensor, "_local_tensor", tensor)  # only a DTensor has it
    return local_part


def all_gather_uneven(
    local_part: Tensor, counts: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """All shards' vectors of `counts[i]` elements each, in shard order (counts may differ)."""
    max_count = max(counts)
    padded_part = local_part.new_zeros(max_count)
    padded_part[: local_part.numel()] = local_part
    gathered_rows = local_part.new_empty(max_count * len(counts))
    all_gather_flat(gathered_rows, padded_part, group=group)
    pieces = gathered_rows.view(len(counts), max_count)
    return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])
