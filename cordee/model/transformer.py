"""The decoder-only transformer on bytes: embedding, blocks, norm, head, and its summed loss.

Not here: initial values (`initial.py`), the loss's arithmetic (`loss.py`), dropout's seed (the
engine sets it per microbatch), any split over ranks. Traded away: a loss outside of the model. It
is a mode of `forward`, because FSDP2 gathers parameters in hooks around `forward` and nowhere else.

Shape suffixes: B sequences, T positions, D width, F hidden width of the MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cordee.config.model import ModelSettings
from cordee.config.run import MemorySettings
from cordee.model.attention import Attention, RMSNorm, rotary_turns
from cordee.model.loss import capped_logits, chunked_loss, head_loss
from cordee.model.recompute import run_block


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


class MLP(nn.Module):
    """down(relu(up(x))^2), or down(silu(gate(x)) x up(x)) (SwiGLU, Shazeer 2020); no bias."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width, hidden = settings.width, settings.hidden_width
        self.up = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False) if settings.mlp == "gated" else None
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        up_BTF: Tensor = self.up(x_BTD)
        if self.gate is None:
            hidden_BTF = squared_relu(up_BTF)
        else:
            hidden_BTF = F.silu(self.gate(x_BTD)) * up_BTF
        out_BTD: Tensor = self.down(hidden_BTF)
        return out_BTD


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); dropout on what is added."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.dropout = settings.dropout
        self.attention_norm = RMSNorm(settings.width, settings.norm_eps)
        self.attention = Attention(settings)
        self.mlp_norm = RMSNorm(settings.width, settings.norm_eps)
        self.mlp = MLP(settings)

    def forward(self, x_BTD: Tensor, turns_TE2: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]. The residual stream keeps its type (fp32 under autocast): making
        it bf16 saved no measurable time."""
        x_BTD = x_BTD + self._drop(self.attention(self.attention_norm(x_BTD), turns_TE2))
        return x_BTD + self._drop(self.mlp(self.mlp_norm(x_BTD)))

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training) if self.dropout else x_BTD


class Transformer(nn.Module):
    """A causal language model over `vocabulary` tokens; parameters as in `layout/tensors.py`.

    Nothing is drawn here that counts: call `initialise` after construction (also after
    construction on the meta device and `to_empty`). `memory` trades time for memory.
    """

    turns: Tensor

    def __init__(self, settings: ModelSettings, vocabulary: int) -> None:
        super().__init__()
        self.settings = settings
        self.vocabulary = vocabulary
        self.memory = MemorySettings()
        self.embed = nn.Embedding(vocabulary, settings.width)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = RMSNorm(settings.width, settings.norm_eps)
        self.head = None if settings.tied else nn.Linear(settings.width, vocabulary, bias=False)
        self.register_buffer("turns", torch.empty(0), persistent=False)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """int64 [B, T] to logits fp32 [B, T, V]; with targets to their summed loss (nats)."""
        x_BTD = self.embed(tokens_BT)
        turns_TE2 = self._turns(tokens_BT.shape[1], x_BTD.device)
        for index, block in enumerate(self.blocks):
            x_BTD = run_block(self.memory, index, block, x_BTD, turns_TE2)
        x_BTD = self.norm(x_BTD)
        head_VD = self.embed.weight if self.head is None else self.head.weight
        cap = self.settings.logit_cap
        if targets_BT is None:
            return capped_logits(x_BTD, head_VD, cap)
        if self.memory.loss_chunk:
            x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
            return chunked_loss(x_ND, head_VD, targets_N, cap, self.memory.loss_chunk)
        return head_loss(x_BTD, head_VD, targets_BT, cap)

    def loss(self, tokens_BT1: Tensor) -> Tensor:
        """Summed loss (nats) of predicting each of tokens [B, T+1] from those before it."""
        loss: Tensor = self(tokens_BT1[:, :-1], tokens_BT1[:, 1:])
        return loss

    def forget_turns(self) -> None:
        """Drops the rotary table; the next forward makes it again on the right device.

        Needed after `to_empty`, which leaves garbage in a table that was made on the meta device.
        """
        self.turns = torch.empty(0, device=self.turns.device)

    def _turns(self, length: int, device: torch.device) -> Tensor:
        if self.turns.shape[0] < length or self.turns.device != device:
            settings = self.settings
            self.turns = rotary_turns(length, settings.per_head, settings.rope_base, device)
        return self.turns[:length]
