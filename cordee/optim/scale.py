"""Loss scaling for fp16 (Micikevicius et al. 2018): small gradients do not become zero.

The loss is multiplied before backward and the agreed gradient divided after it. Scales are powers
of two, so both are exact. Not here: what is done with a step that overflowed (`fault/guard.py`).
Traded away: the library's GradScaler, which decides on one rank's gradients and hides the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FIRST = 2.0**16
LEAST = 1.0
MOST = 2.0**24
GOOD_STEPS = 2000
"""Good steps in a row after which the scale doubles."""


class LossScale:
    """The factor on the loss; `fixed` for ever where it is not `dynamic`.

    `value` and `good_steps` survive a restart. All ranks give it the same agreed numbers, so all
    hold the same scale.
    """

    def __init__(self, dynamic: bool, fixed: float = LEAST) -> None:
        self.dynamic = dynamic
        self.value = FIRST if dynamic else fixed
        self.good_steps = 0

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divides gradients by the scale, in place; exact but for values below 2^-102."""
        if self.value != 1.0:
            torch._foreach_mul_(list(gradients), 1.0 / self.value)

    def follow(self, losses: Sequence[float], grad_norm: float) -> str:
        """Adapts to a step; says why it is dropped when its gradient overflowed, else "".

        Doubles after `GOOD_STEPS` good steps, halves at an overflow. A loss that is not finite is
        no overflow of the gradient, and at a scale of 1 there is nothing left to halve: both are
        left to the guard.
        """
        if not self.dynamic or not all(map(math.isfinite, losses)):
            return ""
        before = self.value
        if math.isfinite(grad_norm):
            self.good_steps += 1
            if self.good_steps >= GOOD_STEPS and before < MOST:
                self.value, self.good_steps = 2 * before, 0
            return ""
        self.good_steps = 0
        if before <= LEAST:
            return ""
        self.value = before / 2
        return f"fp16 overflow; loss scale {before:.0f} -> {self.value:.0f}"
