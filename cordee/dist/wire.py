"""Differentiable collectives of one axis, and the count of their bytes.

What the axes inside an island say to each other in a forward goes back in the backward: a gather
returns a scatter of sums, a scatter of sums returns a gather, an exchange returns the exchange
reversed. Bytes are what this rank hands over by a ring (or directly, for exchanges); they are
counted when sent, also in the backward. Not here: gradients between islands (`exchange.py`), FSDP2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.dist.flat import gather_flat, scatter_flat


class Wire:
    """One group of an axis; a group of None is this rank alone, and everything the identity."""

    def __init__(self, group: dist.ProcessGroup | None, size: int, index: int) -> None:
        self.group = group
        self.size = size
        self.index = index
        self.bytes_sent = 0

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' parts, one after another along `dim`."""
        return x if self.group is None else _gather(x, self, dim)

    def scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part along `dim` of the sum over ranks."""
        return x if self.group is None else _scatter(x, self, dim)

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks; each rank goes on alike, so gradients come back as they are."""
        return x if self.group is None else _total(x, self)

    def spread(self, x: Tensor) -> Tensor:
        """What all ranks hold alike, used differently by each: gradients come back summed."""
        return x if self.group is None else _spread(x, self)

    def unite(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' parts along `dim`; each rank goes on alike, so each takes its part of the
        gradient back."""
        return x if self.group is None else _unite(x, self, dim)

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part along `dim` of what all hold alike; gradients come back united."""
        return x if self.group is None else _part(x, self, dim)

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """`sent[r]` rows of x [n, ...] to rank r; returns all ranks' rows for us, in rank order."""
        if self.group is None:
            return x
        return _exchange(x, self, list(sent), list(received))

    def gather_now(self, x: Tensor, dim: int) -> Tensor:
        """`gather` without gradients."""
        x = x.contiguous()
        parts = x.new_empty(self.size, *x.shape)
        gather_flat(parts.view(-1), x.view(-1), group=self.group)
        self.bytes_sent += (self.size - 1) * x.nbytes
        return parts.movedim(0, dim).flatten(dim, dim + 1)

    def part_now(self, x: Tensor, dim: int) -> Tensor:
        """`part` without gradients or messages."""
        return x.tensor_split(self.size, dim)[self.index].contiguous()

    def scatter_now(self, x: Tensor, dim: int) -> Tensor:
        """`scatter` without gradients."""
        parts = torch.unflatten(x, dim, (self.size, -1)).movedim(dim, 0).contiguous()
        mine = torch.empty_like(parts[0])
        scatter_flat(mine.view(-1), parts.view(-1), group=self.group)
        self.bytes_sent += (self.size - 1) * mine.nbytes
        return mine

    def total_now(self, x: Tensor) -> Tensor:
        """`total` without gradients; a new tensor."""
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=self.group)
        self.bytes_sent += 2 * (self.size - 1) * x.nbytes // self.size
        return x

    def most_now(self, x: Tensor) -> Tensor:
        """The largest over ranks, without gradients; a new tensor."""
        if self.group is None:
            return x
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        self.bytes_sent += 2 * (self.size - 1) * x.nbytes // self.size
        return x

    def exchange_now(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """`exchange` without gradients."""
        x = x.contiguous()
        came = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(came, x, list(received), list(sent), group=self.group)
        row_bytes = x[:1].nbytes if len(x) else 0
        self.bytes_sent += (sum(sent) - sent[self.index]) * row_bytes
        return came


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, dim: int) -> Tensor:
        ctx.wire, ctx.dim = wire, dim
        return wire.gather_now(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.wire.scatter_now(grad, ctx.dim), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, dim: int) -> Tensor:
        ctx.wire, ctx.dim = wire, dim
        return wire.scatter_now(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.wire.gather_now(grad, ctx.dim), None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        return wire.total_now(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.wire.total_now(grad), None


class _Unite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, dim: int) -> Tensor:
        ctx.wire, ctx.dim = wire, dim
        return wire.gather_now(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.wire.part_now(grad, ctx.dim), None, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, dim: int) -> Tensor:
        ctx.wire, ctx.dim = wire, dim
        return wire.part_now(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.wire.gather_now(grad, ctx.dim), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, wire: Wire, sent: list[int], received: list[int]
    ) -> Tensor:
        ctx.wire, ctx.sent, ctx.received = wire, sent, received
        return wire.exchange_now(x, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.wire.exchange_now(grad, ctx.received, ctx.sent), None, None, None


_gather: Callable[[Tensor, Wire, int], Tensor] = _Gather.apply
_scatter: Callable[[Tensor, Wire, int], Tensor] = _Scatter.apply
_total: Callable[[Tensor, Wire], Tensor] = _Total.apply
_spread: Callable[[Tensor, Wire], Tensor] = _Spread.apply
_unite: Callable[[Tensor, Wire, int], Tensor] = _Unite.apply
_part: Callable[[Tensor, Wire, int], Tensor] = _Part.apply
_exchange: Callable[[Tensor, Wire, list[int], list[int]], Tensor] = _Exchange.apply
