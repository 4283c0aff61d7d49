"""Causal self-attention with RMS norm and rotary positions.

Shape suffixes: B sequences, T positions, S positions of keys (at least T: the queries are the last
T of them), D width, H heads, K heads of keys and values, E width of a head, N = B x H.
Figures: PyTorch 2.13, one thread of a Zen 4 core with AVX512_BF16, 4 x 256 tokens, width 192.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cordee.config.model import ModelSettings
from cordee.model.layers import compute_dtype

QUERY_CHUNK = 128
"""Queries a chunk has in `chunked_attention`: 64 to 128 was best at 256 to 1024 positions."""

MAX_CHUNKED_LENGTH = 1024
"""Longest sequence for which CPU attention keeps its probabilities (they grow with T squared, or
with T x window: its square is the most of them that a head keeps)."""

MASKED_QUERY_CHUNK = 1024
"""Most queries that the library's attention gets at once where it needs a mask (a mask of T x T
bytes would be 1 GiB at 32,768 positions)."""


class _CpuRMSNorm(torch.autograd.Function):
    """RMS norm with a backward of few passes: 0.30 ms forward and backward against 0.49 ms for
    `F.rms_norm`, whose CPU backward is a dozen elementwise operators; about 4 % of a bf16 step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, dtype: torch.dtype, eps: float) -> Tensor:
        """x [..., D], gain [D] or None; computed in fp32 or wider, returned in `dtype`."""
        wide_dtype = torch.promote_types(x.dtype, torch.float32)
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, gain, scale)
        ctx.dtype = x.dtype
        output: Tensor = unit if gain is None else unit * gain
        return output.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """dx = scale (g - unit mean(g unit)) with g = grad x gain; dgain = sum(grad x unit)."""
        unit, gain, scale = ctx.saved_tensors
        grad = grad.to(unit.dtype)
        product = grad * unit
        gain_grad = None
        if gain is not None:
            gain_grad = product.flatten(0, -2).sum(0).to(gain.dtype)
            product.mul_(gain)
            grad = grad * gain
        projection = product.sum(-1, keepdim=True).div_(-unit.shape[-1])
        x_grad = torch.addcmul(grad, unit, projection).mul_(scale)
        return x_grad.to(ctx.dtype), gain_grad, None, None


_cpu_rms_norm: Callable[[Tensor, Tensor | None, torch.dtype, float], Tensor] = _CpuRMSNorm.apply


def rms_norm(x: Tensor, gain: Tensor | None, dtype: torch.dtype, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) x gain over the last dim (Zhang & Sennrich 2019), in `dtype`."""
    if x.device.type == "cpu":
        return _cpu_rms_norm(x, gain, dtype, eps)
    gain = gain if gain is None else gain.to(x.dtype)
    return F.rms_norm(x, (x.shape[-1],), gain, eps).to(dtype)


class RMSNorm(nn.Module):
    """RMS norm with a gain per feature; returns the type that the next matrix product wants, so
    that it is converted once and not once per product."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return rms_norm(x_BTD, self.weight, compute_dtype(x_BTD), self.eps)


def rope_table(length: int, head_width: int, base: float, device: torch.device) -> Tensor:
    """[T, E/2, 2]: cosine and sine of position x base^(-2i/E) (Su et al. 2021), made in fp64."""
    with torch.inference_mode(False), torch.no_grad():
        pair = torch.arange(0, head_width, 2, dtype=torch.float64, device="cpu") / head_width
        position = torch.arange(length, dtype=torch.float64, device="cpu")
        angle = torch.outer(position, base**-pair)
        return torch.stack((angle.cos(), angle.sin()), -1).float().to(device)


def apply_rope(x_BTHE: Tensor, rope_TE2: Tensor) -> Tensor:
    """Turns each pair of neighbouring features by its position's angle; returns fp32.

    A complex product: 0.18 ms forward and backward, against 0.35 to 0.53 ms for four ways to write
    it with halves and cosines.
    """
    if torch.compiler.is_compiling():  # the compiler fuses this, and nothing of complex numbers
        cos_T1E, sin_T1E = rope_TE2.unsqueeze(1).unbind(-1)
        real, imaginary = x_BTHE.float().view(*x_BTHE.shape[:-1], -1, 2).unbind(-1)
        features = (real * cos_T1E - imaginary * sin_T1E, real * sin_T1E + imaginary * cos_T1E)
        return torch.stack(features, -1).flatten(-2)
    rope_T1E = torch.view_as_complex(rope_TE2).unsqueeze(1)
    pairs = torch.view_as_complex(x_BTHE.float().view(*x_BTHE.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rope_T1E).flatten(-2)


def visible_range(queries: range, keys: range, window: int) -> range:
    """The positions of `keys` that at least one of `queries` sees. A query sees positions up to its
    own, and the last `window` of those (0: all)."""
    start = max(keys.start, queries.start - window + 1) if window else keys.start
    return range(start, max(start, min(keys.stop, queries.stop)))


def hidden_mask(queries: range, keys: range, window: int, device: torch.device) -> Tensor | None:
    """bool [queries, keys], true where a query does not see a key; None if all see all."""
    all_past = keys.stop - 1 <= queries.start
    if all_past and (not window or keys.start > queries.stop - 1 - window):
        return None
    query_position = torch.arange(queries.start, queries.stop, device=device)
    distance = query_position[:, None] - torch.arange(keys.start, keys.stop, device=device)
    return (distance < 0) | (distance >= window) if window else distance < 0


def chunked_attention(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, window: int = 0) -> Tensor:
    """Causal softmax attention by chunks of queries, each against the keys that it sees.

    The obvious formula, less the products that the mask would throw away. Forward and backward in
    ms: fp32 9.5 (library 11.2), bf16 5.6 (library 14.5); on two threads 6.6 (5.7) and 4.4 (8.5).
    The price is that the probabilities are kept for the backward, so long sequences use the
    library. [B, T, H, E] to [B, T, H, E].
    """
    batch, length, heads, width = q_BTHE.shape
    q_NTE, k_NSE, v_NSE = (
        x.transpose(1, 2).reshape(batch * heads, x.shape[1], -1) for x in (q_BTHE, k_BSHE, v_BSHE)
    )
    k_NES = k_NSE.transpose(1, 2)
    key_count, rows = k_NSE.shape[1], min(QUERY_CHUNK, length)
    max_keys = min(key_count, rows + window - 1) if window else key_count
    # -inf where the last `rows` queries do not see; every chunk uses a corner of this strip.
    bias = q_NTE.new_full((rows, max_keys), float("-inf")).triu_(max_keys - rows + 1)
    if window:
        bias += torch.full_like(bias, float("-inf")).tril_(max_keys - rows - window)
    chunks, end = [], key_count - length
    for chunk in torch.split(q_NTE, rows, 1):
        key_range = visible_range(range(end, end + chunk.shape[1]), range(key_count), window)
        end = key_range.stop
        corner = bias[rows - chunk.shape[1] :, max_keys - len(key_range) :]
        k_NEC, v_NCE = k_NES[:, :, key_range.start : end], v_NSE[:, key_range.start : end]
        score = torch.baddbmm(corner, chunk, k_NEC, alpha=width**-0.5)
        chunks.append(torch.bmm(score.softmax(-1, dtype=score.dtype), v_NCE))
    out_NTE = torch.cat(chunks, 1) if len(chunks) > 1 else chunks[0]
    return out_NTE.view(batch, heads, length, -1).transpose(1, 2)


def masked_attention(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, window: int = 0) -> Tensor:
    """The library's attention for windows and for more keys than queries, which its `is_causal`
    does not know: chunks of queries, each with a small mask. [B, T, H, E] to [B, T, H, E]."""
    key_count, end = k_BSHE.shape[1], k_BSHE.shape[1] - q_BTHE.shape[1]
    k_BHSE, v_BHSE = k_BSHE.transpose(1, 2), v_BSHE.transpose(1, 2)
    # Chunks much longer than the window would be mostly mask.
    rows = min(MASKED_QUERY_CHUNK, max(QUERY_CHUNK, window)) if window else MASKED_QUERY_CHUNK
    chunks = []
    for chunk in torch.split(q_BTHE.transpose(1, 2), rows, 2):
        queries = range(end, end + chunk.shape[2])
        key_range = visible_range(queries, range(key_count), window)
        end = key_range.stop
        k_BHCE, v_BHCE = k_BHSE[:, :, key_range.start : end], v_BHSE[:, :, key_range.start : end]
        is_hidden = hidden_mask(queries, key_range, window, chunk.device)
        mask = None if is_hidden is None else ~is_hidden
        chunks.append(F.scaled_dot_product_attention(chunk, k_BHCE, v_BHCE, attn_mask=mask))
    return torch.cat(chunks, 2).transpose(1, 2)


def causal_attention(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, window: int = 0) -> Tensor:
    """Causal attention by the fastest way for the device and length: [B, T, H, E].

    The queries are the last T of the S positions; each sees itself and what is before it, at most
    `window` positions (0: all). Keys and values may have fewer heads, each for a group of
    neighbouring query heads.
    """
    length, key_count = q_BTHE.shape[1], k_BSKE.shape[1]
    window = window if window < key_count else 0
    if window:
        first_key = max(0, key_count - length - window + 1)
        k_BSKE, v_BSKE = k_BSKE[:, first_key:], v_BSKE[:, first_key:]
    group_size = q_BTHE.shape[2] // k_BSKE.shape[2]
    probability_count = length * min(k_BSKE.shape[1], window + QUERY_CHUNK if window else key_count)
    use_chunked = q_BTHE.device.type == "cpu" and probability_count <= MAX_CHUNKED_LENGTH**2
    if use_chunked or window or length < key_count:
        if group_size > 1:  # the library's kernels take groups or a mask, not both
            k_BSKE, v_BSKE = (x.repeat_interleave(group_size, 2) for x in (k_BSKE, v_BSKE))
        return (chunked_attention if use_chunked else masked_attention)(
            q_BTHE, k_BSKE, v_BSKE, window
        )
    q_BHTE, k_BKTE, v_BKTE = (x.transpose(1, 2) for x in (q_BTHE, k_BSKE, v_BSKE))
    out_BHTE = F.scaled_dot_product_attention(
        q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=group_size > 1
    )
    return out_BHTE.transpose(1, 2)


class Attention(nn.Module):
    """Query, key, value and output projections without bias around `attend`.

    The number of heads is read off the projections' width, so ranks that hold some of the heads run
    the same code. `attend` maps q [B, T, H, E], k and v [B, T, K, E] to [B, T, H, E]; context
    parallelism replaces it.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width = settings.width
        self.head_width = settings.width_per_head
        self.qk_norm = settings.qk_norm
        self.eps = settings.norm_eps
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = partial(
            causal_attention, window=settings.window
        )
        self.query = nn.Linear(width, settings.query_width, bias=False)
        self.key = nn.Linear(width, settings.kv_width, bias=False)
        self.value = nn.Linear(width, settings.kv_width, bias=False)
        self.out = nn.Linear(settings.query_width, width, bias=False)
        self.query_gain = RMSNorm(self.head_width, self.eps) if settings.qk_gain else None
        self.key_gain = RMSNorm(self.head_width, self.eps) if settings.qk_gain else None

    def forward(self, x_BTD: Tensor, rope_TE2: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]; position t sees positions up to t."""
        heads = (*x_BTD.shape[:2], -1, self.head_width)
        q_BTHE = self._norm_and_rotate(self.query(x_BTD).view(heads), self.query_gain, rope_TE2)
        k_BTKE = self._norm_and_rotate(self.key(x_BTD).view(heads), self.key_gain, rope_TE2)
        v_BTKE = self.value(x_BTD).view(heads)
        out_BTD: Tensor = self.out(self.attend(q_BTHE, k_BTKE, v_BTKE).flatten(-2))
        return out_BTD

    def _norm_and_rotate(self, x_BTHE: Tensor, gain: RMSNorm | None, rope_TE2: Tensor) -> Tensor:
        """In fp32, and back to the type of x."""
        features_BTHE = x_BTHE
        if self.qk_norm:
            weight_E = None if gain is None else gain.weight
            features_BTHE = rms_norm(x_BTHE, weight_E, torch.float32, self.eps)
        return apply_rope(features_BTHE, rope_TE2).to(x_BTHE.dtype)
