"""Held-out loss and accuracy: the same rows in the same order, whatever the number of ranks.

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
import torch.nn.functional as F
from torch import Tensor

from cordee.layout.microbatches import split_evenly


@dataclass(frozen=True)
class EvaluationResult:
    """Mean loss in nats a target, in bits a byte (language models), the part of labels that were
    guessed (classifiers), and on how many tokens, or images. `nonfinite_batches` says how many
    batches have a loss that is no finite number; then there is no mean, and `loss` is NaN."""

    loss: float
    bits_per_byte: float | None
    accuracy: float | None
    tokens: int
    nonfinite_batches: int = 0


class Scorer(Protocol):
    """What gives the loss of tokens (parallel/engine.py does)."""

    def loss(self, batch: Any) -> Tensor:
        """Summed loss in nats of int64 (rows, sequence + 1), or of a batch of a caller's own."""
        ...

    def infer(self, inputs: Tensor, targets: Tensor | None) -> Tensor:
        """Without targets, what the model gives: logits of int64 (rows, sequence)."""
        ...

    def set_training(self, training: bool) -> None:
        """Sets what dropout and the like do."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...


def evaluate(
    scorer: Scorer,
    batches: Sequence[Any],
    worker: tuple[int, int],
    gather: Callable[[Tensor], Tensor],
    bytes_per_token: float | None,
) -> EvaluationResult:
    """`batches` are int64 (rows, sequence + 1), all of them on every rank; `worker` is
    (index, count); `gather` stacks a small fp64 vector of every worker. Without `bytes_per_token`
    the model is a classifier: its logits are asked for, and the first token of a row is its label;
    or batches are tuples, a caller's own."""
    index, count = worker
    worker_batches = split_evenly(len(batches), count)
    max_batches = max(map(len, worker_batches))
    sums = torch.zeros(2 * max_batches, dtype=torch.float64)
    scorer.set_training(training=False)
    for slot in range(max_batches):
        has_batch = slot < len(worker_batches[index])
        loss, correct = _score_batch(
            scorer, batches[worker_batches[index][slot] if has_batch else 0], bytes_per_token
        )
        if has_batch:
            sums[slot], sums[max_batches + slot] = float(loss), correct
    worker_sums = gather(sums)
    slots = [(w, slot) for w, part in enumerate(worker_batches) for slot in range(len(part))]
    losses = [float(worker_sums[w, slot]) for w, slot in slots]
    total_loss, nonfinite_batches = (
        sum_or_nan(losses),
        sum(not math.isfinite(loss) for loss in losses),
    )
    if bytes_per_token is None:
        is_user_batch = isinstance(batches[0], tuple)
        count = sum(len(batch[0] if is_user_batch else batch) for batch in batches)
        correct = math.fsum(float(worker_sums[w, max_batches + slot]) for w, slot in slots)
        return EvaluationResult(
            total_loss / count,
            None,
            None if is_user_batch else correct / count,
            count,
            nonfinite_batches,
        )
    token_count = sum(batch[:, 1:].numel() for batch in batches)
    mean_loss = total_loss / token_count
    bits = mean_loss / math.log(2) / bytes_per_token
    return EvaluationResult(mean_loss, bits, None, token_count, nonfinite_batches)


def sum_or_nan(losses: Sequence[float]) -> float:
    """Their sum, rounded once; NaN when one of them is not finite (infinities may be of both
    signs)."""
    return math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan


def _score_batch(scorer: Scorer, batch: Any, bytes_per_token: float | None) -> tuple[Tensor, float]:
    """Summed loss of a batch, and how many labels a classifier guessed."""
    if isinstance(batch, tuple) or bytes_per_token is not None:
        return scorer.loss(batch), 0.0
    tokens = batch.to(scorer.device)
    return _score_labels(scorer.infer(tokens[:, :-1], None), tokens[:, 0])


def _score_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Summed loss of [rows, classes], and how many labels are the likeliest class."""
    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    return loss, float((logits.argmax(-1) == labels).sum())
