"""Ranks that cannot make an island whole: what they hold together goes to disk before they wait.

The newest step that their tensors and their copies of lost neighbours' cover becomes a checkpoint
like any other, written together. Not here: when that is wanted (`fault/supervise.py`). Traded away:
an even deal of the writing; the first rank writes whatever it holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cordee.checkpoint.deal import Part, Slice, Told, best_step, check_alike, deal
from cordee.checkpoint.format import Piece, SaveStatus
from cordee.checkpoint.peer import Kept, source_of, tell_all
from cordee.checkpoint.save import CommitReport, Saver
from cordee.checkpoint.state import Holding
from cordee.dist.exchange import gather_rows
from cordee.errors import CheckpointError
from cordee.layout.boxes import whole


@dataclass(frozen=True)
class Rescued:
    """What came of it: the step whose state the ranks hold together (None: of no step all of it),
    and the checkpoint (on rank 0; None: `why` says why there is none)."""

    step: int | None
    report: CommitReport | None
    why: str = ""


def rescue(
    kept: Sequence[Kept],
    required: Collection[str],
    saver: Saver,
    generation: int,
    newest: int,
    group: dist.ProcessGroup | None,
    rank: int,
    size: int,
) -> Rescued:
    """Writes the newest step that all ranks' `kept` cover together; collective over the group.

    `required`: names of tensors without which nothing is whole. `newest`: the step of rank 0's
    newest checkpoint (-1: none); nothing older is written. RuntimeError: a peer was lost; what is
    kept stays as it was, and what was written is no checkpoint.
    """
    told = tell_all([], kept, group, size)
    parts = {p.name: p for said in told for offer in said.offers for p in offer.parts}
    wanted = [Part(p.name, p.dtype, p.shape, whole(p.shape)) for p in parts.values()]
    told[0] = Told(sorted(wanted, key=lambda part: part.name), told[0].offers)
    check_alike(told)
    missing = sorted(set(required) - set(parts))
    step = None if missing or not parts else best_step(told)
    if step is None:
        lost = f"nobody holds {missing[0]}" if missing else "of no step they hold all"
        return Rescued(None, None, lost)
    known = int(gather_rows(torch.tensor([newest]), group, size)[0])
    if step <= known:
        return Rescued(step, None, f"the checkpoint of step {known} is as new")
    metas = (offer.meta for said in told for offer in said.offers if offer.step == step)
    meta = {key: value for key, value in next(metas).items() if key != "owed"}
    mine = [part for part in deal(told, step) if part.giver == rank]
    why = ""
    try:
        saver.begin(step, generation, _pieces(mine, kept, step), meta)
    except CheckpointError as error:  # the others must not wait for this rank
        why = error.what
    return _commit(saver, step, why, group, rank, size)


def _pieces(slices: Sequence[Slice], kept: Sequence[Kept], step: int) -> list[Piece]:
    """What this rank writes of the tensors that it holds."""
    sources: dict[str, list[Holding]] = {}
    for item in (item for moment in kept if moment.step == step for item in moment.held):
        sources.setdefault(item.name, []).append(item)
    found = []
    for part in slices:
        held = sources[part.name]
        start = tuple(start for start, _ in part.box)
        found.append(Piece(part.name, source_of(held, part), held[0].place.shape, start))
    return found


def _commit(
    saver: Saver, step: int, why: str, group: dist.ProcessGroup | None, rank: int, size: int
) -> Rescued:
    """All ranks have written, rank 0 commits, and none tidies up before; `why` this one cannot."""
    written = saver.join() is SaveStatus.WRITTEN
    report, why = None, why or saver.failure or ""
    states = gather_rows(torch.tensor([int(written)]), group, size)[:, 0].tolist()
    if all(states) and rank == 0:
        report = saver.commit()
        why = saver.failure or ""
    elif not all(states):
        why = why or f"rank {states.index(0)} could not write"
    gather_rows(torch.ones(1), group, size)
    saver.finish()
    return Rescued(step, report, why)


def told_of(found: Rescued) -> Mapping[str, Any]:
    """The fields of the event."""
    known: dict[str, Any] = {"state_of_step": found.step, "cause": found.why}
    if found.report:
        known |= {"bytes": found.report.bytes, "path": found.report.path.name}
    return known
