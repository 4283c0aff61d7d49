"""From run.precision to the type that products are computed in.

Parameters, gradients and sums stay fp32 whatever it is; what shards gather may be narrower
(`parallel/fsdp.py`). Not here: the scale of the loss (`optim/optimizer.py`), products in fp8
(`fp8.py`). Traded away: types layer by layer; autocast's own lists say what stays fp32.

Shape suffixes: V rows of an embedding, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The autocast type of run.precision, resolved; None where nothing is cast. What fp8 leaves is
    bf16."""
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
