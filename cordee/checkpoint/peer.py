"""State from live peers: what the ranks of a new generation want, from what survivors still hold.

All tell what they want and hold, and take the highest step that is covered; each box then comes
from whoever holds it, several donors sharing the load. What a rank holds itself moves not at all
where it lies in place. Nothing that was kept is written before every rank has all its messages, so
a peer that dies meanwhile leaves every `Kept` as it was. Not here: who the members are, the disk.
Traded away: memory of the host, for a second copy of what is overwritten in place; and links of
other kinds: bytes travel from host memory, whatever the device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.checkpoint.deal import (
    Offer,
    Part,
    Slice,
    Told,
    best_step,
    check_alike,
    deal,
    rounds,
)
from cordee.checkpoint.format import DTYPE_CODES
from cordee.checkpoint.state import Holding
from cordee.dist.exchange import gather_bytes, gather_rows
from cordee.errors import CheckpointError
from cordee.layout.boxes import Box, intersection, moved, shape_of

Point = Callable[[str, int], None]
"""Called with the name of a fault point and a step (fault/inject.py)."""


@dataclass(frozen=True)
class Kept:
    """What a rank still holds of the run after a fault: the tensors as of the end of `step`.

    `meta` is what `state.describe` gave. `held` may be boxes of another layout than today's.
    """

    step: int
    meta: Mapping[str, Any]
    held: Sequence[Holding]


@dataclass(frozen=True)
class Filled:
    """What a fill did: its step, how many ranks gave to others and received, `bytes` in all."""

    step: int
    meta: Mapping[str, Any]
    donors: int
    receivers: int
    bytes: int


def no_drill(name: str, step: int) -> None:
    """The fault point that does nothing."""


def fill(
    wanted: Sequence[Holding],
    kept: Sequence[Kept],
    group: dist.ProcessGroup | None,
    rank: int,
    size: int,
    point: Point = no_drill,
) -> Filled | None:
    """Fills the tensors of `wanted` with the newest state that all ranks' `kept` cover together.

    Collective over the group (None: this rank alone). None, on all ranks, when no step is covered.
    Wanted tensors may be the kept ones, of the same or another box or step. Points: `fill.round`
    before each round of messages, `fill.end` after the last. CheckpointError, on all ranks: a name
    with different shapes or dtypes. RuntimeError: a peer was lost; all kept tensors are as before.
    """
    told = tell_all(wanted, kept, group, size)
    check_alike(told)
    step = best_step(told)
    if step is None:
        return None
    slices = deal(told, step)
    moves = rounds(slices)
    sources: dict[str, list[Holding]] = {}
    for item in (item for moment in kept if moment.step == step for item in moment.held):
        sources.setdefault(item.name, []).append(item)
    with torch.no_grad():
        targets = _targets(wanted, kept, sources)
        wire = _Wire(wanted, targets, sources, moves, rank, size)
        for round_slices in moves:
            point("fill.round", step)
            wire.send(round_slices, group)
        for part in slices:
            target = targets[part.index] if part.giver == part.taker == rank else None
            if target is not None:
                into = _cut(target, wanted[part.index].place.box, part.box)
                into.copy_(source_of(sources[part.name], part))
        point("fill.end", step)
        gather_rows(torch.ones(1), group, size)  # from here on nobody needs what was kept
        for item, target in zip(wanted, targets, strict=True):
            if target is not None and target is not item.part:
                item.part.copy_(target)
    sent = [part for part in slices if part.giver != part.taker]
    metas = (offer.meta for said in told for offer in said.offers if offer.step == step)
    return Filled(
        step,
        next(metas),
        len({part.giver for part in sent}),
        len({part.taker for part in sent}),
        sum(part.bytes for part in sent),
    )


def part_of(held: Holding) -> Part:
    """What is told of a tensor. CheckpointError: a dtype that no checkpoint holds."""
    code = DTYPE_CODES.get(held.part.dtype)
    if code is None:
        raise CheckpointError(
            "a tensor of this dtype cannot be handed on",
            values={"tensor": held.name, "dtype": str(held.part.dtype)},
            fix=f"one of {', '.join(sorted(DTYPE_CODES.values()))}",
        )
    return Part(held.name, code, held.place.shape, held.place.box)


def parse_part(row: Sequence[Any]) -> Part:
    """A part from its JSON row [name, dtype, shape, box]."""
    name, dtype, shape, box = row
    return Part(name, dtype, tuple(shape), tuple((start, stop) for start, stop in box))


def tell_all(
    wanted: Sequence[Holding], kept: Sequence[Kept], group: dist.ProcessGroup | None, size: int
) -> list[Told]:
    """What every rank wants and holds. Each part is written once: moments mostly share them."""
    rows: dict[Part, int] = {}

    def numbers(held: Sequence[Holding]) -> list[int]:
        return [rows.setdefault(part_of(item), len(rows)) for item in held]

    said: dict[str, Any] = {
        "wanted": numbers(wanted),
        "kept": [[moment.step, dict(moment.meta), numbers(moment.held)] for moment in kept],
    }
    said["parts"] = [[part.name, part.dtype, part.shape, part.box] for part in rows]
    heard = [json.loads(text) for text in gather_bytes(json.dumps(said).encode(), group, size)]
    told = []
    for words in heard:
        parts = [parse_part(row) for row in words["parts"]]
        offers = [Offer(step, meta, [parts[n] for n in held]) for step, meta, held in words["kept"]]
        told.append(Told([parts[n] for n in words["wanted"]], offers))
    return told


def _targets(
    wanted: Sequence[Holding], kept: Sequence[Kept], sources: Mapping[str, Sequence[Holding]]
) -> list[Tensor | None]:
    """Where each wanted box is filled: None where it is in place, in host memory where it shares
    storage with what is kept, else in the tensor itself."""
    in_place = {
        (name, item.place.box, _memory(item.part)) for name in sources for item in sources[name]
    }
    storages = {_storage(item.part) for moment in kept for item in moment.held} - {0}
    found: list[Tensor | None] = []
    for item in wanted:
        if (item.name, item.place.box, _memory(item.part)) in in_place:
            found.append(None)
        elif _storage(item.part) in storages:
            found.append(torch.empty(item.part.shape, dtype=item.part.dtype))
        else:
            found.append(item.part)
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _cut(tensor: Tensor, held: Box, box: Box) -> Tensor:
    """The view of `box` in a tensor that is the box `held`."""
    return tensor[tuple(slice(*span) for span in moved(box, held))]


def source_of(sources: Sequence[Holding], part: Slice) -> Tensor:
    """The view of what a slice asks of this rank, which holds `sources` of that name."""
    for item in sources:
        if intersection(item.place.box, part.box) == part.box:
            return _cut(item.part, item.place.box, part.box)
    raise CheckpointError(
        "a rank is asked for what it does not hold", values={"tensor": part.name, "box": part.box}
    )


class _Wire:
    """Rounds of messages: slices packed by taker, one all-to-all, slices put in their places."""

    def __init__(
        self,
        wanted: Sequence[Holding],
        targets: Sequence[Tensor | None],
        sources: Mapping[str, Sequence[Holding]],
        moves: Sequence[Sequence[Slice]],
        rank: int,
        size: int,
    ) -> None:
        self.wanted, self.targets, self.sources = wanted, targets, sources
        self.rank, self.size = rank, size
        outgoing = [sum(p.padded_bytes for p in r if p.giver == rank) for r in moves]
        incoming = [sum(p.padded_bytes for p in r if p.taker == rank) for r in moves]
        self.sent = torch.empty(max(outgoing, default=0), dtype=torch.uint8)
        self.received = torch.empty(max(incoming, default=0), dtype=torch.uint8)

    def send(self, slices: Sequence[Slice], group: dist.ProcessGroup | None) -> None:
        """One round; every rank of the group has the same slices in the same order."""
        mine = sorted((p for p in slices if p.giver == self.rank), key=lambda p: p.taker)
        theirs = sorted((p for p in slices if p.taker == self.rank), key=lambda p: p.giver)
        for part, room in zip(mine, _rooms(mine, self.sent), strict=True):
            source = source_of(self.sources[part.name], part)
            room.view(source.dtype).view(source.shape).copy_(source)
        outgoing, incoming = [0] * self.size, [0] * self.size
        for part in mine:
            outgoing[part.taker] += part.padded_bytes
        for part in theirs:
            incoming[part.giver] += part.padded_bytes
        dist.all_to_all_single(
            self.received[: sum(incoming)], self.sent[: sum(outgoing)], incoming, outgoing,
            group=group,
        )  # fmt: skip
        for part, room in zip(theirs, _rooms(theirs, self.received), strict=True):
            target = self.targets[part.index]
            assert target is not None, "what is in place is not sent"
            into = _cut(target, self.wanted[part.index].place.box, part.box)
            into.copy_(room.view(target.dtype).view(shape_of(part.box)))


def _rooms(slices: Sequence[Slice], buffer: Tensor) -> list[Tensor]:
    """The bytes of each slice in a message that holds them one after another."""
    starts = accumulate((part.padded_bytes for part in slices), initial=0)
    pairs = zip(slices, starts, strict=False)
    return [buffer[start : start + part.bytes] for part, start in pairs]
