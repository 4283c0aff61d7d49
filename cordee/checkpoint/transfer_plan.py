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
from cordee.layout.slices import Box, Shape, intersection, subtract_box, volume

MAX_TRANSFER_BYTES = 4 << 20
"""Longest slice: a large tensor comes from several donors, and a round has room for some."""

MIN_SPLIT_BYTES = 64 << 10
"""A box below this is not cut to be shared by donors."""

MAX_ROUND_BYTES = 32 << 20
"""What a rank sends, and what it receives, in one round at most."""

ALIGN_BYTES = 16
"""Slices begin at multiples of this in a message, so that any dtype may lie there."""


@dataclass(frozen=True)
class TensorBox:
    """A box of the tensor `module_name` of `shape`; `dtype` is a safetensors code."""

    name: str
    dtype: str
    shape: Shape
    box: Box


@dataclass(frozen=True)
class SnapshotOffer:
    """Parts as of the end of `step`, and what describes that moment (JSON)."""

    step: int
    meta: Mapping[str, Any]
    tensor_boxes: Sequence[TensorBox]


@dataclass(frozen=True)
class RankInventory:
    """What one rank said: what it wants and what it can give."""

    requests: Sequence[TensorBox]
    offers: Sequence[SnapshotOffer]


@dataclass(frozen=True)
class Transfer:
    """`box` of the tensor `module_name` goes from rank `src_rank` into what `dst_rank` wants at
    `request_index`."""

    src_rank: int
    dst_rank: int
    request_index: int
    name: str
    box: Box
    size_bytes: int

    @property
    def padded_bytes(self) -> int:
        """The room that it takes in a message."""
        return align_up(self.size_bytes)


def align_up(size_bytes: int) -> int:
    """The next multiple of ALIGN_BYTES."""
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES


def check_consistency(inventories: Sequence[RankInventory]) -> None:
    """CheckpointError unless whoever speaks of a wanted tensor means the same dtype and shape."""
    specs: dict[str, tuple[str, Shape]] = {}
    for inventory in inventories:
        for tensor_box in inventory.requests:
            specs.setdefault(tensor_box.name, (tensor_box.dtype, tensor_box.shape))
    for rank, inventory in enumerate(inventories):
        offer_boxes = [
            tensor_box for offer in inventory.offers for tensor_box in offer.tensor_boxes
        ]
        for tensor_box in (*inventory.requests, *offer_boxes):
            spec = specs.get(tensor_box.name, (tensor_box.dtype, tensor_box.shape))
            if spec != (tensor_box.dtype, tensor_box.shape):
                raise CheckpointError(
                    "a live rank holds another tensor under this name",
                    values={"tensor": tensor_box.name, "rank": rank, "dtype": tensor_box.dtype,
                            "shape": tensor_box.shape, "wanted": spec},
                    fix="the same model and optimiser on every rank",
                )  # fmt: skip


def newest_covered_step(inventories: Sequence[RankInventory]) -> int | None:
    """The highest step at which all ranks' parts together cover all that is wanted, or None."""
    requests = {
        (tensor_box.name, tensor_box.box)
        for inventory in inventories
        for tensor_box in inventory.requests
        if volume(tensor_box.box)
    }
    steps = {offer.step for inventory in inventories for offer in inventory.offers}
    for step in sorted(steps, reverse=True):
        holders_by_name = find_holders(inventories, step)
        if all(_is_covered(box, holders_by_name.get(name, {})) for name, box in requests):
            return step
    return None


def find_holders(
    inventories: Sequence[RankInventory], step: int
) -> dict[str, dict[Box, tuple[int, ...]]]:
    """By name and box, the ranks that hold it as of `step`, in order; no empty boxes."""
    holders_by_name: dict[str, dict[Box, tuple[int, ...]]] = {}
    for rank, inventory in enumerate(inventories):
        tensor_boxes = {
            p for offer in inventory.offers if offer.step == step for p in offer.tensor_boxes
        }
        for tensor_box in tensor_boxes:
            if volume(tensor_box.box):
                ranks = holders_by_name.setdefault(tensor_box.name, {}).get(tensor_box.box, ())
                holders_by_name[tensor_box.name][tensor_box.box] = (*ranks, rank)
    return {name: dict(sorted(boxes.items())) for name, boxes in holders_by_name.items()}


def overlaps(
    box: Box, box_holders: Mapping[Box, tuple[int, ...]]
) -> list[tuple[Box, tuple[int, ...]]]:
    """Boxes that tile `box`, each with the ranks that hold all of it (none: no rank does)."""
    regions: list[tuple[Box, tuple[int, ...]]] = [(box, ())]
    for holder_box, ranks in box_holders.items():
        if intersection(box, holder_box) is None:
            continue
        next_regions: list[tuple[Box, tuple[int, ...]]] = []
        for region, region_ranks in regions:
            overlap = intersection(region, holder_box)
            if overlap is None:
                next_regions.append((region, region_ranks))
                continue
            next_regions.append((overlap, tuple(dict.fromkeys((*region_ranks, *ranks)))))
            next_regions += [
                (remainder, region_ranks) for remainder in subtract_box(region, overlap)
            ]
        regions = next_regions
    return regions


def plan_transfers(inventories: Sequence[RankInventory], step: int) -> list[Transfer]:
    """Every wanted box in slices: from the taker itself what it holds, the rest from those who
    hold it, each time from who gives the fewest bytes so far; the largest first."""
    holders_by_name, transfers, open_transfers = (
        find_holders(inventories, step),
        list[Transfer](),
        list[tuple[Transfer, Ranks]](),
    )
    for dst_rank, inventory in enumerate(inventories):
        for request_index, request in enumerate(inventory.requests):
            box_holders = holders_by_name.get(request.name, {}) if volume(request.box) else {}
            item_bytes = DTYPES[request.dtype].itemsize
            own_boxes = {
                box: (dst_rank,) for box, ranks in box_holders.items() if dst_rank in ranks
            }
            for region, own_ranks in overlaps(request.box, own_boxes) if box_holders else ():
                if own_ranks:
                    size_bytes = volume(region) * item_bytes
                    transfers.append(
                        Transfer(
                            dst_rank, dst_rank, request_index, request.name, region, size_bytes
                        )
                    )
                    continue
                for cell, cell_ranks in overlaps(region, box_holders):
                    share_bytes = volume(cell) * item_bytes // len(cell_ranks)
                    limit_bytes = min(MAX_TRANSFER_BYTES, max(MIN_SPLIT_BYTES, share_bytes))
                    for box in split_box(cell, item_bytes, limit_bytes):
                        size_bytes = volume(box) * item_bytes
                        open_transfers.append(
                            (
                                Transfer(
                                    -1, dst_rank, request_index, request.name, box, size_bytes
                                ),
                                cell_ranks,
                            )
                        )
    return transfers + _assign_sources(open_transfers, len(inventories))


Ranks = tuple[int, ...]


def split_box(box: Box, item_bytes: int, limit_bytes: int) -> Iterator[Box]:
    """Boxes of at most `limit_bytes` (one element at least) that tile a box, in C order."""
    size_bytes = volume(box) * item_bytes
    dim = next((d for d, (start, stop) in enumerate(box) if stop - start > 1), None)
    if size_bytes <= limit_bytes or dim is None:
        yield box
        return
    start, stop = box[dim]
    rows = max(1, limit_bytes // (size_bytes // (stop - start)))
    for row in range(start, stop, rows):
        span = (row, min(row + rows, stop))
        yield from split_box((*box[:dim], span, *box[dim + 1 :]), item_bytes, limit_bytes)


def schedule_rounds(transfers: Sequence[Transfer]) -> list[list[Transfer]]:
    """The slices that are messages, each in the first round where giver and taker have room."""
    schedule: list[list[Transfer]] = []
    round_loads: list[dict[tuple[str, int], int]] = []
    first_open_round: dict[tuple[str, int], int] = {}
    for transfer in transfers:
        if transfer.src_rank == transfer.dst_rank:
            continue
        endpoints, size_bytes = (
            (("out", transfer.src_rank), ("in", transfer.dst_rank)),
            transfer.padded_bytes,
        )
        round_index = max(first_open_round.get(endpoint, 0) for endpoint in endpoints)
        while round_index < len(schedule) and any(
            round_loads[round_index].get(e, 0) + size_bytes > MAX_ROUND_BYTES for e in endpoints
        ):
            round_index += 1
        if round_index == len(schedule):
            schedule.append([])
            round_loads.append({})
        schedule[round_index].append(transfer)
        for endpoint in endpoints:
            round_loads[round_index][endpoint] = (
                round_loads[round_index].get(endpoint, 0) + size_bytes
            )
            while first_open_round.get(endpoint, 0) < len(schedule) and (
                round_loads[first_open_round.get(endpoint, 0)].get(endpoint, 0) + ALIGN_BYTES
                > MAX_ROUND_BYTES
            ):
                first_open_round[endpoint] = first_open_round.get(endpoint, 0) + 1
    return schedule


def _is_covered(box: Box, box_holders: Mapping[Box, Ranks]) -> bool:
    return box in box_holders or all(ranks for _, ranks in overlaps(box, box_holders))


def _assign_sources(
    open_transfers: Sequence[tuple[Transfer, Ranks]], world_size: int
) -> list[Transfer]:
    """Slices with a giver. What only one can give comes first: the others even it out."""
    rank_loads, transfers = [0] * world_size, []
    order = sorted(
        open_transfers,
        key=lambda o: (len(o[1]) > 1, -o[0].size_bytes, o[0].name, o[0].box, o[0].dst_rank),
    )
    for transfer, ranks in order:
        src_rank = min(ranks, key=lambda rank: (rank_loads[rank], rank))
        rank_loads[src_rank] += transfer.size_bytes
        transfers.append(
            Transfer(
                src_rank,
                transfer.dst_rank,
                transfer.request_index,
                transfer.name,
                transfer.box,
                transfer.size_bytes,
            )
        )
    return transfers
