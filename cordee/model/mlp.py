"""The two-layer perceptron of a block, and what stands between its layers.

Not here: experts (`moe.py`), which have the same formula and no modules of their own. Shape
suffixes as in `transformer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cordee.config.model import ModelSettings


class _SquaredReLU(torch.autograd.Function):
    """max(x, 0)^2 (So et al. 2021). Saves one tensor and its backward is one product of two: a
    fp32 step is 3 % faster than with `F.relu(x).square()`, whose backward is three operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Any shape."""
        root = x.relu()
        ctx.save_for_backward(root)
        return root * root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """2 grad max(x, 0): the root is zero where the slope is, so no mask is needed."""
        (root,) = ctx.saved_tensors
        return torch.mul(grad, root).mul_(2.0)


squared_relu: Callable[[Tensor], Tensor] = _SquaredReLU.apply
"""max(x, 0)^2 of any shape."""


def activation(up: Tensor, gate: Tensor | None) -> Tensor:
    """relu(up)^2, or silu(gate) x up (SwiGLU, Shazeer 2020); any shape."""
    return squared_relu(up) if gate is None else F.silu(gate) * up


class MLP(nn.Module):
    """down(bent(up(x), gate(x))) with `hidden_mask` features between; no bias."""

    def __init__(self, settings: ModelSettings, hidden: int) -> None:
        super().__init__()
        width = settings.width
        self.up = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False) if settings.mlp == "gated" else None
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        up_BTF: Tensor = self.up(x_BTD)
        gate_BTF = None if self.gate is None else self.gate(x_BTD)
        out_BTD: Tensor = self.down(activation(up_BTF, gate_BTF))
        return out_BTD
