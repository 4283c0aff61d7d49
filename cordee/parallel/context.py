"""Attention over a sequence that is split over ranks: by gathering keys and values, or in a ring.

Each rank holds two chunks of every sequence (`layout/microbatches.context_chunks`). Gather: every
rank gets all keys and values, then attends with the model's own kernels. Ring: keys and values
travel from rank to rank while each attends to those it has (Liu et al. 2023), so that no rank holds
more than its own block and two in transit; its tiles are plain products with the online softmax
(Milakov & Gimelshein 2018; Dao et al. 2022) instead of fused kernels, the same on all devices.

Shape suffixes: B sequences, T local positions of queries, S of keys, H heads, K heads of keys,
E width of a head, N = B x K, R = T x (H / K) rows of queries that share a key head; P parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.dist.collectives import all_gather_flat
from cordee.layout.microbatches import context_chunks
from cordee.model.attention import QUERY_CHUNK, causal_attention, hidden_mask, visible_range


@dataclass
class GatherAttention:
    """`attend` of `model/attention.Attention` on part `index` of `size`; None is a group of one.

    `bytes_sent` counts what this rank sent, forward and backward.
    """

    group: dist.ProcessGroup | None
    index: int
    size: int
    window: int = 0
    bytes_sent: int = 0

    def __call__(self, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
        """Local q [B, T, H, E], k and v [B, T, K, E] to [B, T, H, E]."""
        if self.size == 1:
            return causal_attention(q_BTHE, k_BTKE, v_BTKE, self.window)
        chunks = context_chunks(q_BTHE.shape[1] * self.size, self.size, self.index)
        k_BSKE, v_BSKE = self._natural_order(_all_gather_kv(torch.stack((k_BTKE, v_BTKE)), self))
        outputs = [
            causal_attention(q_BCHE, k_BSKE[:, : chunk.stop], v_BSKE[:, : chunk.stop], self.window)
            for q_BCHE, chunk in zip(q_BTHE.chunk(2, 1), chunks, strict=True)
        ]
        return torch.cat(outputs, 1)

    @staticmethod
    def _natural_order(kv_P2BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """All ranks' chunks to keys and values in natural order, [B, P x T, K, E] each."""
        first_chunks, second_chunks = kv_P2BTKE.chunk(2, 3)
        kv = torch.cat((first_chunks, second_chunks.flip(0))).movedim(0, 2).flatten(2, 3)
        return kv[0], kv[1]


class _AllGatherKV(torch.autograd.Function):
    """All-gather whose backward sums all ranks' gradients of this rank's part.

    The sum is an all-to-all and an addition here: the same bytes as a reduce-scatter, but bf16
    gradients are added in fp32, and in the order of the ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, attention: GatherAttention) -> Tensor:
        """[...] to [P, ...]."""
        ctx.attention = attention
        output = x.new_empty(attention.size, *x.shape)
        all_gather_flat(output.view(-1), x.contiguous().view(-1), group=attention.group)
        attention.bytes_sent += (attention.size - 1) * x.nbytes
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[P, ...] to [...]."""
        attention = ctx.attention
        parts = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(parts, grad.contiguous(), group=attention.group)
        attention.bytes_sent += (attention.size - 1) * parts[0].nbytes
        return parts.sum(0, dtype=_wide_dtype(grad)).to(grad.dtype), None


_all_gather_kv: Callable[[Tensor, GatherAttention], Tensor] = _AllGatherKV.apply


@dataclass(frozen=True)
class _PendingTransfer:
    """A message in transit. `send_buffer` must live until it has been sent."""

    works: list[dist.Work]
    send_buffer: Tensor
    receive_buffer: Tensor

    def wait(self) -> Tensor:
        """Waits for both directions; returns the received tensor."""
        for work in self.works:
            work.wait()
        return self.receive_buffer


@dataclass
class RingAttention:
    """`attend` of `model/attention.Attention` on part `index` of `size`; None is a group of one.

    `bytes_sent` counts what this rank sent, forward and backward.
    """

    group: dist.ProcessGroup | None
    index: int
    size: int
    window: int = 0
    bytes_sent: int = 0

    def __call__(self, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
        """Local q [B, T, H, E], k and v [B, T, K, E] to [B, T, H, E]."""
        # Raises for a sequence that cannot be split, before anything is sent.
        context_chunks(q_BTHE.shape[1] * self.size, self.size, self.index)
        with torch.autocast(q_BTHE.device.type, enabled=False):  # as in the backward
            return _ring_attention(q_BTHE, k_BTKE, v_BTKE, self)

    def send_to_next(self, tensor: Tensor) -> _PendingTransfer:
        """Starts sending `tensor` to the next rank and receiving one from the rank before."""
        receive_buffer = torch.empty_like(tensor)
        next_rank, previous_rank = (self.index + 1) % self.size, (self.index - 1) % self.size
        send_op = dist.P2POp(dist.isend, tensor, group=self.group, group_peer=next_rank)
        receive_op = dist.P2POp(
            dist.irecv, receive_buffer, group=self.group, group_peer=previous_rank
        )
        self.bytes_sent += tensor.nbytes
        return _PendingTransfer(
            dist.batch_isend_irecv([send_op, receive_op]), tensor, receive_buffer
        )

    def blocks(self, local_block: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(owner, block) of every rank's block, this rank's first; the next travels meanwhile."""
        block = local_block
        for hop in range(self.size):
            transfer = self.send_to_next(block) if hop + 1 < self.size else None
            yield (self.index - hop) % self.size, block
            if transfer is not None:
                block = transfer.wait()

    def tiles(
        self, q_NRE: Tensor, heads_per_key: int, owner: int
    ) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """This rank's queries, QUERY_CHUNK positions at a time, against the part of `owner`'s block
        that they see: (rows of q, keys of the block, mask [rows, keys] of hidden keys or None).
        """
        # The later chunk of keys comes first: the first tile of every query then contains its own
        # position, so the running maximum is finite from the start.
        length = q_NRE.shape[1] // heads_per_key * self.size
        local_chunks = _chunk_shifts(context_chunks(length, self.size, self.index))
        owner_chunks = _chunk_shifts(context_chunks(length, self.size, owner))
        for chunk, query_shift in local_chunks:
            for keys, key_shift in reversed(owner_chunks):
                for start in range(chunk.start, chunk.stop, QUERY_CHUNK):
                    queries = range(start, min(start + QUERY_CHUNK, chunk.stop))
                    key_range = visible_range(queries, keys, self.window)
                    if not key_range:
                        continue
                    first, last = queries.start - query_shift, queries.stop - query_shift
                    mask = hidden_mask(queries, key_range, self.window, q_NRE.device)
                    yield (
                        slice(first * heads_per_key, last * heads_per_key),
                        slice(key_range.start - key_shift, key_range.stop - key_shift),
                        None if mask is None else mask.repeat_interleave(heads_per_key, 0),
                    )


class _RingFunction(torch.autograd.Function):
    """Attention while key blocks go round the ring; sums and probabilities in fp32 (or fp64)."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, ring: RingAttention
    ) -> Tensor:
        """Saves queries, own keys and values, the output, and a log-sum-exp per query and head."""
        heads_per_key = q_BTHE.shape[2] // k_BTKE.shape[2]
        q_NRE = _to_rows(q_BTHE, heads_per_key)
        kv_2NSE = torch.stack((_to_rows(k_BTKE, 1), _to_rows(v_BTKE, 1)))
        out_NRE = torch.zeros_like(q_NRE, dtype=_wide_dtype(q_NRE))
        sum_NR1 = out_NRE.new_zeros(*q_NRE.shape[:2], 1)
        max_NR1 = torch.full_like(sum_NR1, float("-inf"))
        for owner, block in ring.blocks(kv_2NSE):
            for rows, keys, mask in ring.tiles(q_NRE, heads_per_key, owner):
                k_NCE, v_NCE = block[:, :, keys]
                score = _scores(q_NRE[:, rows], k_NCE, mask)
                tile_max = torch.maximum(max_NR1[:, rows], score.amax(-1, keepdim=True))
                weight = score.sub_(tile_max).exp_()
                rescale = (max_NR1[:, rows] - tile_max).exp_()
                max_NR1[:, rows] = tile_max
                sum_NR1[:, rows].mul_(rescale).add_(weight.sum(-1, keepdim=True))
                out_NRE[:, rows].mul_(rescale).add_(_scaled_matmul(weight.to(v_NCE.dtype), v_NCE))
        out_NRE = out_NRE.div_(sum_NR1).to(q_NRE.dtype)
        ctx.ring, ctx.group, ctx.batch = ring, heads_per_key, len(q_BTHE)
        ctx.save_for_backward(q_NRE, kv_2NSE, out_NRE, max_NR1 + sum_NR1.log())
        return _from_rows(out_NRE, ctx.batch, heads_per_key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Recomputes probabilities tile by tile from the saved log-sum-exp."""
        # A block's gradient starts at the rank after its owner, follows the block round the ring
        # and reaches the owner last: as many hops as the block itself makes.
        q_NRE, kv_2NSE, out_NRE, lse_NR1 = ctx.saved_tensors
        ring, heads_per_key = ctx.ring, ctx.group
        wide_dtype, scale = _wide_dtype(q_NRE), _scale(q_NRE)
        grad_NRE = _to_rows(grad, heads_per_key)
        delta_NR1 = (grad_NRE.to(wide_dtype) * out_NRE).sum(-1, keepdim=True)
        q_grad = torch.zeros_like(q_NRE, dtype=wide_dtype)
        local_grad, transfer = torch.empty(0), None
        for owner, block in ring.blocks(kv_2NSE):
            block_grad = torch.zeros_like(block, dtype=wide_dtype)
            for rows, keys, mask in ring.tiles(q_NRE, heads_per_key, owner):
                k_NCE, v_NCE = block[:, :, keys]
                q_tile, grad_tile = q_NRE[:, rows], grad_NRE[:, rows]
                weight = _scores(q_tile, k_NCE, mask).sub_(lse_NR1[:, rows]).exp_()
                block_grad[1, :, keys] += _scaled_matmul(weight.to(v_NCE.dtype).mT, grad_tile)
                score_grad = _scaled_matmul(grad_tile, v_NCE.mT).to(wide_dtype)
                score_grad = score_grad.sub_(delta_NR1[:, rows]).mul_(weight).to(q_NRE.dtype)
                q_grad[:, rows] += _scaled_matmul(score_grad, k_NCE, scale)
                block_grad[0, :, keys] += _scaled_matmul(score_grad.mT, q_tile, scale)
            if owner == ring.index:
                local_grad = block_grad
                continue
            if transfer is not None:
                block_grad += transfer.wait()
            transfer = ring.send_to_next(block_grad)
        if transfer is not None:
            local_grad += transfer.wait()
        k_grad, v_grad = (_from_rows(x.to(q_NRE.dtype), ctx.batch, 1) for x in local_grad)
        return _from_rows(q_grad.to(q_NRE.dtype), ctx.batch, heads_per_key), k_grad, v_grad, None


_ring_attention: Callable[[Tensor, Tensor, Tensor, RingAttention], Tensor] = _RingFunction.apply


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunk_shifts(chunks: tuple[range, range]) -> list[tuple[range, int]]:
    """Each chunk with the difference between a position and its index in the rank's block."""
    first, second = chunks
    return [(first, first.start), (second, second.start - len(first))]


def _to_rows(x_BTHE: Tensor, heads_per_key: int) -> Tensor:
    """[B, T, H, E] to [N, R, E]: the heads that share a key head become rows side by side."""
    batch, length, heads, width = x_BTHE.shape
    x_BKTGE = x_BTHE.view(batch, length, heads // heads_per_key, heads_per_key, width).transpose(
        1, 2
    )
    return x_BKTGE.reshape(
        batch * heads // heads_per_key, length * heads_per_key, width
    ).contiguous()


def _from_rows(x_NRE: Tensor, batch: int, heads_per_key: int) -> Tensor:
    """The reverse of `_to_rows`."""
    count, row_count, width = x_NRE.shape
    x_BTKGE = x_NRE.view(
        batch, count // batch, row_count // heads_per_key, heads_per_key, width
    ).transpose(1, 2)
    return x_BTKGE.flatten(2, 3)


def _scale(q_NRE: Tensor) -> float:
    return float(q_NRE.shape[-1] ** -0.5)


def _scores(q_NRE: Tensor, k_NCE: Tensor, mask_RC: Tensor | None) -> Tensor:
    """Scaled products in fp32 or wider, -inf where a key is hidden."""
    score = _scaled_matmul(q_NRE, k_NCE.mT, _scale(q_NRE)).to(_wide_dtype(q_NRE))
    return score if mask_RC is None else score.masked_fill_(mask_RC, float("-inf"))


def _scaled_matmul(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale x a @ b of batches."""
    # Not bmm, whose results selective recomputation keeps (model/layers.SAVED_OPS): scores of all
    # tiles would take as much memory as the attention probabilities.
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0.0, alpha=scale)
