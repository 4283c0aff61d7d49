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

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from cordee.dist.exchange import gather_rows
from cordee.dist.flat import gather_flat, scatter_flat
from cordee.dist.wire import Wire
from cordee.errors import RunError
from cordee.model.precision import widen_embeddings

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


BUCKET_BYTES = 1 << 26
"""Gradients that are summed over shards in one collective."""


@dataclass(frozen=True)
class Sharding:
    """How a model is sharded: level of ZeRO, whether gradients stay whole (canonical), whether
    shards and their gradients live in the host's memory (offload), the type that parameters are
    gathered in (None: their own), and whether it is a module that a caller brought, of which each
    rank may use other parts in its microbatches."""

    zero: int = 1
    canonical: bool = False
    offload: bool = False
    dtype: torch.dtype | None = None
    brought: bool = False

    @property
    def ahead(self) -> bool:
        """Whether all units are gathered before a forward, in one order on every rank, and not by
        the units that it comes to: where parameters stay whole until the backward anyway."""
        return self.brought and (self.canonical or self.zero < 3)

    @property
    def after(self) -> bool:
        """Whether gradients are summed over shards after a backward, in one order, and not by the
        units that it comes to."""
        return self.ahead and not self.canonical


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
        if how.canonical or how.after:
            unit.set_requires_gradient_sync(False)
        if how.canonical or how.zero < 3:
            unit.set_reshard_after_backward(False)
    _same_order(model, how, wire)


def _same_order(model: nn.Module, how: Sharding, wire: Wire) -> None:
    """Makes ranks talk in one order although each may use other parts of a caller's module."""
    every = fsdp_modules(model)
    if how.ahead:

        def gather_all(*_: object) -> None:
            for unit in every:
                unit.unshard()

        model.register_forward_pre_hook(gather_all)  # comes after FSDP2's own, which begins all
    elif how.brought:
        for number, unit in enumerate(every):
            told = functools.partial(_tell_unit, number, wire)
            cast(nn.Module, unit).register_forward_pre_hook(told, prepend=True)


def _tell_unit(number: int, wire: Wire, *_: object) -> None:
    check_order(wire, number)


def check_order(wire: Wire, number: int) -> None:
    """RunError on every shard when they have come to different units (-1: the end of a forward);
    without it they would exchange what does not belong together, or abort."""
    units = gather_rows(torch.tensor([number]), wire.group, wire.size)[:, 0].tolist()
    if len(set(units)) > 1:
        raise RunError(
            "the shards use different parts of the model in a microbatch",
            values={"layout.zero": 3, "unit by shard": units},
            fix="layout.zero=2, which gathers all parts whatever is used",
        )


def sum_over_shards(whole: Sequence[Tensor], mine: Sequence[Tensor], wire: Wire) -> list[Tensor]:
    """Parts shaped like `mine` of the sums over shards of `whole` gradients, cut in dim 0 as FSDP2
    cuts: a collective for every BUCKET_BYTES, the same ones on all ranks."""
    scatter, found = _Scatter(wire), []
    for first, last in _buckets(whole):
        rows = [_rows(gradient, wire.size) for gradient in whole[first:last]]
        parts = torch.cat(rows, 1)
        part = parts.new_empty(parts.shape[1])
        scatter(part, parts.flatten(), wire.group, dist.ReduceOp.SUM)
        pieces = torch.split(part, [row.shape[1] for row in rows])
        found += [
            piece[: like.numel()].view(like.shape)
            for piece, like in zip(pieces, mine[first:last], strict=True)
        ]
    return found


def _buckets(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Ranges of tensors of at most BUCKET_BYTES together; a larger one is alone."""
    starts, held = [0], 0
    for number, tensor in enumerate(tensors):
        if held and held + tensor.nbytes > BUCKET_BYTES:
            starts, held = [*starts, number], 0
        held += tensor.nbytes
    return list(zip(starts, [*starts[1:], len(tensors)], strict=True))


def _rows(gradient: Tensor, shards: int) -> Tensor:
    """[shards, elements]: each shard's rows of dim 0, with zeros where it has fewer."""
    chunk = -(-gradient.shape[0] // shards)
    missing = shards * chunk - gradient.shape[0]
    padding = gradient.new_zeros(missing, *gradient.shape[1:])
    return torch.cat([gradient, padding]).view(shards, -1)


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
