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


class Decision(enum.Enum):
    """What is done with a step."""

    COMMIT = "commit"
    SKIP = "skip"
    STOP = "stop"


@dataclass(frozen=True)
class StepVerdict:
    """What the guard says, and why in one clause (empty when all is well)."""

    decision: Decision
    cause: str = ""


class StepGuard:
    """Judges steps; `consecutive_skips` counts dropped ones and is part of what survives a
    restart."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.consecutive_skips = 0

    def decide(
        self,
        losses: Iterable[float],
        grad_norm: float,
        known_cause: str = "",
        divergent_ranks: Sequence[int] = (),
    ) -> StepVerdict:
        """`losses` are the mean losses of all microbatches in order, `grad_norm` the global one;
        `divergent_ranks` are ranks that hold another norm (`find_divergent_ranks`).

        A gradient that is not finite for a known reason, the `known_cause`, is dropped and not
        counted.
        """
        nonfinite_indices = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if nonfinite_indices:
            cause = f"the loss of microbatch {_abbreviate(nonfinite_indices)} is not finite"
        elif divergent_ranks:
            cause = f"ranks hold different gradients: {_abbreviate(list(divergent_ranks))}"
        elif known_cause:
            return StepVerdict(Decision.SKIP, known_cause)
        elif not math.isfinite(grad_norm):
            cause = "the gradient is not finite"
        else:
            self.consecutive_skips = 0
            return StepVerdict(Decision.COMMIT)
        self.consecutive_skips += 1
        return StepVerdict(
            Decision.STOP if self.consecutive_skips >= self.limit else Decision.SKIP, cause
        )


def find_divergent_ranks(norms: Sequence[float], tolerance: float) -> list[int]:
    """Ranks whose norm of the agreed gradient is not that of the others: lies further apart than
    `tolerance` times its size, or is not finite where the others' is. All that differ from each
    other, where no more than half of them agree: who is wrong cannot be said then."""
    finite_norms = [norm for norm in norms if math.isfinite(norm)]
    if not finite_norms:
        return []

    def ranks_near(norm: float) -> list[int]:
        limit = tolerance * abs(norm)
        return [rank for rank, other in enumerate(norms) if abs(other - norm) <= limit]

    largest_group = max((ranks_near(norm) for norm in finite_norms), key=len)
    if len(largest_group) < len(finite_norms) and 2 * len(largest_group) <= len(norms):
        return list(range(len(norms)))
    return [rank for rank in range(len(norms)) if rank not in largest_group]


def nonfinite_names(named_gradients: Iterable[tuple[str, Tensor]], max_count: int = 3) -> list[str]:
    """Names of gradients that hold a non-finite element, the first `max_count` of them."""
    names = []
    for name, gradient in named_gradients:
        if not bool(torch.isfinite(gradient).all()):
            names.append(name)
            if len(names) == max_count:
                break
    return names


def _abbreviate(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:3]))
    return text if len(numbers) <= 3 else f"{text} and {len(numbers) - 3} more"
