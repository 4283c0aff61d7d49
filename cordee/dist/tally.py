"""One small vector from every rank in every step: losses, wishes and the state of its save.

It is how ranks decide together without further messages: who wants to leave, whether a save is
complete everywhere, and whose clock counts (rank 0's). Eight bytes a number, three numbers a rank
beside its losses and the digests of the samples that it loaded for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cordee.dist.exchange import gather_rows
from cordee.errors import RunError


@dataclass(frozen=True)
class Tally:
    """What all ranks said in a step. `losses` are in microbatch order, each in nats (summed)."""

    losses: tuple[float, ...]
    samples: tuple[int, ...]
    """Digests of the rows that were loaded for them (data/ledger.py)."""
    leave: bool
    saving: tuple[int, ...]
    clock_s: float


@dataclass(frozen=True)
class Wishes:
    """What this rank says: leave after this step, the state of its save, its clock."""

    leave: bool = False
    saving: int = 0
    clock_s: float = 0.0


def gather_tally(
    losses: Sequence[float],
    digests: Sequence[int],
    wishes: Wishes,
    spoken: Sequence[range],
    group: dist.ProcessGroup | None,
) -> Tally:
    """`spoken[r]` are the microbatches whose losses rank r knows a part of; parts add up.
    RunError when two that share a microbatch loaded other samples for it."""
    most = max(map(len, spoken))
    row = torch.zeros(3 + 2 * most, dtype=torch.float64)
    row[0], row[1], row[2] = float(wishes.leave), wishes.saving, wishes.clock_s
    row[3 : 3 + len(losses)] = torch.tensor(losses, dtype=torch.float64)
    row[3 + most : 3 + most + len(digests)] = torch.tensor(digests, dtype=torch.float64)
    rows = gather_rows(row, group, len(spoken)).tolist()
    known: dict[int, float] = {}
    loaded: dict[int, int] = {}
    for part, said in zip(spoken, rows, strict=True):
        for index, loss, digest in zip(part, said[3:], said[3 + most :], strict=False):
            known[index] = known.get(index, 0.0) + loss
            if loaded.setdefault(index, int(digest)) != int(digest):
                raise RunError(
                    "ranks that share a microbatch loaded different samples for it",
                    values={"microbatch": index, "digests": [loaded[index], int(digest)]},
                    fix="the same data on every host (cordee data verify)",
                )
    return Tally(
        losses=tuple(known[index] for index in sorted(known)),
        samples=tuple(loaded[index] for index in sorted(loaded)),
        leave=any(said[0] for said in rows),
        saving=tuple(int(said[1]) for said in rows),
        clock_s=rows[0][2],
    )
