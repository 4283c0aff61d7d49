"""Parameters, gradients and optimiser sharded over an island with FSDP2.

Each block and the rest are one unit. What is kept whole between uses is the level of ZeRO
(Rajbhandari et al. 2020): 1 parameters and gradients, 2 parameters, 3 nothing. Or (canonical) whole
gradients are taken after each microbatch and added by the exchange: the same bits as unsharded, at
the price of whole gradients in memory. Levels 2 and 3 gather in the type of products (FSDP2's mixed
precision), so that no rank holds a cast of the whole island; shards, their gradients and the sums
stay fp32. FSDP2 and DTensor are imported by the first use: 0.7 s of
processor time that a run without shards need not pay.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from cordee.dist.flat import gather_flat, scatter_flat
from cordee.dist.wire import Wire
from cordee.model.precision import widen_embeddings

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Sharding:
    """How a model is sharded: level of ZeRO, whether gradients stay whole (canonical), whether
    shards and their gradients live in the host's memory (offload), and the type that parameters
    are gathered in (None: their own)."""

    zero: int = 1
    canonical: bool = False
    offload: bool = False
    dtype: torch.dtype | None = None


class _Counted:
    """FSDP2's two collectives as the library has them, counted on a wire: what is handed to others
    is a part for each of them, the input of a gather or the output of a sum."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is sent or gathered."""
        return torch.empty(*size, dtype=dtype, device=device)

    def count(self, part: Tensor) -> None:
        """Notes a collective whose parts are like `part`."""
        self.wire.bytes_sent += (self.wire.size - 1) * part.nbytes


class _Gather(_Counted):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        self.count(input_tensor)
        return gather_flat(output_tensor, input_tensor, group=group, async_op=async_op)


class _Scatter(_Counted):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any,
        async_op: bool = False,
    ) -> Any:  # fmt: skip
        self.count(output_tensor)
        return scatter_flat(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def shard(
    model: nn.Module, mesh: DeviceMesh, units: Sequence[nn.Module], dims: Mapping[str, int | None],
    how: Sharding, wire: Wire,
) -> None:  # fmt: skip
    """Shards every parameter over `mesh`, in dim 0 or the one that `dims` names; `units` are
    wrapped one by one, then the root. `wire` counts what FSDP2 sends."""
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )
    from torch.distributed.tensor import Shard

    gather: Any = _Gather(wire)
    scatter: Any = _Scatter(wire)
    pinned = mesh.device_type != "cpu"
    policy = CPUOffloadPolicy(pin_memory=pinned) if how.offload else OffloadPolicy()
    # Autocast decides what is computed in which type, so inputs stay as they are; sums are fp32.
    summed = None if how.dtype is None else torch.float32
    precision = MixedPrecisionPolicy(how.dtype, summed, cast_forward_inputs=False)
    if how.dtype is not None:
        widen_embeddings(model)
    placed = {p: Shard(dims.get(name) or 0) for name, p in model.named_parameters()}
    for module in (*units, model):
        # The rest is needed last in a forward and first in a backward: it stays between them.
        again = how.zero == 3 and module is not model
        fully_shard(
            module, mesh=mesh, reshard_after_forward=again,
            shard_placement_fn=placed.__getitem__, offload_policy=policy, mp_policy=precision,
        )  # fmt: skip
    for unit in fsdp_modules(model):
        # Losses are divided by the global token count, so sums must not be divided again; gloo
        # has no pre-multiplied sum either.
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
        unit.set_custom_all_gather(gather)
        unit.set_custom_reduce_scatter(scatter)
        if how.canonical:
            unit.set_requires_gradient_sync(False)
        if how.canonical or how.zero < 3:
            unit.set_reshard_after_backward(False)


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Every unit that FSDP2 manages; none where it was never imported."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []


def before_microbatch(units: Sequence[FSDPModule], last: bool, how: Sharding) -> None:
    """Tells all `units` whether the coming backward reduces; before it, gradients only add up."""
    if how.canonical:
        return
    for module in units:
        reduces = last or how.zero > 1
        module.set_requires_gradient_sync(reduces, recurse=False)
        # What was sent is let go only after a "last" backward; else it lives to the next one.
        module.set_is_last_backward(reduces)


def reshard(model: nn.Module) -> None:
    """Back to shards: `model.parameters()` are the optimiser's tensors again."""
    for module in fsdp_modules(model):
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, in the same memory."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)  # DTensor has it, and nothing else
    return part


def whole_rows(part: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All shards' vectors of `counts[i]` elements each, in shard order (counts may differ)."""
    most = max(counts)
    padded = part.new_zeros(most)
    padded[: part.numel()] = part
    gathered = part.new_empty(most * len(counts))
    gather_flat(gathered, padded, group=group)
    pieces = gathered.view(len(counts), most)
    return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])
