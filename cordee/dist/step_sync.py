"""One small vector from every rank in every step: losses, wishes and the state of its save.

It is how ranks decide together without further messages: who wants to leave, whether a save is
complete everywhere, whose clock counts (rank 0's), who computes how fast, and what the gradient's
norm is, by which a step is judged: all judge what all said. Eight bytes a number, six numbers a
rank beside its losses and the digests of the samples that it loaded for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cordee.dist.tree_all_reduce import all_gather_rows
from cordee.errors import RunError

STATUS_COLUMNS = 6
"""Numbers that a rank says beside those of its microbatches."""


@dataclass(frozen=True)
class StepSummary:
    """What all ranks said in a step. `losses` are in microbatch order, each in nats (summed)."""

    losses: tuple[float, ...]
    sample_digests: tuple[int, ...]
    """Digests of the rows that were loaded for them (data/ledger.py)."""
    wants_stop: bool
    save_statuses: tuple[int, ...]
    clock_s: float
    compute_s: tuple[float, ...] = ()
    """What each rank took for its microbatches, waits for data left out."""
    grad_norms: tuple[float, ...] = ()
    """What each rank holds for the norm of the agreed gradient."""
    nonfinite_ranks: tuple[int, ...] = ()
    """Ranks whose own sums of gradients are not finite; they look when they are told to."""


@dataclass(frozen=True)
class RankStatus:
    """What this rank says: leave after this step, the state of its save, its clock, how long it
    computed in this step, the norm of the agreed gradient, and whether its own sums are not finite
    (`is_nonfinite`)."""

    wants_stop: bool = False
    save_status: int = 0
    clock_s: float = 0.0
    compute_s: float = 0.0
    grad_norm: float = 0.0
    is_nonfinite: bool = False


def gather_step_summary(
    losses: Sequence[float],
    digests: Sequence[int],
    status: RankStatus,
    loss_owners: Sequence[range],
    group: dist.ProcessGroup | None,
) -> StepSummary:
    """`spoken[r]` are the microbatches whose losses rank r knows a part of; parts add up.
    RunError when two that share a microbatch loaded other samples for it."""
    max_microbatches = max(map(len, loss_owners))
    row = torch.zeros(STATUS_COLUMNS + 2 * max_microbatches, dtype=torch.float64)
    status_values = (
        status.wants_stop,
        status.save_status,
        status.clock_s,
        status.compute_s,
        status.grad_norm,
        status.is_nonfinite,
    )
    row[:STATUS_COLUMNS] = torch.tensor(
        [float(value) for value in status_values], dtype=torch.float64
    )
    row[STATUS_COLUMNS : STATUS_COLUMNS + len(losses)] = torch.tensor(losses, dtype=torch.float64)
    row[STATUS_COLUMNS + max_microbatches : STATUS_COLUMNS + max_microbatches + len(digests)] = (
        torch.tensor(digests, dtype=torch.float64)
    )
    rows = all_gather_rows(row, group, len(loss_owners)).tolist()
    loss_by_index: dict[int, float] = {}
    digest_by_index: dict[int, int] = {}
    for microbatches, rank_row in zip(loss_owners, rows, strict=True):
        for index, loss, digest in zip(
            microbatches,
            rank_row[STATUS_COLUMNS:],
            rank_row[STATUS_COLUMNS + max_microbatches :],
            strict=False,
        ):
            loss_by_index[index] = loss_by_index.get(index, 0.0) + loss
            if digest_by_index.setdefault(index, int(digest)) != int(digest):
                raise RunError(
                    "ranks that share a microbatch loaded different samples for it",
                    values={"microbatch": index, "digests": [digest_by_index[index], int(digest)]},
                    fix="the same data on every host (cordee data verify)",
                )
    return StepSummary(
        losses=tuple(loss_by_index[index] for index in sorted(loss_by_index)),
        sample_digests=tuple(digest_by_index[index] for index in sorted(digest_by_index)),
        wants_stop=any(rank_row[0] for rank_row in rows),
        save_statuses=tuple(int(rank_row[1]) for rank_row in rows),
        clock_s=rows[0][2],
        compute_s=tuple(rank_row[3] for rank_row in rows),
        grad_norms=tuple(rank_row[4] for rank_row in rows),
        nonfinite_ranks=tuple(rank for rank, rank_row in enumerate(rows) if rank_row[5]),
    )
