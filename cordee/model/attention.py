"""Causal self-attention with what it stands on: RMS norm and rotary positions.

Not here: the block around it (`transformer.py`), any split over ranks (`parallel/`), a cache for
sampling. Traded away: one implementation for all devices. On CPU the norm has its own backward and
short sequences do not use the library's attention, because both were slower there (figures below);
each fast version stands beside the obvious one and a test holds them equal.

Shape suffixes: B sequences, T positions, D width, H heads, E width of a head.
Figures: PyTorch 2.13, one thread of a Zen 4 core with AVX512_BF16, 4 x 256 tokens, width 192.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cordee.config.model import ModelSettings

NORM_EPS = 1e-6
"""Added to the mean square before the root."""

CHUNK = 128
"""Queries a chunk has in `chunked_attention`: 64 to 128 was best at 256 to 1024 positions."""

CHUNKED_UP_TO = 1024
"""Longest sequence for which CPU attention keeps its probabilities (they grow with T squared)."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products compute in: the autocast type when it is on, else the type of x."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


class _CpuNorm(torch.autograd.Function):
    """RMS norm with a backward of few passes: 0.30 ms forward and backward against 0.49 ms for
    `F.rms_norm`, whose CPU backward is a dozen elementwise operators; about 4 % of a bf16 step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x [..., D], gain [D] or None; computed in fp32 or wider, returned in `dtype`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = scale.square_().div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, gain, scale)
        ctx.dtype = x.dtype
        normed: Tensor = unit if gain is None else unit * gain
        return normed.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """dx = scale (g - unit mean(g unit)) with g = grad x gain; dgain = sum(grad x unit)."""
        unit, gain, scale = ctx.saved_tensors
        grad = grad.to(unit.dtype)
        product = grad * unit
        gain_grad = None
        if gain is not None:
            gain_grad = product.flatten(0, -2).sum(0).to(gain.dtype)
            product.mul_(gain)
            grad = grad * gain
        along = product.sum(-1, keepdim=True).div_(-unit.shape[-1])
        x_grad = torch.addcmul(grad, unit, along).mul_(scale)
        return x_grad.to(ctx.dtype), gain_grad, None


_cpu_norm: Callable[[Tensor, Tensor | None, torch.dtype], Tensor] = _CpuNorm.apply


def rms_norm(x: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) x gain over the last dim (Zhang & Sennrich 2019), in `dtype`."""
    if x.device.type == "cpu":
        return _cpu_norm(x, gain, dtype)
    gain = gain if gain is None else gain.to(x.dtype)
    return F.rms_norm(x, (x.shape[-1],), gain, NORM_EPS).to(dtype)


class RMSNorm(nn.Module):
    """RMS norm with a gain per feature; returns the type that the next matrix product wants, so
    that it is converted once and not once per product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return rms_norm(x_BTD, self.weight, compute_dtype(x_BTD))


def rotary_turns(length: int, head_width: int, base: float, device: torch.device) -> Tensor:
    """[T, E/2, 2]: cosine and sine of position x base^(-2i/E) (Su et al. 2021), made in fp64."""
    with torch.inference_mode(False), torch.no_grad():
        pair = torch.arange(0, head_width, 2, dtype=torch.float64, device="cpu") / head_width
        position = torch.arange(length, dtype=torch.float64, device="cpu")
        angle = torch.outer(position, base**-pair)
        return torch.stack((angle.cos(), angle.sin()), -1).float().to(device)


def rotate(x_BTHE: Tensor, turns_TE2: Tensor) -> Tensor:
    """Turns each pair of neighbouring features by its position's angle; returns fp32.

    A complex product: 0.18 ms forward and backward, against 0.35 to 0.53 ms for four ways to write
    it with halves and cosines.
    """
    if torch.compiler.is_compiling():  # the compiler fuses this, and nothing of complex numbers
        cos_T1E, sin_T1E = turns_TE2.unsqueeze(1).unbind(-1)
        real, imaginary = x_BTHE.float().view(*x_BTHE.shape[:-1], -1, 2).unbind(-1)
        turned = (real * cos_T1E - imaginary * sin_T1E, real * sin_T1E + imaginary * cos_T1E)
        return torch.stack(turned, -1).flatten(-2)
    turns_T1E = torch.view_as_complex(turns_TE2).unsqueeze(1)
    pairs = torch.view_as_complex(x_BTHE.float().view(*x_BTHE.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns_T1E).flatten(-2)


def chunked_attention(q_BTHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor) -> Tensor:
    """Causal softmax attention by chunks of queries, each against the keys up to its own end.

    The obvious formula, less the products that the mask would throw away. Forward and backward in
    ms: fp32 9.5 (library 11.2), bf16 5.6 (library 14.5); on two threads 6.6 (5.7) and 4.4 (8.5).
    The price is that the probabilities are kept for the backward, so long sequences use the
    library. [B, T, H, E] to [B, T, H, E].
    """
    batch, length, heads, width = q_BTHE.shape
    q_NTE, k_NTE, v_NTE = (
        x.transpose(1, 2).reshape(batch * heads, length, -1) for x in (q_BTHE, k_BTHE, v_BTHE)
    )
    k_NET = k_NTE.transpose(1, 2)
    rows = min(CHUNK, length)
    # -inf above the diagonal of the last `rows` queries; every chunk uses a corner of this strip.
    bias = q_NTE.new_full((rows, length), float("-inf")).triu_(length - rows + 1)
    chunks, end = [], 0
    for chunk in torch.split(q_NTE, rows, 1):
        end += chunk.shape[1]
        corner = bias[rows - chunk.shape[1] :, length - end :]
        score = torch.baddbmm(corner, chunk, k_NET[:, :, :end], alpha=width**-0.5)
        chunks.append(torch.bmm(score.softmax(-1, dtype=score.dtype), v_NTE[:, :end]))
    out_NTE = torch.cat(chunks, 1) if len(chunks) > 1 else chunks[0]
    return out_NTE.view(batch, heads, length, -1).transpose(1, 2)


def causal_attention(q_BTHE: Tensor, k_BTHE: Tensor, v_BTHE: Tensor) -> Tensor:
    """Causal attention of [B, T, H, E] by what is fastest on the device and length; keys and
    values may have fewer heads, each for a group of neighbouring query heads."""
    group = q_BTHE.shape[2] // k_BTHE.shape[2]
    if q_BTHE.device.type == "cpu" and q_BTHE.shape[1] <= CHUNKED_UP_TO:
        if group > 1:
            k_BTHE, v_BTHE = (x.repeat_interleave(group, 2) for x in (k_BTHE, v_BTHE))
        return chunked_attention(q_BTHE, k_BTHE, v_BTHE)
    q_BHTE, k_BHTE, v_BHTE = (x.transpose(1, 2) for x in (q_BTHE, k_BTHE, v_BTHE))
    out_BHTE = F.scaled_dot_product_attention(
        q_BHTE, k_BHTE, v_BHTE, is_causal=True, enable_gqa=group > 1
    )
    return out_BHTE.transpose(1, 2)


class Attention(nn.Module):
    """Query, key, value and output projections without bias around `causal_attention`.

    The number of heads is read off the projections' width, so that ranks that hold some heads run
    the same code.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width = settings.width
        self.head_width = width // settings.heads
        self.qk_norm = settings.qk_norm
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, settings.kv_width, bias=False)
        self.value = nn.Linear(width, settings.kv_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, turns_TE2: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]; position t sees positions up to t."""
        heads = (*x_BTD.shape[:2], -1, self.head_width)
        q_BTHE = self._place(self.query(x_BTD).view(heads), turns_TE2)
        k_BTHE = self._place(self.key(x_BTD).view(heads), turns_TE2)
        v_BTHE = self.value(x_BTD).view(heads)
        out_BTD: Tensor = self.out(causal_attention(q_BTHE, k_BTHE, v_BTHE).flatten(-2))
        return out_BTD

    def _place(self, x_BTHE: Tensor, turns_TE2: Tensor) -> Tensor:
        """Norm (without parameters) and rotary position, in fp32 and back."""
        placed = rms_norm(x_BTHE, None, torch.float32) if self.qk_norm else x_BTHE
        return rotate(placed, turns_TE2).to(x_BTHE.dtype)
