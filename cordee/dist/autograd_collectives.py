"""Differentiable collectives of one axis, and the count of their bytes.

Each has its counterpart as backward: an all-gather a reduce-scatter, an all-to-all the reverse one.
Bytes are what this rank sends in a ring (directly, for all-to-all), counted in the backward too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.dist.collectives import all_gather_flat, reduce_scatter_flat


class AxisComm:
    """One group of an axis; a group of None is this rank alone, and everything the identity."""

    def __init__(self, group: dist.ProcessGroup | None, size: int, index: int) -> None:
        self.group = group
        self.size = size
        self.index = index
        self.bytes_sent = 0

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' parts, one after another along `dim`."""
        return x if self.group is None else _all_gather(x, self, dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part along `dim` of the sum over ranks."""
        return x if self.group is None else _reduce_scatter(x, self, dim)

    def all_reduce_forward(self, x: Tensor) -> Tensor:
        """The sum over ranks; each rank goes on alike, so gradients come back as they are."""
        return x if self.group is None else _all_reduce_forward(x, self)

    def all_reduce_backward(self, x: Tensor) -> Tensor:
        """What all ranks hold alike, used differently by each: gradients come back summed."""
        return x if self.group is None else _all_reduce_backward(x, self)

    def all_gather_split_backward(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' parts along `dim`; each rank goes on alike, so each takes its part of the
        gradient back."""
        return x if self.group is None else _all_gather_split_backward(x, self, dim)

    def split_all_gather_backward(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part along `dim` of what all hold alike; gradients come back united."""
        return x if self.group is None else _split_all_gather_backward(x, self, dim)

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Tensor:
        """`sent[r]` rows of x [n, ...] to rank r; returns all ranks' rows for us, in rank order."""
        if self.group is None:
            return x
        return _all_to_all(x, self, list(send_counts), list(receive_counts))

    def all_gather_no_grad(self, x: Tensor, dim: int) -> Tensor:
        """`all_gather` without gradients."""
        x = x.contiguous()
        parts = x.new_empty(self.size, *x.shape)
        all_gather_flat(parts.view(-1), x.view(-1), group=self.group)
        self.bytes_sent += (self.size - 1) * x.nbytes
        return parts.movedim(0, dim).flatten(dim, dim + 1)

    def split_no_grad(self, x: Tensor, dim: int) -> Tensor:
        """`split_all_gather_backward` without gradients or messages."""
        return x.tensor_split(self.size, dim)[self.index].contiguous()

    def reduce_scatter_no_grad(self, x: Tensor, dim: int) -> Tensor:
        """`reduce_scatter` without gradients."""
        parts = torch.unflatten(x, dim, (self.size, -1)).movedim(dim, 0).contiguous()
        output = torch.empty_like(parts[0])
        reduce_scatter_flat(output.view(-1), parts.view(-1), group=self.group)
        self.bytes_sent += (self.size - 1) * output.nbytes
        return output

    def all_reduce_no_grad(self, x: Tensor) -> Tensor:
        """`all_reduce_forward` without gradients; a new tensor."""
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=self.group)
        self.bytes_sent += 2 * (self.size - 1) * x.nbytes // self.size
        return x

    def max_no_grad(self, x: Tensor) -> Tensor:
        """The largest over ranks, without gradients; a new tensor."""
        if self.group is None:
            return x
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        self.bytes_sent += 2 * (self.size - 1) * x.nbytes // self.size
        return x

    def all_to_all_no_grad(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Tensor:
        """`all_to_all` without gradients."""
        x = x.contiguous()
        output = x.new_empty(sum(receive_counts), *x.shape[1:])
        dist.all_to_all_single(output, x, list(receive_counts), list(send_counts), group=self.group)
        row_bytes = x[:1].nbytes if len(x) else 0
        self.bytes_sent += (sum(send_counts) - send_counts[self.index]) * row_bytes
        return output


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: AxisComm, dim: int) -> Tensor:
        ctx.comm, ctx.dim = comm, dim
        return comm.all_gather_no_grad(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.comm.reduce_scatter_no_grad(grad, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: AxisComm, dim: int) -> Tensor:
        ctx.comm, ctx.dim = comm, dim
        return comm.reduce_scatter_no_grad(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.comm.all_gather_no_grad(grad, ctx.dim), None, None


class _AllReduceForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: AxisComm) -> Tensor:
        return comm.all_reduce_no_grad(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllReduceBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: AxisComm) -> Tensor:
        ctx.comm = comm
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.comm.all_reduce_no_grad(grad), None


class _AllGatherSplitBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: AxisComm, dim: int) -> Tensor:
        ctx.comm, ctx.dim = comm, dim
        return comm.all_gather_no_grad(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.comm.split_no_grad(grad, ctx.dim), None, None


class _SplitAllGatherBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: AxisComm, dim: int) -> Tensor:
        ctx.comm, ctx.dim = comm, dim
        return comm.split_no_grad(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.comm.all_gather_no_grad(grad, ctx.dim), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, comm: AxisComm, send_counts: list[int], receive_counts: list[int]
    ) -> Tensor:
        ctx.comm, ctx.send_counts, ctx.receive_counts = comm, send_counts, receive_counts
        return comm.all_to_all_no_grad(x, send_counts, receive_counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return (
            ctx.comm.all_to_all_no_grad(grad, ctx.receive_counts, ctx.send_counts),
            None,
            None,
            None,
        )


_all_gather: Callable[[Tensor, AxisComm, int], Tensor] = _AllGather.apply
_reduce_scatter: Callable[[Tensor, AxisComm, int], Tensor] = _ReduceScatter.apply
_all_reduce_forward: Callable[[Tensor, AxisComm], Tensor] = _AllReduceForward.apply
_all_reduce_backward: Callable[[Tensor, AxisComm], Tensor] = _AllReduceBackward.apply
_all_gather_split_backward: Callable[[Tensor, AxisComm, int], Tensor] = (
    _AllGatherSplitBackward.apply
)
_split_all_gather_backward: Callable[[Tensor, AxisComm, int], Tensor] = (
    _SplitAllGatherBackward.apply
)
_all_to_all: Callable[[Tensor, AxisComm, list[int], list[int]], Tensor] = _AllToAll.apply
