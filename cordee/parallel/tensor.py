"""Tensor and sequence parallelism: hooks that gather a split sequence and scatter sums.

Matrices are cut as `layout/tensors.py` says: into a block by outputs (heads, hidden features), out
of it by inputs. Between blocks the residual stream holds an even part of the positions (Korthikanti
et al. 2022). Embedding and head are cut by vocabulary. Not DTensor: its dispatch costs more than
these messages at small widths (docs/performance.md), and a hook works with any kernel.

Shape suffixes as in model/transformer.py; N positions of all sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cordee.dist.autograd_collectives import AxisComm
from cordee.model.layers import SequenceShard
from cordee.model.moe import moe_layers
from cordee.model.transformer import Block, Transformer, embed_tokens

IGNORE_INDEX = -100
"""Target of a position that does not count."""


def set_sequence_parallel(
    model: Transformer, comm: AxisComm, sequence_shard: SequenceShard
) -> None:
    """Sets the hooks of a model whose parameters have this rank's shapes."""
    modules: list[Transformer | Block] = [model, *model.parts()]
    for module in modules:
        module.sequence_shard = sequence_shard
    if comm.size == 1:
        return
    for module in modules:
        module.gather_sequence = lambda x: comm.all_gather(x, 1)
        module.scatter_sum = lambda x: comm.reduce_scatter(x, 1)
    for moe in moe_layers(model):
        moe.gather_sequence, moe.scatter_sum = model.gather_sequence, model.scatter_sum
    vocabulary = VocabParallel(comm)
    model.embedding_lookup = vocabulary.look_up
    model.cross_entropy = vocabulary.cross_entropy


class VocabParallel:
    """An embedding and a loss over a vocabulary of which each rank holds some rows."""

    def __init__(self, comm: AxisComm) -> None:
        self.comm = comm

    def look_up(self, weight_VD: Tensor, tokens_BT: Tensor) -> Tensor:
        """This rank's rows of the embedding, zero where another rank has the token."""
        local_tokens = tokens_BT - self.comm.index * len(weight_VD)
        outside_mask = (local_tokens < 0) | (local_tokens >= len(weight_VD))
        x_BTD = embed_tokens(weight_VD, local_tokens.masked_fill(outside_mask, 0))
        return x_BTD.masked_fill(outside_mask.unsqueeze(-1), 0.0)

    def cross_entropy(self, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """Summed cross-entropy in nats of logits whose columns are split over the ranks."""
        return _vocab_cross_entropy(logits_NV, targets_N, self.comm)


class _VocabCrossEntropy(torch.autograd.Function):
    """log sum exp over all ranks' columns minus the target's logit (Shoeybi et al. 2019): the ranks
    exchange a maximum and two sums per position, and no logits."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, comm: AxisComm) -> Tensor:
        # The maximum over all ranks keeps exp from overflowing and leaves the loss unchanged.
        max_N1 = comm.max_no_grad(logits_NV.max(-1, keepdim=True).values)
        shifted_NV = logits_NV - max_N1
        columns = logits_NV.shape[-1]
        local_targets_N = targets_N - comm.index * columns
        valid_N = targets_N != IGNORE_INDEX
        local_mask_N = (local_targets_N >= 0) & (local_targets_N < columns) & valid_N
        index_N1 = local_targets_N.masked_fill(~local_mask_N, 0).unsqueeze(-1)
        target_logits_N = (
            shifted_NV.gather(-1, index_N1).squeeze(-1).masked_fill(~local_mask_N, 0.0)
        )
        probs_NV = shifted_NV.exp()
        sums_2N = comm.all_reduce_no_grad(torch.stack((probs_NV.sum(-1), target_logits_N)))
        losses_N = (sums_2N[0].log() - sums_2N[1]).masked_fill(~valid_N, 0.0)
        probs_NV /= sums_2N[0].unsqueeze(-1)
        ctx.save_for_backward(probs_NV, index_N1, local_mask_N, valid_N)
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        probs_NV, index_N1, local_mask_N, valid_N = ctx.saved_tensors
        grad_NV = probs_NV.masked_fill(~valid_N.unsqueeze(-1), 0.0)
        grad_NV.scatter_add_(-1, index_N1, -local_mask_N.to(grad_NV.dtype).unsqueeze(-1))
        return grad_NV * grad, None, None


_vocab_cross_entropy: Callable[[Tensor, Tensor, AxisComm], Tensor] = _VocabCrossEntropy.apply
