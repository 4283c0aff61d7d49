"""The verdict on a step before it touches a parameter: commit, skip or stop.

Every rank judges the same numbers, the losses and norms that came in one message, so every rank
says the same; ranks whose norms differ hold different gradients, and their step is not committed.
A skipped step did not happen for parameters and optimiser; its samples are used up and the
metrics say so. Not here: loss spikes and rewinding. Traded away: one read of the norm per step on a
GPU, so that nothing non-finite is ever committed.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Say(enum.Enum):
    """What is done with a step."""

    COMMIT = "commit"
    SKIP = "skip"
    STOP = "stop"


@dataclass(frozen=True)
class Verdict:
    """What the guard says, and why in one clause (empty when all is well)."""

    say: Say
    cause: str = ""


class Guard:
    """Judges steps; `in_a_row` counts dropped ones and is part of what survives a restart."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0

    def judge(
        self, losses: Iterable[float], grad_norm: float, excuse: str = "", odd: Sequence[int] = ()
    ) -> Verdict:
        """`losses` are the mean losses of all microbatches in order, `grad_norm` the global one;
        `odd` are ranks that hold another norm (`odd_ranks`).

        A gradient that is not finite for a known reason, the `excuse`, is dropped and not counted.
        """
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            cause = f"the loss of microbatch {_some(bad)} is not finite"
        elif odd:
            cause = f"ranks hold different gradients: {_some(list(odd))}"
        elif excuse:
            return Verdict(Say.SKIP, excuse)
        elif not math.isfinite(grad_norm):
            cause = "the gradient is not finite"
        else:
            self.in_a_row = 0
            return Verdict(Say.COMMIT)
        self.in_a_row += 1
        return Verdict(Say.STOP if self.in_a_row >= self.limit else Say.SKIP, cause)


def odd_ranks(norms: Sequence[float], tolerance: float) -> list[int]:
    """Ranks whose norm of the agreed gradient is not that of the others: lies further apart than
    `tolerance` times its size, or is not finite where the others' is. All that differ from each
    other, where no more than half of them agree: who is wrong cannot be said then."""
    finite = [norm for norm in norms if math.isfinite(norm)]
    if not finite:
        return []

    def near(norm: float) -> list[int]:
        limit = tolerance * abs(norm)
        return [rank for rank, other in enumerate(norms) if abs(other - norm) <= limit]

    alike = max((near(norm) for norm in finite), key=len)
    if len(alike) < len(finite) and 2 * len(alike) <= len(norms):
        return list(range(len(norms)))
    return [rank for rank in range(len(norms)) if rank not in alike]


def name_culprits(named: Iterable[tuple[str, Tensor]], most: int = 3) -> list[str]:
    """Names of gradients that hold a non-finite element, the first `most` of them."""
    found = []
    for name, gradient in named:
        if not bool(torch.isfinite(gradient).all()):
            found.append(name)
            if len(found) == most:
                break
    return found


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:3]))
    return shown if len(numbers) <= 3 else f"{shown} and {len(numbers) - 3} more"
