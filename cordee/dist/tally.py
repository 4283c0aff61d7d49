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

from cordee.dist.exchange import gather_rows
from cordee.errors import RunError

OWN = 6
"""Numbers that a rank says beside those of its microbatches."""


@dataclass(frozen=True)
class Tally:
    """What all ranks said in a step. `losses` are in microbatch order, each in nats (summed)."""

    losses: tuple[float, ...]
    samples: tuple[int, ...]
    """Digests of the rows that were loaded for them (data/ledger.py)."""
    leave: bool
    saving: tuple[int, ...]
    clock_s: float
    compute_s: tuple[float, ...] = ()
    """What each rank took for its microbatches, waits for data left out."""
    norms: tuple[float, ...] = ()
    """What each rank holds for the norm of the agreed gradient."""
    sick: tuple[int, ...] = ()
    """Ranks whose own sums of gradients are not finite; they look when they are told to."""


@dataclass(frozen=True)
class Wishes:
    """What this rank says: leave after this step, the state of its save, its clock, how long it
    computed in this step, the norm of the agreed gradient, and whether its own sums are not finite
    (`sick`)."""

    leave: bool = False
    saving: int = 0
    clock_s: float = 0.0
    compute_s: float = 0.0
    norm: float = 0.0
    sick: bool = False


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
    row = torch.zeros(OWN + 2 * most, dtype=torch.float64)
    own = (wishes.leave, wishes.saving, wishes.clock_s, wishes.compute_s, wishes.norm, wishes.sick)
    row[:OWN] = torch.tensor([float(word) for word in own], dtype=torch.float64)
    row[OWN : OWN + len(losses)] = torch.tensor(losses, dtype=torch.float64)
    row[OWN + most : OWN + most + len(digests)] = torch.tensor(digests, dtype=torch.float64)
    rows = gather_rows(row, group, len(spoken)).tolist()
    known: dict[int, float] = {}
    loaded: dict[int, int] = {}
    for part, said in zip(spoken, rows, strict=True):
        for index, loss, digest in zip(part, said[OWN:], said[OWN + most :], strict=False):
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
        compute_s=tuple(said[3] for said in rows),
        norms=tuple(said[4] for said in rows),
        sick=tuple(rank for rank, said in enumerate(rows) if said[5]),
    )
