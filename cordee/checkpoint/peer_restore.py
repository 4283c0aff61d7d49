"""Fills a new generation's tensors from what live ranks still hold.

Every rank tells what it needs and what it holds; all take the highest step that is covered, and
each box comes from a rank that holds it. No snapshot is overwritten before every rank has all its
messages, so a peer that dies meanwhile leaves them as they were; the price is a second copy, in
host memory, of what is overwritten in place.
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

from cordee.checkpoint.pieces import DTYPE_CODES
from cordee.checkpoint.train_state import LocalTensor
from cordee.checkpoint.transfer_plan import (
    RankInventory,
    SnapshotOffer,
    TensorBox,
    Transfer,
    check_consistency,
    newest_covered_step,
    plan_transfers,
    schedule_rounds,
)
from cordee.dist.tree_all_reduce import all_gather_bytes, all_gather_rows
from cordee.errors import CheckpointError
from cordee.layout.slices import Box, box_shape, intersection, relative_box

FaultPoint = Callable[[str, int], None]
"""Called with the name of a fault point and a step (training/fault_injection.py)."""


@dataclass(frozen=True)
class StateSnapshot:
    """What a rank still holds of the run after a fault: the tensors as of the end of `step`.

    `meta` is what `train_state.make_metadata` gave. `tensors` may be boxes of another layout.
    """

    step: int
    meta: Mapping[str, Any]
    tensors: Sequence[LocalTensor]


@dataclass(frozen=True)
class RestoreStats:
    """The step that was restored, how many ranks sent and received, and how many bytes."""

    step: int
    meta: Mapping[str, Any]
    donors: int
    receivers: int
    bytes: int


def no_fault(name: str, step: int) -> None:
    """The fault point that does nothing."""


def restore_from_peers(
    requests: Sequence[LocalTensor],
    snapshots: Sequence[StateSnapshot],
    group: dist.ProcessGroup | None,
    rank: int,
    size: int,
    fault_point: FaultPoint = no_fault,
) -> RestoreStats | None:
    """Fills the tensors of `requests` with the newest state that all ranks' `snapshots` cover
    together.

    Collective over the group (None: this rank alone). None, on all ranks, when no step is covered.
    Requested tensors may be those of a snapshot, of the same or another box or step. Fault points:
    fill.round before each round of messages, fill.end after the last.
    CheckpointError, on all ranks: a name with different shapes or dtypes. RuntimeError: a peer was
    lost; the tensors of all snapshots are as before.
    """
    inventories = gather_inventories(requests, snapshots, group, size)
    check_consistency(inventories)
    step = newest_covered_step(inventories)
    if step is None:
        return None
    transfers = plan_transfers(inventories, step)
    schedule = schedule_rounds(transfers)
    sources = tensors_by_name(snapshots, step)
    with torch.no_grad():
        targets = _choose_targets(requests, snapshots, sources)

        def output_view(transfer: Transfer) -> Tensor | None:
            target, request = targets[transfer.request_index], requests[transfer.request_index]
            box = request.local_slice.box
            return None if target is None else _box_view(target, box, transfer.box)

        buffers = (
            _round_buffer([sum(t.padded_bytes for t in r if t.src_rank == rank) for r in schedule]),
            _round_buffer([sum(t.padded_bytes for t in r if t.dst_rank == rank) for r in schedule]),
        )
        for round_transfers in schedule:
            fault_point("fill.round", step)
            _run_round(round_transfers, sources, output_view, buffers, rank, size, group)
        for transfer in transfers:
            if transfer.src_rank == transfer.dst_rank == rank:
                output = output_view(transfer)
                if output is not None:
                    output.copy_(find_source(sources[transfer.name], transfer))
        fault_point("fill.end", step)
        all_gather_rows(torch.ones(1), group, size)  # from here on nobody reads a snapshot
        for item, target in zip(requests, targets, strict=True):
            if target is not None and target is not item.tensor:
                item.tensor.copy_(target)
    messages = [transfer for transfer in transfers if transfer.src_rank != transfer.dst_rank]
    return RestoreStats(
        step=step,
        meta=snapshot_meta(inventories, step),
        donors=len({transfer.src_rank for transfer in messages}),
        receivers=len({transfer.dst_rank for transfer in messages}),
        bytes=sum(transfer.size_bytes for transfer in messages),
    )


def tensors_by_name(snapshots: Sequence[StateSnapshot], step: int) -> dict[str, list[LocalTensor]]:
    """This rank's tensors as of `step`."""
    tensors: dict[str, list[LocalTensor]] = {}
    for snapshot in snapshots:
        for item in snapshot.tensors if snapshot.step == step else ():
            tensors.setdefault(item.name, []).append(item)
    return tensors


def snapshot_meta(inventories: Sequence[RankInventory], step: int) -> Mapping[str, Any]:
    """The metadata of `step`, the same on every rank that offers it."""
    offers = (offer for inventory in inventories for offer in inventory.offers)
    return next(offer.meta for offer in offers if offer.step == step)


def tensor_box_of(local_tensor: LocalTensor) -> TensorBox:
    """What other ranks learn of a tensor. CheckpointError: a dtype that no checkpoint holds."""
    code = DTYPE_CODES.get(local_tensor.tensor.dtype)
    if code is None:
        raise CheckpointError(
            "a tensor of this dtype cannot be handed on",
            values={"tensor": local_tensor.name, "dtype": str(local_tensor.tensor.dtype)},
            fix=f"one of {', '.join(sorted(DTYPE_CODES.values()))}",
        )
    local_slice = local_tensor.local_slice
    return TensorBox(local_tensor.name, code, local_slice.shape, local_slice.box)


def tensor_box_row(tensor_box: TensorBox) -> list[Any]:
    """Its JSON row, [name, dtype, shape, box]."""
    return [tensor_box.name, tensor_box.dtype, tensor_box.shape, tensor_box.box]


def parse_tensor_box(row: Sequence[Any]) -> TensorBox:
    """The reverse of `tensor_box_row`."""
    name, dtype, shape, box = row
    return TensorBox(name, dtype, tuple(shape), tuple((start, stop) for start, stop in box))


def gather_inventories(
    requests: Sequence[LocalTensor],
    snapshots: Sequence[StateSnapshot],
    group: dist.ProcessGroup | None,
    size: int,
) -> list[RankInventory]:
    """What every rank needs and holds. A box is sent once, by number where snapshots share it."""
    box_indices: dict[TensorBox, int] = {}

    def indices_of(tensors: Sequence[LocalTensor]) -> list[int]:
        return [box_indices.setdefault(tensor_box_of(item), len(box_indices)) for item in tensors]

    own_message: dict[str, Any] = {
        "wanted": indices_of(requests),
        "kept": [[s.step, dict(s.meta), indices_of(s.tensors)] for s in snapshots],
    }
    own_message["parts"] = [tensor_box_row(tensor_box) for tensor_box in box_indices]
    inventories = []
    for text in all_gather_bytes(json.dumps(own_message).encode(), group, size):
        message = json.loads(text)
        tensor_boxes = [parse_tensor_box(row) for row in message["parts"]]
        offers = [
            SnapshotOffer(step, meta, [tensor_boxes[n] for n in indices])
            for step, meta, indices in message["kept"]
        ]
        inventories.append(RankInventory([tensor_boxes[n] for n in message["wanted"]], offers))
    return inventories


def _choose_targets(
    requests: Sequence[LocalTensor],
    snapshots: Sequence[StateSnapshot],
    sources: Mapping[str, Sequence[LocalTensor]],
) -> list[Tensor | None]:
    """The tensor that each request is received into: None where its value is in place already, host
    memory where it shares storage with a snapshot, else the tensor itself."""
    in_place_keys = {
        (name, item.local_slice.box, _memory_key(item.tensor))
        for name in sources
        for item in sources[name]
    }
    snapshot_storages = {
        item.tensor.untyped_storage().data_ptr()
        for snapshot in snapshots
        for item in snapshot.tensors
    } - {0}
    targets: list[Tensor | None] = []
    for item in requests:
        if (item.name, item.local_slice.box, _memory_key(item.tensor)) in in_place_keys:
            targets.append(None)
        # Written at once, it would change a snapshot that another rank may still need.
        elif item.tensor.untyped_storage().data_ptr() in snapshot_storages:
            targets.append(torch.empty(item.tensor.shape, dtype=item.tensor.dtype))
        else:
            targets.append(item.tensor)
    return targets


def _memory_key(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _box_view(tensor: Tensor, outer_box: Box, box: Box) -> Tensor:
    """The view of `box` in a tensor that is the box `outer_box`."""
    return tensor[tuple(slice(*span) for span in relative_box(box, outer_box))]


def find_source(sources: Sequence[LocalTensor], transfer: Transfer) -> Tensor:
    """The view that `transfer` asks of this rank, whose tensors of that name are `sources`."""
    for item in sources:
        if intersection(item.local_slice.box, transfer.box) == transfer.box:
            return _box_view(item.tensor, item.local_slice.box, transfer.box)
    raise CheckpointError(
        "a rank is asked for what it does not hold",
        values={"tensor": transfer.name, "box": transfer.box},
    )


def _run_round(
    transfers: Sequence[Transfer],
    sources: Mapping[str, Sequence[LocalTensor]],
    output_view: Callable[[Transfer], Tensor | None],
    buffers: tuple[Tensor, Tensor],
    rank: int,
    size: int,
    group: dist.ProcessGroup | None,
) -> None:
    """Packs boxes by receiver, does one all-to-all and unpacks them; collective, with the same
    transfers in the same order on every rank."""
    send_buffer, receive_buffer = buffers
    sends = sorted((t for t in transfers if t.src_rank == rank), key=lambda t: t.dst_rank)
    receives = sorted((t for t in transfers if t.dst_rank == rank), key=lambda t: t.src_rank)
    for transfer, message in zip(sends, _split_buffer(sends, send_buffer), strict=True):
        source = find_source(sources[transfer.name], transfer)
        message.view(source.dtype).view(source.shape).copy_(source)
    send_bytes, receive_bytes = [0] * size, [0] * size
    for transfer in sends:
        send_bytes[transfer.dst_rank] += transfer.padded_bytes
    for transfer in receives:
        receive_bytes[transfer.src_rank] += transfer.padded_bytes
    dist.all_to_all_single(
        receive_buffer[: sum(receive_bytes)], send_buffer[: sum(send_bytes)], receive_bytes,
        send_bytes, group=group,
    )  # fmt: skip
    for transfer, message in zip(receives, _split_buffer(receives, receive_buffer), strict=True):
        output = output_view(transfer)
        assert output is not None, "a box in place is not sent"
        output.copy_(message.view(output.dtype).view(box_shape(transfer.box)))


def _round_buffer(message_bytes: Sequence[int]) -> Tensor:
    """One buffer for all rounds."""
    return torch.empty(max(message_bytes, default=0), dtype=torch.uint8)


def _split_buffer(transfers: Sequence[Transfer], buffer: Tensor) -> list[Tensor]:
    """The bytes of each transfer in a message that holds them one after another."""
    starts = accumulate((transfer.padded_bytes for transfer in transfers), initial=0)
    pairs = zip(transfers, starts, strict=False)
    return [buffer[start : start + transfer.size_bytes] for transfer, start in pairs]
