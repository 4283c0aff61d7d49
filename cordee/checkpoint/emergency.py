"""Ranks that cannot make an island whole: what they hold together goes to disk before they wait.

The newest step that their tensors and their copies of lost neighbours' cover becomes a checkpoint
like any other, written together. Not here: when that is wanted (`elastic/supervisor.py`). Traded
away: an even deal of the writing; the first rank writes whatever it holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cordee.checkpoint.format import Piece, SaveStatus
from cordee.checkpoint.peer_restore import StateSnapshot, find_source, gather_inventories
from cordee.checkpoint.save import CommitReport, Saver
from cordee.checkpoint.train_state import LocalTensor
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
    """What came of it: the step whose state the ranks hold together (None: of no step all of it),
    and the checkpoint (on rank 0; None: `reason` says why there is none)."""

    step: int | None
    report: CommitReport | None
    reason: str = ""


def write_emergency_save(
    snapshots: Sequence[StateSnapshot],
    required_names: Collection[str],
    saver: Saver,
    generation: int,
    newest_step: int,
    group: dist.ProcessGroup | None,
    rank: int,
    size: int,
) -> EmergencySave:
    """Writes the newest step that all ranks' `snapshots` cover together; collective over the group.

    `required_names`: names of tensors without which nothing is whole. `newest_step`: the step of
    rank 0's newest checkpoint (-1: none); nothing older is written. RuntimeError: a peer was lost;
    what is kept stays as it was, and what was written is no checkpoint.
    """
    inventories = gather_inventories([], snapshots, group, size)
    tensor_boxes = {
        p.name: p
        for inventory in inventories
        for offer in inventory.offers
        for p in offer.tensor_boxes
    }
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
    metas = (
        offer.meta for inventory in inventories for offer in inventory.offers if offer.step == step
    )
    meta = {key: value for key, value in next(metas).items() if key != "owed"}
    own_transfers = [item for item in plan_transfers(inventories, step) if item.src_rank == rank]
    reason = ""
    try:
        saver.begin(step, generation, _make_pieces(own_transfers, snapshots, step), meta)
    except CheckpointError as error:  # the others must not wait for this rank
        reason = error.message
    return _commit(saver, step, reason, group, rank, size)


def _make_pieces(
    transfers: Sequence[Transfer], snapshots: Sequence[StateSnapshot], step: int
) -> list[Piece]:
    """What this rank writes of the tensors that it holds."""
    sources: dict[str, list[LocalTensor]] = {}
    for item in (
        item for snapshot in snapshots if snapshot.step == step for item in snapshot.tensors
    ):
        sources.setdefault(item.name, []).append(item)
    pieces = []
    for transfer in transfers:
        tensor_sources = sources[transfer.name]
        start = tuple(start for start, _ in transfer.box)
        pieces.append(
            Piece(
                transfer.name,
                find_source(tensor_sources, transfer),
                tensor_sources[0].local_slice.shape,
                start,
            )
        )
    return pieces


def _commit(
    saver: Saver, step: int, reason: str, group: dist.ProcessGroup | None, rank: int, size: int
) -> EmergencySave:
    """All ranks have written, rank 0 commits, and none tidies up before; `reason` this one
    cannot."""
    is_written = saver.join() is SaveStatus.WRITTEN
    report, reason = None, reason or saver.failure or ""
    written_flags = all_gather_rows(torch.tensor([int(is_written)]), group, size)[:, 0].tolist()
    if all(written_flags) and rank == 0:
        report = saver.commit()
        reason = saver.failure or ""
    elif not all(written_flags):
        reason = reason or f"rank {written_flags.index(0)} could not write"
    all_gather_rows(torch.ones(1), group, size)
    saver.finish()
    return EmergencySave(step, report, reason)


def event_fields(save: EmergencySave) -> Mapping[str, Any]:
    """The fields of the event."""
    fields: dict[str, Any] = {"state_of_step": save.step, "cause": save.reason}
    if save.report:
        fields |= {"bytes": save.report.bytes, "path": save.report.path.name}
    return fields
