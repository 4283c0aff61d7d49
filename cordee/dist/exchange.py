"""The one primitive of every sum between ranks, and the count of its bytes.

encode -> exchange -> decode and add in canonical order -> encode -> gather -> decode. Each member
owns one slice of the flat vector; it receives everybody's part of that slice, adds in the order of
the tree over microbatches (layout/split.py) and sends the sum back. Any number of members therefore
adds the same numbers in the same order. Messages travel as one all-to-all and one all-gather: two
rounds whatever the number of members, 2 n (W-1)/W elements each when ranges are aligned.
Traded away: the library's ring, which is faster for large plain sums and has an order of its own.
It is taken where its order is ours: two members with one subtree each, since a + b = b + a.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.dist.flat import gather_flat, outward
from cordee.layout.split import Node, canonical_subtrees, fold

Partial = list[tuple[Node, list[Tensor]]]
"""Sums of gradients: (range of microbatches, a tensor for each parameter) in order."""


def nothing() -> None:
    """Who is told that a point was reached, when nobody is."""


class Codec(Protocol):
    """How a tensor is written on the wire: a payload of one dtype, `element_bytes` an element."""

    dtype: torch.dtype

    def encode(self, tensor: Tensor) -> Tensor:
        """fp32 -> payload of the same number of elements."""
        ...

    def decode(self, payload: Tensor) -> Tensor:
        """payload -> fp32."""
        ...


class Exchange:
    """Sums flat vectors over the members of a group, in canonical order.

    `ranges[i]` are the microbatches that member i computes; together they are range(total).
    `group` None stands for one member. `bytes_sent` counts this rank's traffic.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        ranges: Sequence[range],
        codec: Codec,
    ) -> None:
        self.group = group
        self.size = len(ranges)
        self.codec = codec
        self.bytes_sent = 0
        self.deal(ranges)

    def deal(self, ranges: Sequence[range]) -> None:
        """The members compute these microbatches from now on; a range may be empty."""
        self.total = max(part.stop for part in ranges)
        self.nodes = [canonical_subtrees(part, self.total) for part in ranges]
        self.commutes = (
            self.size == 2
            and self.codec.dtype == torch.float32
            and all(len(nodes) == 1 for nodes in self.nodes)
        )

    def add(
        self, partial: Sequence[tuple[Node, Tensor]], reached: Callable[[], None] = nothing
    ) -> Tensor:
        """The sum over all members of their canonical subtrees, the same on every member.

        `partial` holds this member's (node, flat fp32 vector of n elements) in order, a vector of
        an empty node where it has no work; the vectors may be overwritten. Returns a flat fp32
        vector of n elements. `reached` is called between the two rounds, or before the only one.
        """
        if self.size == 1:
            return fold((0, self.total), dict(partial), Tensor.add_)
        vectors = [vector for (start, stop), vector in partial if start < stop]
        n = partial[0][1].numel()
        chunk = -(-n // self.size)
        messages = (len(vectors) + 1) * (self.size - 1)
        self.bytes_sent += messages * chunk * self.codec.dtype.itemsize
        if self.commutes:
            reached()
            whole = outward(vectors[0], self.group)
            dist.all_reduce(whole, group=self.group)
            return whole.to(vectors[0].device)
        return self._add_slices(vectors, partial[0][1], chunk, reached)[:n]

    def _add_slices(
        self, vectors: Sequence[Tensor], like: Tensor, chunk: int, reached: Callable[[], None]
    ) -> Tensor:
        """All-to-all of slices, the owner's sum in canonical order, all-gather of the sums."""
        sent = outward(self._encode_slices(vectors, like, chunk), self.group)
        received = sent.new_empty(sum(map(len, self.nodes)) * chunk)
        dist.all_to_all_single(
            received,
            sent,
            [len(nodes) * chunk for nodes in self.nodes],
            [len(vectors) * chunk] * self.size,
            group=self.group,
        )
        slice_sum = self._add_slice(received.view(-1, chunk))
        reached()
        gathered = sent.new_empty(self.size * chunk)
        gather_flat(gathered, self.codec.encode(slice_sum), group=self.group)
        return self.codec.decode(gathered.to(like.device))

    def _encode_slices(self, vectors: Sequence[Tensor], like: Tensor, chunk: int) -> Tensor:
        """Payload laid out by receiver: for each member, its slice of each of our vectors."""
        n = like.numel()
        sent = torch.zeros(
            self.size, len(vectors), chunk, dtype=self.codec.dtype, device=like.device
        )
        for index, vector in enumerate(vectors):
            payload = self.codec.encode(vector)
            whole = n // chunk
            sent[:whole, index] = payload[: whole * chunk].view(whole, chunk)
            if n > whole * chunk:
                sent[whole, index, : n - whole * chunk] = payload[whole * chunk :]
        return sent.view(-1)

    def _add_slice(self, received: Tensor) -> Tensor:
        """Decodes everybody's subtrees of our slice and adds them in canonical order."""
        leaves: dict[Node, Tensor] = {}
        row = 0
        for nodes in self.nodes:
            for node in nodes:
                leaves[node] = self.codec.decode(received[row])
                row += 1
        return fold((0, self.total), leaves, Tensor.add_)


def gather_rows(row: Tensor, group: dist.ProcessGroup | None, size: int) -> Tensor:
    """Everybody's small vector, stacked by member: shape (k,) -> (size, k)."""
    if size == 1:
        return row[None]
    sent = outward(row, group)
    rows = sent.new_empty(size * row.numel())
    gather_flat(rows, sent, group=group)
    return rows.view(size, -1).to(row.device)


def gather_bytes(message: bytes, group: dist.ProcessGroup | None, size: int) -> list[bytes]:
    """Everybody's message, by member; sizes travel first. For kilobytes: all get the longest's
    room."""
    sizes = gather_rows(torch.tensor([len(message)]), group, size)[:, 0].tolist()
    row = torch.zeros(max(sizes), dtype=torch.uint8)
    row[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    rows = gather_rows(row, group, size)
    return [bytes(found[:n].numpy()) for found, n in zip(rows, sizes, strict=True)]
