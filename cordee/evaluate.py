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

from cordee.layout.split import split_evenly


@dataclass(frozen=True)
class HeldOut:
    """Mean loss in nats a target, in bits a byte (language models), the part of labels that were
    guessed (classifiers), and on how many tokens, or images. `not_finite` says how many batches
    have a loss that is no finite number; then there is no mean, and `loss` is NaN."""

    loss: float
    bits_per_byte: float | None
    accuracy: float | None
    tokens: int
    not_finite: int = 0


class Scorer(Protocol):
    """What gives the loss of tokens (parallel/engine.py does)."""

    def loss(self, given: Any) -> Tensor:
        """Summed loss in nats of int64 (rows, sequence + 1), or of a batch of a caller's own."""
        ...

    def infer(self, inputs: Tensor, targets: Tensor | None) -> Tensor:
        """Without targets, what the model gives: logits of int64 (rows, sequence)."""
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
    batches: Sequence[Any],
    worker: tuple[int, int],
    gather: Callable[[Tensor], Tensor],
    bytes_per_token: float | None,
) -> HeldOut:
    """`batches` are int64 (rows, sequence + 1), all of them on every rank; `worker` is (index,
    count); `gather` stacks a small fp64 vector of every worker. Without `bytes_per_token` the model
    is a classifier: its logits are asked for, and the first token of a row is its label; or batches
    are tuples, a caller's own."""
    index, count = worker
    parts = split_evenly(len(batches), count)
    most = max(map(len, parts))
    sums = torch.zeros(2 * most, dtype=torch.float64)
    scorer.modes(training=False)
    for place in range(most):
        mine = place < len(parts[index])
        loss, guessed = _score(scorer, batches[parts[index][place] if mine else 0], bytes_per_token)
        if mine:
            sums[place], sums[most + place] = float(loss), guessed
    rows = gather(sums)
    places = [(w, place) for w, part in enumerate(parts) for place in range(len(part))]
    losses = [float(rows[w, place]) for w, place in places]
    total, odd = total_of(losses), sum(not math.isfinite(loss) for loss in losses)
    if bytes_per_token is None:
        brought = isinstance(batches[0], tuple)
        count = sum(len(batch[0] if brought else batch) for batch in batches)
        guessed = math.fsum(float(rows[w, most + place]) for w, place in places)
        return HeldOut(total / count, None, None if brought else guessed / count, count, odd)
    tokens_count = sum(batch[:, 1:].numel() for batch in batches)
    loss_mean = total / tokens_count
    bits = loss_mean / math.log(2) / bytes_per_token
    return HeldOut(loss_mean, bits, None, tokens_count, odd)


def total_of(losses: Sequence[float]) -> float:
    """Their sum, rounded once; NaN when one of them is not finite (infinities may be of both
    signs)."""
    return math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan


def _score(scorer: Scorer, batch: Any, bytes_per_token: float | None) -> tuple[Tensor, float]:
    """Summed loss of a batch, and how many labels a classifier guessed."""
    if isinstance(batch, tuple) or bytes_per_token is not None:
        return scorer.loss(batch), 0.0
    tokens = batch.to(scorer.device)
    return _classified(scorer.infer(tokens[:, :-1], None), tokens[:, 0])


def _classified(logits: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Summed loss of [rows, classes], and how many labels are the likeliest class."""
    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    return loss, float((logits.argmax(-1) == labels).sum())
