"""Activation checkpointing: what a block keeps for its backward, and what it computes again.

none: everything. full: its input alone (Chen et al. 2016). selective: its input and the results of
matrix products; norms, activations and attention's probabilities are computed again (Korthikanti
et al. 2022). The same operations on the same numbers give the same bits, dropout included. Not
here: offload to the host. Traded away: a choice per layer; every n-th block is enough to trade
time for memory evenly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from cordee.config.run import MemorySettings

aten = torch.ops.aten
SAVED_OPS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default,
    aten._grouped_mm.default, aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}  # fmt: skip
"""What selective keeps: products that took long to compute and are small beside their inputs' uses.
Attention's scores (baddbmm) are not among them: they grow with the square of the sequence."""


def run_block(
    memory: MemorySettings, index: int, block: Callable[..., Any], *inputs: Any, **kwargs: Any
) -> Tensor:
    """`block(*inputs, **named)`, of block number `index`, keeping what `memory` says for the
    backward."""
    forward = checkpoint_wrapper(memory.recompute, block) if memory.recomputes(index) else block
    return cast(Tensor, forward(*inputs, **kwargs))


def checkpoint_wrapper(mode: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that keeps what `mode` (selective, full) says, while gradients are wanted."""
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
