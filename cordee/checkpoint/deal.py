"""Who gives what to whom: boxes that are wanted, cut over the ranks that hold them.

Every rank computes the same answer from what all have told. Not here: messages and tensors
(`peer.py`). Traded away: links (all pairs count as equal), and time on very many shards: where a
layout changes, every wanted box of a tensor is held against every box of it that is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cordee.checkpoint.format import DTYPES
from cordee.errors import CheckpointError
from cordee.layout.boxes import Box, Shape, intersection, volume, without

SLICE_BYTES = 4 << 20
"""Longest slice: a large tensor comes from several donors, and a round has room for some."""

LEAST_BYTES = 64 << 10
"""A box below this is not cut to be shared by donors."""

ROUND_BYTES = 32 << 20
"""What a rank sends, and what it receives, in one round at most."""

ALIGN_BYTES = 16
"""Slices begin at multiples of this in a message, so that any dtype may lie there."""


@dataclass(frozen=True)
class Part:
    """A box of the tensor `name` of `shape`; `dtype` is a safetensors code."""

    name: str
    dtype: str
    shape: Shape
    box: Box


@dataclass(frozen=True)
class Offer:
    """Parts as of the end of `step`, and what describes that moment (JSON)."""

    step: int
    meta: Mapping[str, Any]
    parts: Sequence[Part]


@dataclass(frozen=True)
class Told:
    """What one rank said: what it wants and what it can give."""

    wanted: Sequence[Part]
    offers: Sequence[Offer]


@dataclass(frozen=True)
class Slice:
    """`box` of the tensor `name` goes from rank `giver` into what `taker` wants at `index`."""

    giver: int
    taker: int
    index: int
    name: str
    box: Box
    bytes: int

    @property
    def padded_bytes(self) -> int:
        """The room that it takes in a message."""
        return padded(self.bytes)


def padded(size_bytes: int) -> int:
    """The next multiple of ALIGN_BYTES."""
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES


def check_alike(told: Sequence[Told]) -> None:
    """CheckpointError unless whoever speaks of a wanted tensor means the same dtype and shape."""
    meant: dict[str, tuple[str, Shape]] = {}
    for said in told:
        for part in said.wanted:
            meant.setdefault(part.name, (part.dtype, part.shape))
    for rank, said in enumerate(told):
        kept = [part for offer in said.offers for part in offer.parts]
        for part in (*said.wanted, *kept):
            known = meant.get(part.name, (part.dtype, part.shape))
            if known != (part.dtype, part.shape):
                raise CheckpointError(
                    "a live rank holds another tensor under this name",
                    values={"tensor": part.name, "rank": rank, "dtype": part.dtype,
                            "shape": part.shape, "wanted": known},
                    fix="the same model and optimiser on every rank",
                )  # fmt: skip


def best_step(told: Sequence[Told]) -> int | None:
    """The highest step at which all ranks' parts together cover all that is wanted, or None."""
    wanted = {(part.name, part.box) for said in told for part in said.wanted if volume(part.box)}
    steps = {offer.step for said in told for offer in said.offers}
    for step in sorted(steps, reverse=True):
        held = holders(told, step)
        if all(_covered(box, held.get(name, {})) for name, box in wanted):
            return step
    return None


def holders(told: Sequence[Told], step: int) -> dict[str, dict[Box, tuple[int, ...]]]:
    """By name and box, the ranks that hold it as of `step`, in order; no empty boxes."""
    found: dict[str, dict[Box, tuple[int, ...]]] = {}
    for rank, said in enumerate(told):
        parts = {p for offer in said.offers if offer.step == step for p in offer.parts}
        for part in parts:
            if volume(part.box):
                ranks = found.setdefault(part.name, {}).get(part.box, ())
                found[part.name][part.box] = (*ranks, rank)
    return {name: dict(sorted(boxes.items())) for name, boxes in found.items()}


def cells(box: Box, held: Mapping[Box, tuple[int, ...]]) -> list[tuple[Box, tuple[int, ...]]]:
    """Boxes that tile `box`, each with the ranks that hold all of it (none: no rank does)."""
    found: list[tuple[Box, tuple[int, ...]]] = [(box, ())]
    for other, ranks in held.items():
        if intersection(box, other) is None:
            continue
        cut: list[tuple[Box, tuple[int, ...]]] = []
        for region, known in found:
            common = intersection(region, other)
            if common is None:
                cut.append((region, known))
                continue
            cut.append((common, tuple(dict.fromkeys((*known, *ranks)))))
            cut += [(rest, known) for rest in without(region, common)]
        found = cut
    return found


def deal(told: Sequence[Told], step: int) -> list[Slice]:
    """Every wanted box in slices: from the taker itself what it holds, the rest from those who
    hold it, each time from who gives the fewest bytes so far; the largest first."""
    held, slices, open_slices = holders(told, step), list[Slice](), list[tuple[Slice, Ranks]]()
    for taker, said in enumerate(told):
        for index, part in enumerate(said.wanted):
            boxes = held.get(part.name, {}) if volume(part.box) else {}
            item_bytes = DTYPES[part.dtype].itemsize
            own = {box: (taker,) for box, ranks in boxes.items() if taker in ranks}
            for region, mine in cells(part.box, own) if boxes else ():
                if mine:
                    size = volume(region) * item_bytes
                    slices.append(Slice(taker, taker, index, part.name, region, size))
                    continue
                for cell, who in cells(region, boxes):
                    share = volume(cell) * item_bytes // len(who)
                    limit = min(SLICE_BYTES, max(LEAST_BYTES, share))
                    for box in cut(cell, item_bytes, limit):
                        size = volume(box) * item_bytes
                        open_slices.append((Slice(-1, taker, index, part.name, box, size), who))
    return slices + _dealt(open_slices, len(told))


Ranks = tuple[int, ...]


def cut(box: Box, item_bytes: int, limit_bytes: int) -> Iterator[Box]:
    """Boxes of at most `limit_bytes` (one element at least) that tile a box, in C order."""
    size = volume(box) * item_bytes
    dim = next((d for d, (start, stop) in enumerate(box) if stop - start > 1), None)
    if size <= limit_bytes or dim is None:
        yield box
        return
    start, stop = box[dim]
    rows = max(1, limit_bytes // (size // (stop - start)))
    for at in range(start, stop, rows):
        span = (at, min(at + rows, stop))
        yield from cut((*box[:dim], span, *box[dim + 1 :]), item_bytes, limit_bytes)


def rounds(slices: Sequence[Slice]) -> list[list[Slice]]:
    """The slices that are messages, each in the first round where giver and taker have room."""
    made: list[list[Slice]] = []
    loads: list[dict[tuple[str, int], int]] = []
    full: dict[tuple[str, int], int] = {}
    for part in slices:
        if part.giver == part.taker:
            continue
        ends, size = (("out", part.giver), ("in", part.taker)), part.padded_bytes
        at = max(full.get(end, 0) for end in ends)
        while at < len(made) and any(loads[at].get(e, 0) + size > ROUND_BYTES for e in ends):
            at += 1
        if at == len(made):
            made.append([])
            loads.append({})
        made[at].append(part)
        for end in ends:
            loads[at][end] = loads[at].get(end, 0) + size
            while full.get(end, 0) < len(made) and (
                loads[full.get(end, 0)].get(end, 0) + ALIGN_BYTES > ROUND_BYTES
            ):
                full[end] = full.get(end, 0) + 1
    return made


def _covered(box: Box, held: Mapping[Box, Ranks]) -> bool:
    return box in held or all(ranks for _, ranks in cells(box, held))


def _dealt(open_slices: Sequence[tuple[Slice, Ranks]], size: int) -> list[Slice]:
    """Slices with a giver. What only one can give comes first: the others even it out."""
    loads, dealt = [0] * size, []
    order = sorted(
        open_slices, key=lambda o: (len(o[1]) > 1, -o[0].bytes, o[0].name, o[0].box, o[0].taker)
    )
    for part, who in order:
        giver = min(who, key=lambda rank: (loads[rank], rank))
        loads[giver] += part.bytes
        dealt.append(Slice(giver, part.taker, part.index, part.name, part.box, part.bytes))
    return dealt
