"""The decoder-only transformer: embedding, blocks, norm, head, and its summed loss.

The loss is a mode of `forward`, because FSDP2 gathers parameters in hooks around `forward` alone.

Shape suffixes: B sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cordee.config.model import ModelSettings
from cordee.config.run import MemorySettings
from cordee.model.attention import Attention, RMSNorm, rope_table
from cordee.model.layers import (
    MLP,
    ActivationHook,
    SequenceShard,
    dropout,
    embedding_rows,
    identity,
    run_block,
)
from cordee.model.loss import capped_logits, chunked_loss, head_loss, summed_cross_entropy
from cordee.model.moe import MoE


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) or x + moe(norm(x)); dropout on what is added.

    `gather_sequence` and `scatter_sum` are hooks in which tensor parallelism gathers a split
    sequence and scatters sums; experts work on the split one.
    """

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.dropout = settings.dropout
        self.layer = layer
        self.sequence_shard = SequenceShard()
        self.gather_sequence: ActivationHook = identity
        self.scatter_sum: ActivationHook = identity
        self.attention_norm = RMSNorm(settings.width, settings.norm_eps)
        self.attention = Attention(settings)
        self.mlp_norm = RMSNorm(settings.width, settings.norm_eps)
        uses_moe = settings.is_moe(layer)
        self.mlp = None if uses_moe else MLP(settings, settings.hidden_width)
        self.moe = MoE(settings) if uses_moe else None

    def forward(self, x_BTD: Tensor, rope_TE2: Tensor, key: int = 0) -> Tensor:
        """[B, T, D] to [B, T, D]; `key` seeds dropout."""
        # The residual stream keeps its type (fp32 under autocast): bf16 saved no measurable time.
        attention_BTD = self.attention(self.gather_sequence(self.attention_norm(x_BTD)), rope_TE2)
        x_BTD = x_BTD + self._dropout(self.scatter_sum(attention_BTD), key, 0)
        return x_BTD + self._dropout(self._feed_forward(self.mlp_norm(x_BTD)), key, 1)

    def _feed_forward(self, x_BTD: Tensor) -> Tensor:
        if self.mlp is not None:
            return self.scatter_sum(self.mlp(self.gather_sequence(x_BTD)))
        assert self.moe is not None
        out_BTD: Tensor = self.moe(x_BTD)
        return out_BTD

    def _dropout(self, x_BTD: Tensor, key: int, site: int) -> Tensor:
        if not (self.dropout and self.training):
            return x_BTD
        return dropout(
            x_BTD, self.dropout, mix_key(key, 2 * self.layer + site), self.sequence_shard
        )


class Transformer(nn.Module):
    """A causal language model over `vocabulary` tokens, or one stage of it; parameters as in
    `layout/tensors.py`.

    Call `init_weights` after construction, or after construction on the meta device and `to_empty`.
    `layer_range` are the blocks of this stage; the first stage has the embedding, the last the
    head. A layout replaces the hooks, which are the identity without it.
    """

    rope_cache: Tensor

    def __init__(
        self, settings: ModelSettings, vocabulary: int, layer_range: range | None = None
    ) -> None:
        super().__init__()
        layer_range = range(settings.layers) if layer_range is None else layer_range
        is_first, is_last = layer_range.start == 0, layer_range.stop == settings.layers
        rows, width = settings.vocabulary or vocabulary, settings.width
        self.settings = settings
        self.vocabulary = rows
        self.memory = MemorySettings()
        self.autocast: torch.dtype | None = None
        self.sequence_shard = SequenceShard()
        self.gather_sequence: ActivationHook = identity
        self.scatter_sum: ActivationHook = identity
        self.embedding_lookup: Callable[[Tensor, Tensor], Tensor] = embed_tokens
        self.cross_entropy: Callable[[Tensor, Tensor], Tensor] = summed_cross_entropy
        has_head = is_last and not settings.tied
        has_embedding = is_first or (is_last and settings.tied)
        # Without values: Embedding's own, drawn on the meta device, would import torch._dynamo.
        values = torch.empty(rows, width) if has_embedding else None
        self.embed = nn.Embedding(rows, width, _weight=values) if has_embedding else None
        self.blocks = nn.ModuleDict({str(layer): Block(settings, layer) for layer in layer_range})
        self.norm = RMSNorm(width, settings.norm_eps) if is_last else None
        self.head = nn.Linear(width, rows, bias=False) if has_head else None
        self.register_buffer("rope_cache", torch.empty(0), persistent=False)

    def forward(self, x: Tensor, targets_BT: Tensor | None = None, key: int | Tensor = 0) -> Tensor:
        """int64 [B, T] (a later stage: the stream [B, T, D]) to logits fp32 [B, T, V] (an earlier
        stage: the stream); with targets to their summed loss (nats). `key` seeds dropout."""
        if self.autocast is None:
            return self._forward(x, targets_BT, int(key))
        with torch.autocast(x.device.type, self.autocast):
            return self._forward(x, targets_BT, int(key))

    def _forward(self, x: Tensor, targets_BT: Tensor | None, key: int) -> Tensor:
        x_BTD = x if x.is_floating_point() else self._embed(x)
        rope_TE2 = self._rope(self.sequence_shard.full_length(x_BTD.shape[1]), x_BTD.device)
        for layer, block in self.blocks.items():
            x_BTD = run_block(self.memory, int(layer), block, x_BTD, rope_TE2, key)
        if self.norm is None:
            return x_BTD
        x_BTD = self.gather_sequence(self.norm(x_BTD))
        head_VD = self._head_weight()
        cap = self.settings.logit_cap
        if targets_BT is None:
            return capped_logits(x_BTD, head_VD, cap)
        if self.memory.loss_chunk:
            x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
            chunk, loss_fn = self.memory.loss_chunk, self.cross_entropy
            return chunked_loss(x_ND, head_VD, targets_N, cap, chunk, loss_fn)
        return head_loss(x_BTD, head_VD, targets_BT, cap, self.cross_entropy)

    def loss(self, tokens_BT1: Tensor) -> Tensor:
        """Summed loss (nats) of predicting each of tokens [B, T+1] from those before it."""
        loss: Tensor = self(tokens_BT1[:, :-1], tokens_BT1[:, 1:])
        return loss

    def parts(self) -> Iterator[Block]:
        for block in self.blocks.values():
            assert isinstance(block, Block)
            yield block

    def reset_rope_cache(self) -> None:
        """Drops the rotary table, which `to_empty` leaves uninitialised; the next forward makes it
        again on the right device."""
        self.rope_cache = torch.empty(0, device=self.rope_cache.device)

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        assert self.embed is not None
        return self.scatter_sum(self.embedding_lookup(self.embed.weight, tokens_BT))

    def _head_weight(self) -> Tensor:
        module = self.embed if self.head is None else self.head
        assert module is not None
        return module.weight

    def _rope(self, length: int, device: torch.device) -> Tensor:
        """The rotary table of the positions from which this rank attends."""
        if self.rope_cache.shape[0] < length or self.rope_cache.device != device:
            head_width, base = self.settings.width_per_head, self.settings.rope_base
            self.rope_cache = rope_table(length, head_width, base, device)
        positions = self.sequence_shard.attention_positions(length)
        return (
            self.rope_cache[:length] if positions is None else self.rope_cache[positions.to(device)]
        )


def embed_tokens(weight_VD: Tensor, tokens_BT: Tensor) -> Tensor:
    """Rows of the embedding: [B, T] to [B, T, D], fp32 or wider whatever shards gather."""
    rows_BTD = embedding_rows(weight_VD, tokens_BT)
    return rows_BTD.to(torch.promote_types(rows_BTD.dtype, torch.float32))


def mix_key(key: int, index: int) -> int:
    """63 bits from a microbatch's key and a place in the model (Steele et al. 2014, splitmix64)."""
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1
