"""Linear layers that multiply in fp8, with one scale per tensor, computed anew at each use.

Activations and weights are e4m3, gradients e5m2 (Micikevicius et al. 2022); sums are wide, and a
weight's gradient has the weight's type. Scales from earlier steps would save a pass over each
tensor, but they would be state that has to survive restarts.

Shape suffixes: N tokens, I inputs, O outputs; a tensor is [rows, columns] in memory order, and
`x.t()` of it is what the library calls column-major.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from cordee.model.layers import autocast_to, compute_dtype

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2

MIN_AMAX = 2.0**-100
"""Lower bound of the maximum that a scale is computed from, so that zeros stay zeros."""


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in fp8, scaled so that its largest element is the largest of `dtype`, and the fp32 scale
    (0-d): x is about quantised x scale. What is not finite stays so."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=MIN_AMAX) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def scaled_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """(a [M, K] times b [P, K] transposed) x both scales, in `dtype`."""
    # A CPU emulates it by a product that autocast would round.
    with autocast_to(a.device.type, None):
        return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=dtype)


class _Fp8Linear(torch.autograd.Function):
    """y = x w^T; both gradients are products in fp8 too."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns y [N, O] in `dtype`; keeps both operands in fp8."""
        x8_NI, x_scale = quantise(x_NI, E4M3)
        w8_OI, w_scale = quantise(weight_OI, E4M3)
        # A weight that FSDP2 gathered (in a narrower type) is kept as it is, to be gathered again:
        # an fp8 copy would keep the whole island's weights on this rank until the backward.
        operand_OI = w8_OI if weight_OI.dtype == torch.float32 else weight_OI
        ctx.save_for_backward(x8_NI, x_scale, operand_OI, w_scale)
        ctx.types = x_NI.dtype, weight_OI.dtype
        return scaled_product(x8_NI, w8_OI, x_scale, w_scale, dtype)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """dx = g w, dw = g^T x."""
        x8_NI, x_scale, operand_OI, w_scale = ctx.saved_tensors
        x_type, weight_type = ctx.types
        g8_NO, g_scale = quantise(grad_NO, E5M2)
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            w8_OI = operand_OI if operand_OI.dtype == E4M3 else quantise(operand_OI, E4M3)[0]
            w8_IO = w8_OI.t().contiguous()
            x_grad = scaled_product(g8_NO, w8_IO, g_scale, w_scale, x_type)
        if ctx.needs_input_grad[1]:
            g8_ON, x8_IN = g8_NO.t().contiguous(), x8_NI.t().contiguous()
            weight_grad = scaled_product(g8_ON, x8_IN, g_scale, x_scale, weight_type)
        return x_grad, weight_grad, None


fp8_product: Callable[[Tensor, Tensor, torch.dtype], Tensor] = _Fp8Linear.apply
"""(x [N, I], weight [O, I], dtype of the result) -> x weight^T [N, O]."""


def use_fp8(block: nn.Module) -> None:
    """Makes every nn.Linear inside `block` multiply in fp8, in place."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.forward = MethodType(_fp8_forward, module)  # type: ignore[method-assign]


def _fp8_forward(linear: nn.Linear, x: Tensor) -> Tensor:
    """[..., I] to [..., O], in the type that autocast says."""
    y_NO = fp8_product(x.flatten(0, -2), linear.weight, compute_dtype(x))
    return y_NO.view(*x.shape[:-1], -1)
