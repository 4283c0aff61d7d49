"""Tensor and sequence parallelism: seams that gather a split sequence and scatter sums.

Matrices are cut as `layout/tensors.py` says: into a block by outputs (heads, hidden features), out
of it by inputs. Between blocks the stream and its norms hold an even part of the positions
(Korthikanti et al. 2022). The vocabulary is cut in the embedding and in the head, whose loss needs
three small sums and never the whole logits. Traded away: torch's DTensor; its dispatch costs more
than these messages at small widths (docs/performance.md), and a seam works with any kernel.

Shape suffixes as in model/transformer.py; N positions of all sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cordee.dist.wire import Wire
from cordee.model.moe import mixtures
from cordee.model.span import Span
from cordee.model.transformer import Block, Transformer, look_up

IGNORED = -100
"""Target of a position that does not count."""


def split_sequence(model: Transformer, wire: Wire, span: Span) -> None:
    """Sets the seams of a model whose matrices hold this rank's part."""
    parts: list[Transformer | Block] = [model, *model.parts()]
    for part in parts:
        part.span = span
    if wire.size == 1:
        return
    for part in parts:
        part.enter = lambda x: wire.gather(x, 1)
        part.leave = lambda x: wire.scatter(x, 1)
    for moe in mixtures(model):
        moe.enter, moe.leave = model.enter, model.leave
    cut = Vocabulary(wire)
    model.lookup = cut.look_up
    model.cross_entropy = cut.cross_entropy


class Vocabulary:
    """An embedding and a loss of which each rank holds some rows."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def look_up(self, weight_VD: Tensor, tokens_BT: Tensor) -> Tensor:
        """This rank's rows of the embedding, zero where another rank has the token."""
        local = tokens_BT - self.wire.index * len(weight_VD)
        outside = (local < 0) | (local >= len(weight_VD))
        x_BTD = look_up(weight_VD, local.masked_fill(outside, 0))
        return x_BTD.masked_fill(outside.unsqueeze(-1), 0.0)

    def cross_entropy(self, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """Summed cross-entropy in nats of logits whose columns are dealt over the ranks."""
        return _cut_cross_entropy(logits_NV, targets_N, self.wire)


class _CutCrossEntropy(torch.autograd.Function):
    """log sum exp over all ranks' columns, less the target's logit (Shoeybi et al. 2019)."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, wire: Wire) -> Tensor:
        top_N1 = wire.most_now(logits_NV.max(-1, keepdim=True).values)
        shifted_NV = logits_NV - top_N1
        columns = logits_NV.shape[-1]
        local_N = targets_N - wire.index * columns
        counted_N = targets_N != IGNORED
        here_N = (local_N >= 0) & (local_N < columns) & counted_N
        place_N1 = local_N.masked_fill(~here_N, 0).unsqueeze(-1)
        chosen_N = shifted_NV.gather(-1, place_N1).squeeze(-1).masked_fill(~here_N, 0.0)
        odds_NV = shifted_NV.exp()
        sums_2N = wire.total_now(torch.stack((odds_NV.sum(-1), chosen_N)))
        losses_N = (sums_2N[0].log() - sums_2N[1]).masked_fill(~counted_N, 0.0)
        odds_NV /= sums_2N[0].unsqueeze(-1)
        ctx.save_for_backward(odds_NV, place_N1, here_N, counted_N)
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        odds_NV, place_N1, here_N, counted_N = ctx.saved_tensors
        grad_NV = odds_NV.masked_fill(~counted_N.unsqueeze(-1), 0.0)
        grad_NV.scatter_add_(-1, place_N1, -here_N.to(grad_NV.dtype).unsqueeze(-1))
        return grad_NV * grad, None, None


_cut_cross_entropy: Callable[[Tensor, Tensor, Wire], Tensor] = _CutCrossEntropy.apply
