"""Loss scaling for fp16 (Micikevicius et al. 2018): small gradients do not become zero.

The loss is multiplied before backward and the agreed gradient divided after it. Scales are powers
of two, so both are exact. Not here: what is done with a step that overflowed
(`training/step_guard.py`). Traded away: the library's GradScaler, which decides on one rank's
gradients and hides the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

INITIAL_SCALE = 2.0**16
MIN_SCALE = 1.0
MAX_SCALE = 2.0**24
GROWTH_INTERVAL = 2000
"""Good steps in a row after which the scale doubles."""


class LossScaler:
    """The factor on the loss; `fixed_scale` for ever where it is not `is_dynamic`.

    `value` and `good_steps` survive a restart. All ranks give it the same agreed numbers, so all
    hold the same scale.
    """

    def __init__(self, is_dynamic: bool, fixed_scale: float = MIN_SCALE) -> None:
        self.is_dynamic = is_dynamic
        self.value = INITIAL_SCALE if is_dynamic else fixed_scale
        self.good_steps = 0

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divides gradients by the scale, in place; exact but for values below 2^-102."""
        if self.value != 1.0:
            torch._foreach_mul_(list(gradients), 1.0 / self.value)

    def update(self, losses: Sequence[float], grad_norm: float) -> str:
        """Adapts to a step; says why it is dropped when its gradient overflowed, else "".

        Doubles after `GROWTH_INTERVAL` good steps, halves at an overflow. A loss that is not finite
        is no overflow of the gradient, and at a scale of 1 there is nothing left to halve: both are
        left to the guard.
        """
        if not self.is_dynamic or not all(map(math.isfinite, losses)):
            return ""
        old_value = self.value
        if math.isfinite(grad_norm):
            self.good_steps += 1
            if self.good_steps >= GROWTH_INTERVAL and old_value < MAX_SCALE:
                self.value, self.good_steps = 2 * old_value, 0
            return ""
        self.good_steps = 0
        if old_value <= MIN_SCALE:
            return ""
        self.value = old_value / 2
        return f"fp16 overflow; loss scale {old_value:.0f} -> {self.value:.0f}"
