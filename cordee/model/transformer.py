"""The decoder-only transformer on bytes: embedding, blocks, norm, head, and its summed loss.

Not here: initial values (`initial.py`), dropout's seed (the engine sets it per microbatch), any
split over ranks. Traded away: a separate loss module. The loss is a mode of `forward`, because
FSDP2 gathers parameters in hooks around `forward` and nowhere else.

Shape suffixes: B sequences, T positions, D width, F hidden width of the MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cordee.config.run import ModelSettings
from cordee.model.attention import Attention, RMSNorm, rotary_turns


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
        width, hidden = settings.width, hidden_width(settings)
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
        self.attention_norm = RMSNorm(settings.width)
        self.attention = Attention(settings)
        self.mlp_norm = RMSNorm(settings.width)
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
    construction on the meta device and `to_empty`).
    """

    turns: Tensor

    def __init__(self, settings: ModelSettings, vocabulary: int) -> None:
        super().__init__()
        self.settings = settings
        self.vocabulary = vocabulary
        self.embed = nn.Embedding(vocabulary, settings.width)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = RMSNorm(settings.width)
        self.head = None if settings.tied else nn.Linear(settings.width, vocabulary, bias=False)
        self.register_buffer("turns", torch.empty(0), persistent=False)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """int64 [B, T] to logits fp32 [B, T, V]; with targets to their summed loss (nats)."""
        x_BTD = self.embed(tokens_BT)
        turns_TE2 = self._turns(tokens_BT.shape[1], x_BTD.device)
        for block in self.blocks:
            x_BTD = block(x_BTD, turns_TE2)
        x_BTD = self.norm(x_BTD)
        logits = F.linear(x_BTD, self.embed.weight) if self.head is None else self.head(x_BTD)
        logits_BTV = soft_cap(logits.float(), self.settings.logit_cap)
        return logits_BTV if targets_BT is None else loss_sum(logits_BTV, targets_BT)

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
            head_width = self.settings.width // self.settings.heads
            self.turns = rotary_turns(length, head_width, self.settings.rope_base, device)
        return self.turns[:length]


def hidden_width(settings: ModelSettings) -> int:
    """Hidden width of the MLP: as given, 4 x width, or 8/3 x width rounded up to 32.

    The paper's twin is `layout.tensors.ffn_width`; a test holds the two equal.
    """
    if settings.ffn:
        return settings.ffn
    return 4 * settings.width if settings.mlp == "relu2" else -(-8 * settings.width // 96) * 32


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap x tanh(logits / cap) (Gemma 2, 2024): keeps logits in (-cap, cap); 0 leaves them.

    Costs 1.5 % of a fp32 step and 2.5 % of a bf16 step; a backward of its own gained nothing.
    """
    return cap * torch.tanh(logits / cap) if cap else logits


def loss_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Summed cross-entropy in nats, fp32; targets of -100 do not count."""
    logits_NV = logits_BTV.flatten(0, 1).float()
    return F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum")
