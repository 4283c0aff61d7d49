"""Held-out loss: the same rows in the same order, whatever the number of ranks.

Batches are dealt to workers in contiguous parts; those with fewer compute one in vain (weight
zero), because the ranks of an island need equal numbers of forwards. Sums are taken in batch order
in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cordee.layout.split import split_evenly


@dataclass(frozen=True)
class HeldOut:
    """Mean loss in nats a token, in bits a byte, and on how many tokens."""

    loss: float
    bits_per_byte: float
    tokens: int


class Scorer(Protocol):
    """What gives the loss of tokens (parallel/engine.py does)."""

    def loss(self, tokens: Tensor) -> Tensor:
        """Summed loss in nats of int64 (rows, sequence + 1)."""
        ...

    def modes(self, training: bool) -> None:
        """Sets what dropout and the like do."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...


def evaluate(
    scorer: Scorer,
    batches: Sequence[Tensor],
    worker: tuple[int, int],
    gather: Callable[[Tensor], Tensor],
    bytes_per_token: float,
) -> HeldOut:
    """`batches` are int64 (rows, sequence + 1), all of them on every rank; `worker` is (index,
    count); `gather` stacks a small fp64 vector of every worker."""
    index, count = worker
    parts = split_evenly(len(batches), count)
    most = max(map(len, parts))
    sums = torch.zeros(most, dtype=torch.float64)
    scorer.modes(training=False)
    for place in range(most):
        mine = place < len(parts[index])
        loss = scorer.loss(batches[parts[index][place] if mine else 0].to(scorer.device))
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
