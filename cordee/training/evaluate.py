"""What a model is worth: held-out loss, a counted table beside it, and text it writes.

Held-out batches are dealt to workers in contiguous parts; those with fewer compute one in vain
(weight zero), because the ranks of an island need equal numbers of forwards. Sums are taken in
batch order in fp64, so any number of ranks gives the same score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cordee.config.run import Run
from cordee.data.byte_table import ngram_bits_per_byte
from cordee.data.dataset import TokenDataset, open_dataset
from cordee.data.loader import MapDataset, held_out_token_batches, sample_batches
from cordee.data.manifest import DatasetInfo
from cordee.errors import DataError
from cordee.layout.microbatches import split_evenly

SAMPLE_PROMPT = "def "
TABLE_BYTES = 4 << 20
"""Bytes that the counted table is made from at most: it takes half a second."""
LENGTH_MULTIPLE = 32
"""Windows are filled up to a multiple of this: causal models do not see what follows, and libraries
keep compiled code for every shape (0.8 GiB for 240 lengths in bf16 on a CPU)."""


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


def held_out_batches(
    held_out: TokenDataset | MapDataset | None, run: Run, step_tokens: int
) -> list[Any]:
    """What an evaluation scores: the first rows of the held-out data, evaluate.tokens of them."""
    rows = run.batch.microbatch
    count = max(1, int(run.evaluate.tokens) * run.batch.microbatches // step_tokens)
    if isinstance(held_out, TokenDataset):
        return list(held_out_token_batches(held_out, run.data.sequence, rows, count))
    return list(sample_batches(held_out, rows, count)) if held_out else []


def score_byte_table(
    data: DatasetInfo, sequence: int, batches: Sequence[Tensor], trained_tokens: int
) -> float | None:
    """Bits per byte of a table of counts on held-out batches of bytes, counted on as many training
    bytes as the model has seen; None without batches."""
    if not batches:
        return None
    source = open_dataset(data.folder, "train", verify=False)
    row_count = min(source.rows(sequence), TABLE_BYTES // sequence, trained_tokens // sequence)
    # Spread over the whole text, as training rows are.
    row_ids = np.linspace(0, source.rows(sequence) - 1, max(1, row_count)).astype(np.int64)
    train_bytes = source.gather(row_ids, sequence)[:, 1:].astype(np.uint8).reshape(-1)
    return ngram_bits_per_byte(train_bytes, torch.cat(list(batches)).numpy().astype(np.uint8))


@torch.no_grad()
def generate(
    logits: Callable[[Tensor], Tensor],
    prompt: Tensor,
    token_count: int,
    context: int,
    temperature: float,
    seed: int,
) -> Tensor:
    """`prompt` (int64 [T], T >= 1) followed by `token_count` sampled ones, int64 [T + tokens], CPU.

    `logits` maps int64 [1, T] on the CPU to [1, T, V]. Each token sees the `context` tokens before
    it. temperature 0 takes the most likely one. The result is a function of the arguments: numbers
    are drawn on the CPU from their own generator, so ranks that share a model draw alike.
    """
    if prompt.ndim != 1 or prompt.numel() == 0 or context < 1:
        raise DataError(
            "sampling needs a prompt of at least one token and a context of at least one",
            values={"prompt": tuple(prompt.shape), "context": context},
            fix="start from the token 0, which ends a document",
        )
    generator = torch.Generator(device="cpu").manual_seed(seed)
    token_ids = torch.cat((prompt.cpu().long(), torch.zeros(token_count, dtype=torch.int64)))
    for end in range(prompt.numel(), token_ids.numel()):
        window_T = token_ids[max(0, end - context) : end]
        length = len(window_T)
        padded_T = F.pad(
            window_T, (0, min(context, -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE) - length)
        )
        logits_V = logits(padded_T[None])[0, length - 1].float().cpu()
        token_ids[end] = _sample_token(logits_V, temperature, generator)
    return token_ids


def generate_sample(logits: Callable[[Tensor], Tensor], run: Run) -> str:
    """evaluate.sample bytes that a model of bytes writes after a fixed prompt, as text."""
    prompt = torch.tensor(list(SAMPLE_PROMPT.encode()))
    count, window = int(run.evaluate.sample), run.data.sequence
    # Every length of the window would be compiled anew.
    is_compiled = run.run.compile != "none"
    with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
        return to_text(generate(logits, prompt, count, window, 0.8, run.run.seed))


def to_text(tokens: Tensor) -> str:
    """Bytes as UTF-8 text; what is not UTF-8 is shown as U+FFFD, a NUL as a blank line."""
    values = tokens.flatten().tolist()
    if any(value > 255 for value in values):
        raise DataError(
            "only bytes can be shown as text",
            values={"largest token": max(values)},
            fix="sample from a model of bytes (vocabulary 256)",
        )
    return bytes(values).replace(b"\0", b"\n\n").decode("utf-8", errors="replace")


def _sample_token(logits_V: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature <= 0:
        return logits_V.argmax()
    probabilities_V = torch.softmax(logits_V / temperature, -1)
    return torch.multinomial(probabilities_V, 1, generator=generator)[0]
