"""The sum between ranks in an order of its own, and the count of its bytes.

encode -> all-to-all -> decode and add in the order of the tree over microbatches
(layout/microbatches.py) -> encode -> all-gather -> decode: so any number of members adds the same
numbers in the same order, with 2 n (W-1)/W elements each when ranges are aligned. Two members with
one subtree each take the library's all-reduce, since a + b = b + a.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.dist.collectives import all_gather_flat, to_transport_device
from cordee.layout.microbatches import Node, canonical_subtrees, fold

PartialSums = list[tuple[Node, list[Tensor]]]
"""Sums of gradients: (range of microbatches, a tensor for each parameter) in order."""


def do_nothing() -> None:
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


class TreeAllReduce:
    """Sums flat vectors over the members of a group, in canonical order.

    `ranges[i]` are the microbatches that member i computes; together they are range(total).
    `group` None stands for one member. `bytes_sent` counts this rank's traffic.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, ranges: Sequence[range], codec: Codec
    ) -> None:
        self.group = group
        self.size = len(ranges)
        self.codec = codec
        self.bytes_sent = 0
        self.set_ranges(ranges)

    def set_ranges(self, ranges: Sequence[range]) -> None:
        """The members compute these microbatches from now on; a range may be empty."""
        self.total_microbatches = max(microbatches.stop for microbatches in ranges)
        self.nodes_by_member = [
            canonical_subtrees(microbatches, self.total_microbatches) for microbatches in ranges
        ]
        self.is_commutative = (
            self.size == 2
            and self.codec.dtype == torch.float32
            and all(len(nodes) == 1 for nodes in self.nodes_by_member)
        )

    def all_reduce(
        self,
        partial_sums: Sequence[tuple[Node, Tensor]],
        on_local_sums: Callable[[], None] = do_nothing,
    ) -> Tensor:
        """The sum over all members of their canonical subtrees, the same on every member.

        `partial_sums` holds this member's (node, flat fp32 vector of n elements) in order, a vector
        of an empty node where it has no work; the vectors may be overwritten. Returns a flat fp32
        vector of n elements. `on_local_sums` is called between the two rounds, or before the only
        one.
        """
        if self.size == 1:
            return fold((0, self.total_microbatches), dict(partial_sums), Tensor.add_)
        vectors = [vector for (start, stop), vector in partial_sums if start < stop]
        n = partial_sums[0][1].numel()
        slice_elements = -(-n // self.size)
        message_count = (len(vectors) + 1) * (self.size - 1)
        self.bytes_sent += message_count * slice_elements * self.codec.dtype.itemsize
        if self.is_commutative:
            on_local_sums()
            output = to_transport_device(vectors[0], self.group)
            dist.all_reduce(output, group=self.group)
            return output.to(vectors[0].device)
        return self._reduce_slices(vectors, partial_sums[0][1], slice_elements, on_local_sums)[:n]

    def _reduce_slices(
        self,
        vectors: Sequence[Tensor],
        template: Tensor,
        slice_elements: int,
        on_local_sums: Callable[[], None],
    ) -> Tensor:
        """All-to-all of slices, the owner's sum in canonical order, all-gather of the sums."""
        send_buffer = to_transport_device(
            self._encode_slices(vectors, template, slice_elements), self.group
        )
        receive_buffer = send_buffer.new_empty(sum(map(len, self.nodes_by_member)) * slice_elements)
        dist.all_to_all_single(
            receive_buffer,
            send_buffer,
            [len(nodes) * slice_elements for nodes in self.nodes_by_member],
            [len(vectors) * slice_elements] * self.size,
            group=self.group,
        )
        slice_sum = self._sum_slice(receive_buffer.view(-1, slice_elements))
        on_local_sums()
        output_buffer = send_buffer.new_empty(self.size * slice_elements)
        all_gather_flat(output_buffer, self.codec.encode(slice_sum), group=self.group)
        return self.codec.decode(output_buffer.to(template.device))

    def _encode_slices(
        self, vectors: Sequence[Tensor], template: Tensor, slice_elements: int
    ) -> Tensor:
        """Payload laid out by receiver: for each member, its slice of each of our vectors."""
        n = template.numel()
        send_buffer = torch.zeros(
            self.size, len(vectors), slice_elements, dtype=self.codec.dtype, device=template.device
        )
        for index, vector in enumerate(vectors):
            payload = self.codec.encode(vector)
            full_slices = n // slice_elements
            send_buffer[:full_slices, index] = payload[: full_slices * slice_elements].view(
                full_slices, slice_elements
            )
            if n > full_slices * slice_elements:
                send_buffer[full_slices, index, : n - full_slices * slice_elements] = payload[
                    full_slices * slice_elements :
                ]
        return send_buffer.view(-1)

    def _sum_slice(self, payloads: Tensor) -> Tensor:
        """Decodes everybody's subtrees of our slice and adds them in canonical order."""
        leaves: dict[Node, Tensor] = {}
        row_index = 0
        for nodes in self.nodes_by_member:
            for node in nodes:
                leaves[node] = self.codec.decode(payloads[row_index])
                row_index += 1
        return fold((0, self.total_microbatches), leaves, Tensor.add_)


def all_gather_rows(row: Tensor, group: dist.ProcessGroup | None, size: int) -> Tensor:
    """Everybody's small vector, stacked by member: shape (k,) -> (size, k)."""
    if size == 1:
        return row[None]
    send_row = to_transport_device(row, group)
    rows = send_row.new_empty(size * row.numel())
    all_gather_flat(rows, send_row, group=group)
    return rows.view(size, -1).to(row.device)


def all_gather_bytes(message: bytes, group: dist.ProcessGroup | None, size: int) -> list[bytes]:
    """Everybody's message, by member; sizes travel first. For kilobytes: all get the longest's
    room."""
    sizes = all_gather_rows(torch.tensor([len(message)]), group, size)[:, 0].tolist()
    row = torch.zeros(max(sizes), dtype=torch.uint8)
    row[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    rows = all_gather_rows(row, group, size)
    return [
        bytes(message_row[:length].numpy()) for message_row, length in zip(rows, sizes, strict=True)
    ]
