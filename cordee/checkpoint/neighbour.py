"""A second copy of what only one rank holds, in the memory of a neighbour on another host.

Every so many steps each rank stages its tensors in host memory and sends those without a copy
elsewhere to its neighbour; `peer.fill` takes them up when the owner is gone. A moment replaces the
one before it only when every rank is known to have its part. Not here: what is done with copies
after a fault. Traded away: host memory (own state and the neighbour's part, twice while a copy is
made), steps since the last copy, and two neighbours that die at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.checkpoint.deal import Part, padded
from cordee.checkpoint.format import DTYPES
from cordee.checkpoint.peer import Kept, Point, no_drill, parse_part, part_of
from cordee.checkpoint.state import Holding
from cordee.dist.exchange import gather_rows
from cordee.layout.boxes import Place, shape_of, volume


@dataclass(frozen=True)
class _Moment:
    """This rank's own copy and those of the ranks whose neighbour it is, as of one step."""

    kept: tuple[Kept, ...]
    bytes: int


class Neighbour:
    """Copies every `every` steps (0: never). `bytes_sent` and `seconds` count since the start.

    `host_of[r]` is the host of rank r (None: one host). `point`: fault points `copy.begin`,
    `copy.send`, `copy.sent` and `copy.end`, in this order.
    """

    def __init__(
        self,
        every: int,
        group: dist.ProcessGroup | None,
        rank: int,
        size: int,
        host_of: Sequence[str] | None = None,
        point: Point = no_drill,
    ) -> None:
        self.every, self._point = every, point
        self.bytes_sent, self.seconds = 0, 0.0
        self._moments: list[_Moment] = []
        self.rebind(group, rank, size, host_of)

    def rebind(
        self,
        group: dist.ProcessGroup | None,
        rank: int,
        size: int,
        host_of: Sequence[str] | None = None,
    ) -> None:
        """Another generation: its group and neighbours; what is kept stays until the next copy."""
        self.group, self.rank, self.size = group, rank, size
        self.neighbours = neighbours(size, host_of)

    def due(self, step: int) -> bool:
        """Whether a copy is to be made after `step`."""
        return self.every > 0 and self.size > 1 and step % self.every == 0

    @property
    def bytes_held(self) -> int:
        """Host memory that copies take on this rank now."""
        return sum(moment.bytes for moment in self._moments)

    def copy(self, step: int, meta: Mapping[str, Any], held: Sequence[Holding]) -> bool:
        """Copies the state as of the end of `step`; collective. Whether anything was sent: where
        every tensor of every rank has a copy elsewhere, ranks keep this moment for themselves, for
        the case that a fault leaves some of an island a step ahead of the others.

        RuntimeError: a peer was lost; the moment before is still here, whole, on every rank.
        """
        began = time.perf_counter()
        self._point("copy.begin", step)
        alone = [item for item in held if item.place.copies == 1 and volume(item.place.box)]
        rest = [item for item in held if item.place.copies > 1 and volume(item.place.box)]
        parts = [part_of(item) for item in (*alone, *rest)]
        rows = [[part.name, part.dtype, part.shape, part.box] for part in parts[: len(alone)]]
        head = json.dumps([dict(meta), rows]).encode()
        sent_bytes = sum(_room(part) for part in parts[: len(alone)])
        sizes = gather_rows(torch.tensor([len(head), sent_bytes]), self.group, self.size)
        sends = bool(sizes[:, 1].any())
        buffer = torch.empty(sum(map(_room, parts)), dtype=torch.uint8)
        staged = _laid_out(parts, buffer)
        with torch.no_grad():
            for item, copied in zip((*alone, *rest), staged, strict=True):
                copied.part.copy_(item.part)
        self._point("copy.send", step)
        others: list[Kept] = []
        received_bytes = 0
        if sends:
            others, received_bytes = self._send(step, head, buffer[:sent_bytes], sizes.tolist())
        self._point("copy.sent", step)
        moment = _Moment((Kept(step, meta, staged), *others), buffer.nbytes + received_bytes)
        # The first one was whole everywhere; one between was not, when the last copy failed.
        self._moments = [*self._moments[:1], moment]
        gather_rows(torch.ones(1), self.group, self.size)  # every rank has its part of this moment
        self._moments = [moment]
        self._point("copy.end", step)
        self.bytes_sent += len(head) + sent_bytes if sends else 0
        self.seconds += time.perf_counter() - began
        return sends

    def kept(self) -> list[Kept]:
        """What this rank can give to `peer.fill`, the newest first."""
        return [kept for moment in reversed(self._moments) for kept in moment.kept]

    def back_to(self, step: int) -> None:
        """The run goes on from `step`: what was kept of later ones never happened."""
        self._moments = [m for m in self._moments if m.kept[0].step <= step]

    def _send(
        self, step: int, head: bytes, body: Tensor, sizes: list[list[int]]
    ) -> tuple[list[Kept], int]:
        """Own tensors to the neighbour, and the copies that came from those before it."""
        words = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        to, came, works = self.neighbours[self.rank], [], []
        for giver, (head_bytes, body_bytes) in enumerate(sizes):
            if self.neighbours[giver] == self.rank:
                pair = [torch.empty(n, dtype=torch.uint8) for n in (head_bytes, body_bytes)]
                came.append(pair)
                works += [dist.irecv(t, group=self.group, group_src=giver) for t in pair if len(t)]
        works += [dist.isend(t, group=self.group, group_dst=to) for t in (words, body) if len(t)]
        for work in works:
            assert work is not None
            work.wait()
        found = []
        for told, tensors in came:
            meta, rows = json.loads(bytes(told.numpy()))
            found.append(Kept(step, meta, _laid_out([parse_part(row) for row in rows], tensors)))
        return found, sum(told.nbytes + tensors.nbytes for told, tensors in came)


def neighbours(size: int, host_of: Sequence[str] | None) -> list[int]:
    """For every rank, who keeps its copy: on the next host the rank with its number there (so that
    all keep alike), or the next rank where all are on one host."""
    ranks: dict[str, list[int]] = {}
    for rank in range(size):
        ranks.setdefault(host_of[rank] if host_of else "", []).append(rank)
    hosts = list(ranks.values())
    if len(hosts) == 1:
        return [(rank + 1) % size for rank in range(size)]
    found = [0] * size
    for number, members in enumerate(hosts):
        after = hosts[(number + 1) % len(hosts)]
        for index, rank in enumerate(members):
            found[rank] = after[index % len(after)]
    return found


def _room(part: Part) -> int:
    """Bytes that a part takes in a flat buffer."""
    return padded(volume(part.box) * DTYPES[part.dtype].itemsize)


def _laid_out(parts: Sequence[Part], buffer: Tensor) -> list[Holding]:
    """The parts as views of a flat buffer, one after another."""
    found, at = [], 0
    for part in parts:
        dtype, shape = DTYPES[part.dtype], shape_of(part.box)
        view = buffer[at : at + volume(part.box) * dtype.itemsize].view(dtype).view(shape)
        found.append(Holding(part.name, view, Place(part.box, part.shape)))
        at += _room(part)
    return found
