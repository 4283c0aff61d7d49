"""Ranks that are left without a whole island write what they still hold before they wait.

The newest step that their tensors and their copies of lost neighbours' cover together becomes a
checkpoint like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cordee.checkpoint.checkpointer import Checkpointer, CommitReport, SaveStatus
from cordee.checkpoint.peer_restore import (
    StateSnapshot,
    find_source,
    gather_inventories,
    snapshot_meta,
    tensors_by_name,
)
from cordee.checkpoint.pieces import Piece
from cordee.checkpoint.transfer_plan import (
    RankInventory,
    TensorBox,
    Transfer,
    check_consistency,
    newest_covered_step,
    plan_transfers,
)
from cordee.dist.tree_all_reduce import all_gather_rows
from cordee.errors import CheckpointError
from cordee.layout.slices import full_box


@dataclass(frozen=True)
class EmergencySave:
    """Its outcome: the step that the ranks hold all tensors of (None: there is none), and the
    checkpoint (on rank 0; None: `reason` says why there is none)."""

    step: int | None
    report: CommitReport | None
    reason: str = ""

    def event_fields(self) -> Mapping[str, Any]:
        fields: dict[str, Any] = {"state_of_step": self.step, "cause": self.reason}
        if self.report:
            fields |= {"bytes": self.report.bytes, "path": self.report.path.name}
        return fields


def write_emergency_save(
    snapshots: Sequence[StateSnapshot],
    required_names: Collection[str],
    checkpointer: Checkpointer,
    generation: int,
    newest_step: int,
    group: dist.ProcessGroup | None,
    rank: int,
    size: int,
) -> EmergencySave:
    """Writes the newest step that all ranks' `snapshots` cover together; collective over the group.

    `required_names`: tensors without which no step is complete. `newest_step`: the step of rank 0's
    newest checkpoint (-1: none); nothing older is written. RuntimeError: a peer was lost; the
    snapshots are as before, and what was written is no checkpoint.
    """
    inventories = gather_inventories([], snapshots, group, size)
    tensor_boxes = {
        p.name: p
        for inventory in inventories
        for offer in inventory.offers
        for p in offer.tensor_boxes
    }
    # As if rank 0 asked for every tensor whole: the transfers then say who writes which box.
    requests = [
        TensorBox(p.name, p.dtype, p.shape, full_box(p.shape)) for p in tensor_boxes.values()
    ]
    inventories[0] = RankInventory(
        sorted(requests, key=lambda item: item.name), inventories[0].offers
    )
    check_consistency(inventories)
    missing_names = sorted(set(required_names) - set(tensor_boxes))
    step = None if missing_names or not tensor_boxes else newest_covered_step(inventories)
    if step is None:
        problem = (
            f"nobody holds {missing_names[0]}" if missing_names else "of no step they hold all"
        )
        return EmergencySave(None, None, problem)
    saved_step = int(all_gather_rows(torch.tensor([newest_step]), group, size)[0])
    if step <= saved_step:
        return EmergencySave(step, None, f"the checkpoint of step {saved_step} is as new")
    metadata = snapshot_meta(inventories, step)
    meta = {key: value for key, value in metadata.items() if key != "owed"}
    own_transfers = [item for item in plan_transfers(inventories, step) if item.src_rank == rank]
    reason = ""
    try:
        checkpointer.begin(step, generation, _make_pieces(own_transfers, snapshots, step), meta)
    except CheckpointError as error:  # the others must not wait for this rank
        reason = error.message
    is_written = checkpointer.join() is SaveStatus.WRITTEN
    report, reason = None, reason or checkpointer.failure or ""
    written_flags = all_gather_rows(torch.tensor([int(is_written)]), group, size)[:, 0].tolist()
    if all(written_flags) and rank == 0:
        report = checkpointer.commit()
        reason = checkpointer.failure or ""
    elif not all(written_flags):
        reason = reason or f"rank {written_flags.index(0)} could not write"
    all_gather_rows(torch.ones(1), group, size)  # nobody removes files before rank 0 has committed
    checkpointer.finish()
    return EmergencySave(step, report, reason)


def _make_pieces(
    transfers: Sequence[Transfer], snapshots: Sequence[StateSnapshot], step: int
) -> list[Piece]:
    sources, pieces = tensors_by_name(snapshots, step), []
    for transfer in transfers:
        tensor = find_source(sources[transfer.name], transfer)
        shape = sources[transfer.name][0].local_slice.shape
        pieces.append(
            Piece(transfer.name, tensor, shape, tuple(start for start, _ in transfer.box))
        )
    return pieces
