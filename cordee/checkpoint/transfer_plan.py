"""Which rank sends which box to whom, so that every requested box is filled. No torch.

Every rank computes the same plan from the same inventories. All pairs of ranks count as equally
fast. Time grows with requests x boxes of a tensor where the layout changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cordee.checkpoint.format import ITEM_BYTES
from cordee.errors import CheckpointError
from cordee.layout.slices import Box, Shape, intersection, subtract_box, volume

MAX_TRANSFER_BYTES = 4 << 20
"""Longest transfer: a large tensor comes from several ranks, and a round has room for some."""

MIN_SPLIT_BYTES = 64 << 10
"""A box below this comes from one rank."""

MAX_ROUND_BYTES = 32 << 20
"""At most this much is sent, and received, by a rank in one round."""

ALIGN_BYTES = 16
"""Boxes begin at multiples of this in a message, so that any dtype may lie there."""


Ranks = tuple[int, ...]


@dataclass(frozen=True)
class TensorBox:
    """A box of the tensor `name` of `shape`; `dtype` is a safetensors code."""

    name: str
    dtype: str
    shape: Shape
    box: Box


@dataclass(frozen=True)
class SnapshotOffer:
    """Boxes that a rank holds as of the end of `step`, and the metadata of that step (JSON)."""

    step: int
    meta: Mapping[str, Any]
    tensor_boxes: Sequence[TensorBox]


@dataclass(frozen=True)
class RankInventory:
    """What one rank needs and what it can give."""

    requests: Sequence[TensorBox]
    offers: Sequence[SnapshotOffer]


@dataclass(frozen=True)
class Transfer:
    """`box` of the tensor `name` goes from rank `src_rank` into request number `request_index` of
    rank `dst_rank`."""

    src_rank: int
    dst_rank: int
    request_index: int
    name: str
    box: Box
    size_bytes: int

    @property
    def padded_bytes(self) -> int:
        return align_up(self.size_bytes)


def align_up(size_bytes: int) -> int:
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES


def check_consistency(inventories: Sequence[RankInventory]) -> None:
    """CheckpointError unless all ranks give a requested tensor the same dtype and shape."""
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
    """The highest step at which all ranks' boxes together cover all requests, or None."""
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


def find_holders(inventories: Sequence[RankInventory], step: int) -> dict[str, dict[Box, Ranks]]:
    """By name and box, the ranks that hold it as of `step`, in order; without empty boxes."""
    holders_by_name: dict[str, dict[Box, Ranks]] = {}
    for rank, inventory in enumerate(inventories):
        tensor_boxes = {
            p for offer in inventory.offers if offer.step == step for p in offer.tensor_boxes
        }
        for tensor_box in tensor_boxes:
            if volume(tensor_box.box):
                ranks = holders_by_name.setdefault(tensor_box.name, {}).get(tensor_box.box, ())
                holders_by_name[tensor_box.name][tensor_box.box] = (*ranks, rank)
    return {name: dict(sorted(boxes.items())) for name, boxes in holders_by_name.items()}


def overlaps(box: Box, box_holders: Mapping[Box, tuple[int, ...]]) -> list[tuple[Box, Ranks]]:
    """Boxes that tile `box`, each with the ranks that hold all of it (none: no rank does)."""
    regions: list[tuple[Box, Ranks]] = [(box, ())]
    for holder_box, ranks in box_holders.items():
        if intersection(box, holder_box) is None:
            continue
        next_regions: list[tuple[Box, Ranks]] = []
        for region, region_ranks in regions:
            overlap = intersection(region, holder_box)
            if overlap is None:
                next_regions.append((region, region_ranks))
                continue
            # The overlap gains these holders; the rest of the region, in boxes, does not.
            next_regions.append((overlap, tuple(dict.fromkeys((*region_ranks, *ranks)))))
            next_regions += [(rest, region_ranks) for rest in subtract_box(region, overlap)]
        regions = next_regions
    return regions


def plan_transfers(inventories: Sequence[RankInventory], step: int) -> list[Transfer]:
    """Transfers that fill every request: from the rank itself what it holds, the rest from holders,
    the largest first, each from the holder that sends the fewest bytes so far."""
    holders_by_name = find_holders(inventories, step)
    transfers: list[Transfer] = []
    open_transfers: list[tuple[Transfer, Ranks]] = []  # without a source, and who could be it
    for dst_rank, inventory in enumerate(inventories):
        for request_index, request in enumerate(inventory.requests):
            box_holders = holders_by_name.get(request.name, {}) if volume(request.box) else {}
            item_bytes = ITEM_BYTES[request.dtype]
            own_boxes = {
                box: (dst_rank,) for box, ranks in box_holders.items() if dst_rank in ranks
            }
            for region, own_ranks in overlaps(request.box, own_boxes) if box_holders else ():
                if own_ranks:
                    transfer = Transfer(dst_rank, dst_rank, request_index, request.name, region,
                                        volume(region) * item_bytes)  # fmt: skip
                    transfers.append(transfer)
                    continue
                for cell, cell_ranks in overlaps(region, box_holders):
                    share_bytes = volume(cell) * item_bytes // len(cell_ranks)
                    limit_bytes = min(MAX_TRANSFER_BYTES, max(MIN_SPLIT_BYTES, share_bytes))
                    for box in split_box(cell, item_bytes, limit_bytes):
                        transfer = Transfer(-1, dst_rank, request_index, request.name, box,
                                            volume(box) * item_bytes)  # fmt: skip
                        open_transfers.append((transfer, cell_ranks))
    return transfers + _assign_sources(open_transfers, len(inventories))


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
    """The transfers between two ranks, each in the first round where both have room for it."""
    schedule: list[list[Transfer]] = []
    round_loads: list[dict[tuple[str, int], int]] = []
    first_open_round: dict[tuple[str, int], int] = {}
    for transfer in transfers:
        if transfer.src_rank == transfer.dst_rank:
            continue
        endpoints = (("out", transfer.src_rank), ("in", transfer.dst_rank))
        size_bytes = transfer.padded_bytes
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
            load_bytes = round_loads[round_index].get(endpoint, 0) + size_bytes
            round_loads[round_index][endpoint] = load_bytes
            # Full rounds are not looked at again, or the search would be quadratic in rounds.
            first = first_open_round.get(endpoint, 0)
            while first < len(schedule) and (
                round_loads[first].get(endpoint, 0) + ALIGN_BYTES > MAX_ROUND_BYTES
            ):
                first += 1
            first_open_round[endpoint] = first
    return schedule


def _is_covered(box: Box, box_holders: Mapping[Box, Ranks]) -> bool:
    return box in box_holders or all(ranks for _, ranks in overlaps(box, box_holders))


def _assign_sources(
    open_transfers: Sequence[tuple[Transfer, Ranks]], world_size: int
) -> list[Transfer]:
    rank_loads, transfers = [0] * world_size, []
    # What only one rank holds comes first: boxes with a choice then even out the loads.
    order = sorted(
        open_transfers,
        key=lambda o: (len(o[1]) > 1, -o[0].size_bytes, o[0].name, o[0].box, o[0].dst_rank),
    )
    for transfer, ranks in order:
        src_rank = min(ranks, key=lambda rank: (rank_loads[rank], rank))
        rank_loads[src_rank] += transfer.size_bytes
        transfers.append(replace(transfer, src_rank=src_rank))
    return transfers
