"""The parts of a block besides attention and experts: types of products, MLP, dropout, and what a
block keeps for its backward.

Shape suffixes: B sequences, T positions, V rows of an embedding, D width, F hidden features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from cordee.config.model import ModelSettings
from cordee.config.run import MemorySettings

# ---- the type of products ----


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The autocast type of run.precision, resolved; None where nothing is cast.

    Parameters, gradients and sums stay fp32 whatever it is. What fp8 leaves over is bf16.
    """
    match precision:
        case "fp32":
            return None
        case "fp16":
            return torch.float16
        case "bf16" | "fp8":
            return torch.bfloat16
    raise ValueError(f"run.precision={precision} is not resolved (planner/cluster.py)")


def autocast_to(device: str, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on a kind of device ("cpu", "cuda", ...); without one, nothing."""
    return torch.autocast(device, dtype, enabled=dtype is not None)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products compute in: the autocast type when it is on, else the type of x."""
    device_type = x.device.type
    is_enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(
        device_type
    )
    return torch.get_autocast_dtype(device_type) if is_enabled else x.dtype


class _EmbeddingRows(torch.autograd.Function):
    """Rows of a table that is narrower than fp32, with a gradient that is summed in fp32: a CPU
    adds in the table's type, and in bf16 the sum of a frequent token stops at some 256 terms."""

    @staticmethod
    def forward(ctx: Any, table_VD: Tensor, indices: Tensor, padding: int) -> Tensor:
        """[..., D] of int64 [...]; row `padding` gets no gradient (-1: every row does)."""
        ctx.save_for_backward(indices)
        ctx.shape, ctx.dtype, ctx.padding = table_VD.shape, table_VD.dtype, padding
        return F.embedding(indices, table_VD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The table's gradient [V, D], in its type."""
        (indices,) = ctx.saved_tensors
        rows, grad_fp32 = ctx.shape[0], grad.float()
        table_grad_VD = torch.ops.aten.embedding_dense_backward(
            grad_fp32, indices, rows, ctx.padding, False
        )
        return table_grad_VD.to(ctx.dtype), None, None


_embedding_rows: Callable[[Tensor, Tensor, int], Tensor] = _EmbeddingRows.apply


def embedding_rows(table_VD: Tensor, indices: Tensor, padding: int | None = None) -> Tensor:
    """Rows [..., D] of a table, int64 [...], in its type; row `padding` gets no gradient."""
    if table_VD.dtype.itemsize >= torch.float32.itemsize:
        return F.embedding(indices, table_VD, padding)
    return _embedding_rows(table_VD, indices, -1 if padding is None else padding)


def use_fp32_embedding_grads(model: nn.Module) -> None:
    """Makes every plain nn.Embedding inside `model` sum its gradient in fp32, in place."""
    for module in model.modules():
        is_plain = type(module) is nn.Embedding and not module.scale_grad_by_freq
        if is_plain and not module.sparse and module.max_norm is None:
            module.forward = MethodType(_embedding_forward, module)


def _embedding_forward(module: nn.Embedding, indices: Tensor) -> Tensor:
    return embedding_rows(module.weight, indices, module.padding_idx)


# ---- the MLP ----


class _SquaredReLU(torch.autograd.Function):
    """max(x, 0)^2 (So et al. 2021). Saves one tensor and its backward is one product of two: a
    fp32 step is 3 % faster than with `F.relu(x).square()`, whose backward is three operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = x.relu()
        ctx.save_for_backward(root)
        return root * root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        # The root is zero where the slope is, so no mask is needed.
        return torch.mul(grad, root).mul_(2.0)


squared_relu: Callable[[Tensor], Tensor] = _SquaredReLU.apply
"""max(x, 0)^2 of any shape."""


def activation(up: Tensor, gate: Tensor | None) -> Tensor:
    """relu(up)^2, or silu(gate) x up (SwiGLU, Shazeer 2020); any shape."""
    return squared_relu(up) if gate is None else F.silu(gate) * up


class MLP(nn.Module):
    """down(activation(up(x), gate(x))) with `hidden` features between; no bias."""

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


# ---- positions of this rank, and dropout that does not depend on them ----

ActivationHook = Callable[[Tensor], Tensor]
"""A place where a layout may change an activation; without one it is `identity`."""


def identity(x: Tensor) -> Tensor:
    return x


def full_sequence(length: int) -> Sequence[range]:
    """All positions, in order."""
    return (range(length),)


@dataclass(frozen=True)
class SequenceShard:
    """Which positions of a sequence this rank holds.

    `context_size` ranks split the sequence: this one attends from the positions `chunks(length)`
    (ranges). `tensor_size` ranks split the residual stream of those evenly.
    """

    context_size: int = 1
    tensor_size: int = 1
    tensor_index: int = 0
    chunks: Callable[[int], Sequence[range]] = full_sequence

    def full_length(self, local_length: int) -> int:
        """Positions of the whole sequence when the residual stream here has `local_length`."""
        return local_length * self.tensor_size * self.context_size

    def attention_positions(self, length: int) -> Tensor | None:
        """Positions [T] from which this rank attends; None when they are all, in order."""
        if self.context_size == 1:
            return None
        return torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in self.chunks(length)])

    def stream_positions(self, length: int) -> Tensor | None:
        """Positions of the residual stream here; None when they are all, in order."""
        positions = self.attention_positions(length)
        if self.tensor_size == 1:
            return positions
        positions = torch.arange(length) if positions is None else positions
        return positions.view(self.tensor_size, -1)[self.tensor_index]


def dropout(x_BTD: Tensor, rate: float, seed: int, shard: SequenceShard) -> Tensor:
    """x with each element zero with probability `rate`, else divided by 1 - rate.

    The mask is drawn for the whole sequence and cut, so every layout drops the same elements.
    """
    batch, local_length, width = x_BTD.shape
    length = shard.full_length(local_length)
    generator = torch.Generator(x_BTD.device).manual_seed(seed)
    mask = torch.empty(batch, length, width, dtype=x_BTD.dtype, device=x_BTD.device)
    mask.bernoulli_(1.0 - rate, generator=generator).div_(1.0 - rate)
    positions = shard.stream_positions(length)
    return x_BTD * (mask if positions is None else mask[:, positions.to(mask.device)])


# ---- activation checkpointing ----

aten = torch.ops.aten
SAVED_OPS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default,
    aten._grouped_mm.default, aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}  # fmt: skip
"""What selective keeps (Korthikanti et al. 2022): products that took long to compute and are small.
Attention's scores (baddbmm) are not among them: they grow with the square of the sequence."""


def run_block(
    memory: MemorySettings, index: int, block: Callable[..., Any], *inputs: Any, **kwargs: Any
) -> Tensor:
    """`block(*inputs, **kwargs)`, of block number `index`, keeping for the backward what `memory`
    says."""
    forward = checkpoint_wrapper(memory.recompute, block) if memory.recomputes(index) else block
    return cast(Tensor, forward(*inputs, **kwargs))


def checkpoint_wrapper(mode: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that computes again in the backward what `mode` does not keep: full keeps the
    inputs alone (Chen et al. 2016), selective also SAVED_OPS. Same operations, same bits."""
    options: dict[str, Any] = {"context_fn": _selective_contexts} if mode == "selective" else {}

    def checkpointed_forward(*inputs: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **kwargs)
        return checkpoint(forward, *inputs, use_reentrant=False, **options, **kwargs)

    return checkpointed_forward


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_selective_policy)  # type: ignore[no-untyped-call]


def _selective_policy(
    context: Any, operation: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    is_saved = operation in SAVED_OPS
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE
