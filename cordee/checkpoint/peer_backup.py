"""A second copy of what only one rank holds, in the memory of a neighbour on another host.

Every so many steps each rank copies its tensors to host memory and sends those without a replica
to its neighbour; `restore_from_peers` reads them when the owner is gone. Two neighbours that die at
once are not covered. Memory: a rank's own state and its neighbour's part, twice during a copy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.checkpoint.format import ITEM_BYTES
from cordee.checkpoint.peer_restore import (
    FaultPoint,
    StateSnapshot,
    no_fault,
    parse_tensor_box,
    tensor_box_of,
    tensor_box_row,
)
from cordee.checkpoint.pieces import DTYPES
from cordee.checkpoint.train_state import LocalTensor
from cordee.checkpoint.transfer_plan import TensorBox, align_up
from cordee.dist.tree_all_reduce import all_gather_rows
from cordee.layout.slices import LocalSlice, box_shape, volume


class PeerBackup:
    """Copies every `every_steps` steps (0: never). `bytes_sent` and `seconds` count since the
    start.

    `host_of[r]` is the host of rank r (None: one host). Fault points, in this order: copy.begin,
    copy.send, copy.sent, copy.end.
    """

    def __init__(
        self,
        every_steps: int,
        group: dist.ProcessGroup | None,
        rank: int,
        size: int,
        host_of: Sequence[str] | None = None,
        fault_point: FaultPoint = no_fault,
    ) -> None:
        self.every_steps, self._fault_point = every_steps, fault_point
        self.bytes_sent, self.seconds = 0, 0.0
        # As of one step each: this rank's own copy and those of the ranks that send theirs here.
        self._backups: list[list[StateSnapshot]] = []
        self.rebind(group, rank, size, host_of)

    def rebind(
        self,
        group: dist.ProcessGroup | None,
        rank: int,
        size: int,
        host_of: Sequence[str] | None = None,
    ) -> None:
        """A new generation's group and neighbours; copies stay until the next one is complete."""
        self.group, self.rank, self.size = group, rank, size
        self.neighbours = choose_neighbours(size, host_of)

    def is_due(self, step: int) -> bool:
        return self.every_steps > 0 and self.size > 1 and step % self.every_steps == 0

    @property
    def memory_bytes(self) -> int:
        """Of the tensors in all copies on this rank."""
        return sum(t.tensor.nbytes for snapshot in self.snapshots() for t in snapshot.tensors)

    def back_up(
        self, step: int, meta: Mapping[str, Any], local_tensors: Sequence[LocalTensor]
    ) -> bool:
        """Copies the state as of the end of `step`; collective. Whether anything was sent.

        Where every tensor has a replica nothing is sent; each rank still keeps its own copy, as a
        fault may leave some ranks of an island a step ahead of the others. RuntimeError: a peer was
        lost; the copy before is still complete on every rank.
        """
        start_s = time.perf_counter()
        self._fault_point("copy.begin", step)
        tensors = [item for item in local_tensors if volume(item.local_slice.box)]
        tensors.sort(key=lambda item: item.local_slice.replica_count > 1)  # those without one first
        tensor_boxes = [tensor_box_of(item) for item in tensors]
        unique_count = sum(item.local_slice.replica_count == 1 for item in tensors)
        unique_boxes = tensor_boxes[:unique_count]
        header = json.dumps([dict(meta), list(map(tensor_box_row, unique_boxes))]).encode()
        payload_bytes = sum(map(_aligned_bytes, unique_boxes))
        sizes = all_gather_rows(torch.tensor([len(header), payload_bytes]), self.group, self.size)
        has_payload = bool(sizes[:, 1].any())
        buffer = torch.empty(sum(map(_aligned_bytes, tensor_boxes)), dtype=torch.uint8)
        staging_tensors = _view_as_tensors(tensor_boxes, buffer)
        with torch.no_grad():
            for item, staging_tensor in zip(tensors, staging_tensors, strict=True):
                staging_tensor.tensor.copy_(item.tensor)
        self._fault_point("copy.send", step)
        backup = [StateSnapshot(step, meta, staging_tensors)]
        if has_payload:
            payload = buffer[:payload_bytes]
            backup += self._exchange_copies(step, header, payload, sizes.tolist())
        self._fault_point("copy.sent", step)
        # Until every rank has its part of this copy, the one before stays beside it. When the last
        # copy failed there are two: only the first of them is complete everywhere.
        self._backups = [*self._backups[:1], backup]
        all_gather_rows(torch.ones(1), self.group, self.size)
        self._backups = [backup]
        self._fault_point("copy.end", step)
        self.bytes_sent += len(header) + payload_bytes if has_payload else 0
        self.seconds += time.perf_counter() - start_s
        return has_payload

    def snapshots(self) -> list[StateSnapshot]:
        """What this rank can offer to `restore_from_peers`, the newest first."""
        return [snapshot for backup in reversed(self._backups) for snapshot in backup]

    def discard_after(self, step: int) -> None:
        """The run goes on from `step`: copies of later steps are dropped."""
        self._backups = [backup for backup in self._backups if backup[0].step <= step]

    def _exchange_copies(
        self, step: int, header: bytes, payload: Tensor, sizes: list[list[int]]
    ) -> list[StateSnapshot]:
        """Sends own tensors to the neighbour; the copies that arrived here."""
        header_tensor = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        dst_rank, buffer_pairs, works = self.neighbours[self.rank], [], []
        for src_rank, byte_counts in enumerate(sizes):
            if self.neighbours[src_rank] == self.rank:
                buffers = [torch.empty(count, dtype=torch.uint8) for count in byte_counts]
                buffer_pairs.append(buffers)
                for buffer in filter(len, buffers):
                    works.append(dist.irecv(buffer, group=self.group, group_src=src_rank))
        for buffer in filter(len, (header_tensor, payload)):
            works.append(dist.isend(buffer, group=self.group, group_dst=dst_rank))
        for work in works:
            assert work is not None
            work.wait()
        snapshots = []
        for peer_header, peer_payload in buffer_pairs:
            meta, rows = json.loads(bytes(peer_header.numpy()))
            tensors = _view_as_tensors([parse_tensor_box(row) for row in rows], peer_payload)
            snapshots.append(StateSnapshot(step, meta, tensors))
        return snapshots


def choose_neighbours(size: int, host_of: Sequence[str] | None) -> list[int]:
    """For every rank, the rank that holds its copy: the one of its number on the next host (which
    spreads copies evenly), or the next rank where all are on one host."""
    ranks_by_host: dict[str, list[int]] = {}
    for rank in range(size):
        ranks_by_host.setdefault(host_of[rank] if host_of else "", []).append(rank)
    hosts = list(ranks_by_host.values())
    if len(hosts) == 1:
        return [(rank + 1) % size for rank in range(size)]
    neighbour_of = [0] * size
    for host_index, host_ranks in enumerate(hosts):
        next_host_ranks = hosts[(host_index + 1) % len(hosts)]
        for index, rank in enumerate(host_ranks):
            neighbour_of[rank] = next_host_ranks[index % len(next_host_ranks)]
    return neighbour_of


def _aligned_bytes(tensor_box: TensorBox) -> int:
    """Bytes of the box in a flat buffer."""
    return align_up(volume(tensor_box.box) * ITEM_BYTES[tensor_box.dtype])


def _view_as_tensors(tensor_boxes: Sequence[TensorBox], buffer: Tensor) -> list[LocalTensor]:
    """The boxes as views of a flat buffer, one after another."""
    local_tensors, offset = [], 0
    for tensor_box in tensor_boxes:
        dtype, shape = DTYPES[tensor_box.dtype], box_shape(tensor_box.box)
        flat = buffer[offset : offset + volume(tensor_box.box) * dtype.itemsize]
        local_slice = LocalSlice(tensor_box.box, tensor_box.shape)
        local_tensors.append(
            LocalTensor(tensor_box.name, flat.view(dtype).view(shape), local_slice)
        )
        offset += _aligned_bytes(tensor_box)
    return local_tensors
