"""Held-out loss and accuracy: the same rows in the same order, whatever the number of ranks.

Batches are dealt in contiguous parts; ranks with fewer compute an empty one (weight zero), because
sharded islands need equal numbers of forwards. Sums are taken in batch order in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cordee.layout.split import split_evenly


@dataclass(frozen=True)
class HeldOut:
    """Mean loss in nats a target, in bits a byte (language models), the part of labels that were
    guessed (classifiers), and on how many tokens, or images."""

    loss: float
    bits_per_byte: float | None
    accuracy: float | None
    tokens: int


def evaluate(
    model: nn.Module,
    batches: Sequence[Tensor],
    worker: tuple[int, int],
    gather: Callable[[Tensor], Tensor],
    bytes_per_token: float | None,
    autocast: bool,
) -> HeldOut:
    """`batches` are int64 (rows, sequence + 1), all of them on every rank; `worker` is (index,
    count); `gather` stacks a small fp64 vector of every worker. Without `bytes_per_token` the model
    is a classifier: its logits are asked for, and the first token of a row is its label."""
    index, count = worker
    parts = split_evenly(len(batches), count)
    most = max(map(len, parts))
    sums = torch.zeros(2 * most, dtype=torch.float64)
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        for place in range(most):
            mine = place < len(parts[index])
            tokens = batches[parts[index][place] if mine else 0].to(device)
            if bytes_per_token is None:
                loss, guessed = _classified(model(tokens[:, :-1]), tokens[:, 0])
            else:
                loss, guessed = model(tokens[:, :-1], tokens[:, 1:]), 0.0
            if mine:
                sums[place], sums[most + place] = float(loss), guessed
    rows = gather(sums)
    places = [(w, place) for w, part in enumerate(parts) for place in range(len(part))]
    total = math.fsum(float(rows[w, place]) for w, place in places)
    if bytes_per_token is None:
        images = sum(len(batch) for batch in batches)
        guessed = math.fsum(float(rows[w, most + place]) for w, place in places)
        return HeldOut(total / images, None, guessed / images, images)
    tokens_count = sum(batch[:, 1:].numel() for batch in batches)
    loss_mean = total / tokens_count
    return HeldOut(loss_mean, loss_mean / math.log(2) / bytes_per_token, None, tokens_count)


def _classified(logits: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Summed loss of [rows, classes], and how many labels are the likeliest class."""
    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    return loss, float((logits.argmax(-1) == labels).sum())
