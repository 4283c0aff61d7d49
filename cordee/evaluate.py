"""Held-out loss: the same rows in the same order, whatever the number of ranks.

Batches are dealt in contiguous parts; ranks with fewer compute an empty one (weight zero), because
sharded islands need equal numbers of forwards. Sums are taken in batch order in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cordee.layout.split import split_evenly
from cordee.model.precision import casting


@dataclass(frozen=True)
class HeldOut:
    """Mean loss in nats a token, in bits a byte, and on how many tokens."""

    loss: float
    bits_per_byte: float
    tokens: int


def evaluate(
    model: nn.Module,
    batches: Sequence[Tensor],
    worker: tuple[int, int],
    gather: Callable[[Tensor], Tensor],
    bytes_per_token: float,
    autocast: torch.dtype | None,
    device: str,
) -> HeldOut:
    """`batches` are int64 (rows, sequence + 1), all of them on every rank; `worker` is (index,
    count); `gather` stacks a small fp64 vector of every worker. Computed on `device`."""
    index, count = worker
    parts = split_evenly(len(batches), count)
    most = max(map(len, parts))
    sums = torch.zeros(most, dtype=torch.float64)
    model.eval()
    with torch.no_grad(), casting(device.partition(":")[0], autocast):
        for place in range(most):
            mine = place < len(parts[index])
            tokens = batches[parts[index][place] if mine else 0].to(device)
            loss = model(tokens[:, :-1], tokens[:, 1:])
            if mine:
                sums[place] = loss.double()
    rows = gather(sums)
    total = math.fsum(
        float(rows[worker_index, place])
        for worker_index, part in enumerate(parts)
        for place in range(len(part))
    )
    tokens_count = sum(batch[:, 1:].numel() for batch in batches)
    loss_mean = total / tokens_count
    return HeldOut(loss_mean, loss_mean / math.log(2) / bytes_per_token, tokens_count)
