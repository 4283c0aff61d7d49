"""Held-out loss: the same rows in the same order, whatever the number of ranks.

Batches are dealt to workers in contiguous parts; those with fewer compute one in vain (weight
zero), because the ranks of an island need equal numbers of forwards. Sums are taken in batch order
in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cordee.layout.microbatches import split_evenly


@dataclass(frozen=True)
class EvaluationResult:
    """Mean loss in nats a target, in bits a byte (of tokens), and on how many tokens or samples.
    `nonfinite_batches` says how many batches have a loss that is no finite number; then there is no
    mean, and `loss` is NaN."""

    loss: float
    bits_per_byte: float | None
    tokens: int
    nonfinite_batches: int = 0


class Scorer(Protocol):
    """What gives the loss of tokens (parallel/engine.py does)."""

    def loss(self, batch: Any) -> Tensor:
        """Summed loss in nats of int64 (rows, sequence + 1), or of a batch of a caller's own."""
        ...

    def set_training(self, training: bool) -> None:
        """Sets what dropout and the like do."""
        ...


def evaluate(
    scorer: Scorer,
    batches: Sequence[Any],
    worker: tuple[int, int],
    gather: Callable[[Tensor], Tensor],
    bytes_per_token: float | None,
) -> EvaluationResult:
    """`batches` are int64 (rows, sequence + 1), or tuples, a caller's own, all of them on every
    rank; `worker` is (index, count); `gather` stacks a small fp64 vector of every worker.
    `bytes_per_token` is None for batches of a caller's own, whose loss is a mean over samples."""
    index, count = worker
    worker_batches = split_evenly(len(batches), count)
    max_batches = max(map(len, worker_batches))
    sums = torch.zeros(max_batches, dtype=torch.float64)
    scorer.set_training(training=False)
    for slot in range(max_batches):
        has_batch = slot < len(worker_batches[index])
        loss = scorer.loss(batches[worker_batches[index][slot] if has_batch else 0])
        if has_batch:
            sums[slot] = float(loss)
    worker_sums = gather(sums)
    losses = [
        float(worker_sums[w, slot])
        for w, part in enumerate(worker_batches)
        for slot in range(len(part))
    ]
    nonfinite_batches = sum(not math.isfinite(loss) for loss in losses)
    if bytes_per_token is None:
        sample_count = sum(len(batch[0]) for batch in batches)
        return EvaluationResult(
            sum_or_nan(losses) / sample_count, None, sample_count, nonfinite_batches
        )
    token_count = sum(batch[:, 1:].numel() for batch in batches)
    mean_loss = sum_or_nan(losses) / token_count
    bits = mean_loss / math.log(2) / bytes_per_token
    return EvaluationResult(mean_loss, bits, token_count, nonfinite_batches)


def sum_or_nan(losses: Sequence[float]) -> float:
    """Their sum, rounded once; NaN when one of them is not finite (infinities may be of both
    signs)."""
    return math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
