"""Flat all-gather and reduce-scatter between ranks, and where their messages travel.

gloo keeps a part of an all-reduce as its reduce-scatter; one all-to-all and a sum here are two
to four times as fast and half the bytes (docs/performance.md), at the price of one more copy in
memory. On other devices both are the library's own; between unlike devices they use host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.hardware.devices import HOST_GLOO

MAX_DIRECT_BYTES = 1 << 19
"""Largest part that is gathered by direct messages on a CPU."""

# torch renamed both; old and new names are the same collectives.
_all_gather: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)  # fmt: skip
_reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


def to_transport_device(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """What to hand to a collective of `group` for `tensor`: itself, or its copy in host memory
    where the group is HOST_ONLY (then what came goes back by `.to(tensor.device)`). All that
    crosses islands passes here, and so has one device on all ranks of the group."""
    if dist.get_backend_config(group) != HOST_GLOO:
        return tensor
    return tensor.to("cpu", copy=True)


def all_gather_flat(
    output: Tensor, local_part: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> Any:
    """Everybody's `local_part` (n elements), one after another in rank order, into `output` (W n),
    of which `local_part` may be a view. Returns what may be waited for when `async_op`, else
    None."""
    if local_part.device.type != "cpu" or not 0 < local_part.nbytes <= MAX_DIRECT_BYTES or async_op:
        return _all_gather(output, local_part, group=group, async_op=async_op)
    send_buffer = local_part.repeat(output.numel() // local_part.numel())
    dist.all_to_all_single(output, send_buffer, group=group)
    return None


def reduce_scatter_flat(
    output: Tensor,
    input_parts: Tensor,
    group: dist.ProcessGroup | None,
    op: Any = dist.ReduceOp.SUM,
    async_op: bool = False,
) -> Any:
    """The sum over ranks of this rank's part (n elements) of everybody's `input_parts` (W n), added
    in rank order, into `output`. Returns what may be waited for when `async_op`, else None."""
    if (
        input_parts.device.type != "cpu"
        or op != dist.ReduceOp.SUM
        or async_op
        or not output.numel()
    ):
        return _reduce_scatter(output, input_parts, op=op, group=group, async_op=async_op)
    received_parts = torch.empty_like(input_parts)
    dist.all_to_all_single(received_parts, input_parts, group=group)
    torch.sum(received_parts.view(-1, output.numel()), 0, out=output)
    return None
