"""The verdict on a step before it touches a parameter: commit, skip or stop; and its result.

Every rank judges the same numbers, which came in one message, so every rank decides the same. A
skipped step changes no parameter and no optimiser state; its samples are used up.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cordee.dist.step_sync import StepSummary
from cordee.errors import RunError


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


@dataclass(frozen=True)
class StepResult:
    """What a step was: mean loss in nats before the update, global gradient norm before clipping,
    learning rate, verdict, what all ranks said, gradient norm by layer (None where no record is
    due), loss scale (None where it never changes), and, of a dropped step, names of parameters
    whose gradient is not finite."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    verdict: StepVerdict
    step_summary: StepSummary
    layer_grad_norms: dict[str, float] | None
    loss_scale: float | None = None
    nonfinite_parameters: tuple[str, ...] = ()

    @property
    def decision(self) -> Decision:
        """Whether the update was made."""
        return self.verdict.decision


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


def stop_error(limit: int, cause: str, names: Sequence[str]) -> RunError:
    """The end of a run of which `limit` steps in a row were dropped; `names`: not finite."""
    return RunError(
        f"{limit} steps in a row were dropped; no parameter was touched by them",
        values={"steps in a row": limit, "cause": cause, "in": list(names)},
        fix="a lower optim.lr (cordee lr finds one), clip.kind=norm, or look at the data there",
    )


def overflow_error(step: int, names: Sequence[str], saved_step: int | None) -> RunError:
    """The end of a run whose parameters `names`, or optimiser state, an update made not finite."""
    return RunError(
        "parameters, or the optimiser's state, are not finite; nothing of them was saved",
        values={
            "step": step,
            "cause": "not finite after an update",
            "in": list(names[:3]),
            "last good checkpoint": saved_step,
        },
        fix="a lower optim.lr (cordee lr finds one), clip.kind=norm, a larger optim.eps",
    )


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
