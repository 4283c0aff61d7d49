"""Microbatches as tensors: rows of a token dataset, or samples of a caller's own data set.

The order says which, whoever loads them. Nothing is buffered beyond a step, so the step number is
the whole state. What samples draw (augmentation) follows from (seed, step, microbatch) too.
"""

from __future__ import annotations

import hashlib
import queue
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from cordee.data.dataset import TokenDataset
from cordee.data.manifest import DatasetInfo
from cordee.data.order import SampleOrder
from cordee.errors import DataError
from cordee.hardware.devices import DEVICES
from cordee.model.init_weights import seeded_rng

# Row ids computed ahead in one go: they cost 40 ns each so, and 4 us each for a batch of 32 alone.
ID_BLOCK_ROWS = 16_384

# ---- rows of tokens ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _StepRows:
    """Rows of a step: their ids, and their tokens as they are kept until delivery."""

    ids: NDArray[np.int64]
    tokens: NDArray[Any] | Tensor


@dataclass
class _GatherRequest:
    """A step to gather, and the answer; `rows` stays None if gathering failed."""

    step: int
    indices: range
    rows: _StepRows | None = None
    done_signal: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)


class TokenLoader:
    """The microbatches of any step, int64 (microbatch_rows, sequence + 1), on `device`.

    `begin(step, indices)` gathers all that this rank needs of a step at once; `microbatch` then
    returns slices, and gathers by itself what was not begun. `prefetch=1` lets one background
    thread gather the step after the begun one: for files that are not in memory yet, and for
    pinned copies to a GPU. There is no state to save: what comes follows from the step.
    DataError when the source has no row of that length or the order is of another length.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        order: SampleOrder,
        sequence: int,
        device: str | torch.device = "cpu",
        prefetch: int = 0,
    ) -> None:
        rows = dataset.rows(sequence)
        if order.rows != rows:
            raise DataError(
                "the order and the source differ in their number of rows",
                values={"order": order.rows, "source": rows, "sequence": sequence},
                fix=f"SampleOrder(rows={rows})",
            )
        if prefetch not in (0, 1):
            values = {"prefetch": prefetch}
            raise DataError("prefetch is 0 or 1 steps ahead", values=values, fix="prefetch=1")
        self._dataset = dataset
        self._order = order
        self._sequence = sequence
        self._device = torch.device(device)
        self._microbatch_rows = order.microbatch_rows
        # The step at hand: tokens (rows, sequence + 1) in the native dtype, of these microbatches.
        self._step = -1
        self._indices = range(0)
        no_rows = np.empty((0, sequence + 1), dataset.dtype)
        self._step_rows = _StepRows(np.empty(0, np.int64), no_rows)
        # Row ids of some steps, (steps, rows of the range), first step, microbatches.
        no_ids = np.empty((0, 0), np.int64)
        self._id_block: tuple[NDArray[np.int64], int, range] = (no_ids, 0, range(0))
        self._next_request: _GatherRequest | None = None
        self._requests: queue.SimpleQueue[_GatherRequest | None] | None = None
        if prefetch:
            self._requests = queue.SimpleQueue()
            # A daemon: storage that hangs must not keep a process alive that wants to end.
            threading.Thread(target=self._serve_requests, name="cordee-loader", daemon=True).start()

    def begin(self, step: int, indices: range) -> None:
        """Gather the microbatches `indices` (contiguous) of a step: one order, one gather."""
        self._step_rows = self._take_prefetch(step, indices)
        self._step, self._indices = step, indices
        if self._requests is not None:
            self._next_request = _GatherRequest(step + 1, indices)
            self._requests.put(self._next_request)

    def microbatch(self, step: int, index: int) -> Tensor:
        """Microbatch `index` of a step, int64 (microbatch_rows, sequence + 1), on the device."""
        if step != self._step or index not in self._indices:
            return self._to_device(self._gather(self._order.microbatch_row_ids(step, index)).tokens)
        return self._to_device(self._step_rows.tokens[self._row_slice(index)])

    def ids(self, step: int, index: int) -> NDArray[np.int64]:
        """Ids of the rows of which `microbatch` hands over the tokens, int64 (microbatch_rows,)."""
        if step != self._step or index not in self._indices:
            return self._order.microbatch_row_ids(step, index)
        return self._step_rows.ids[self._row_slice(index)]

    def close(self) -> None:
        """End the background thread, if there is one. The loader goes on without it."""
        if self._requests is not None:
            self._requests.put(None)
            self._requests = None
            self._next_request = None

    def _row_slice(self, index: int) -> slice:
        first = (index - self._indices.start) * self._microbatch_rows
        return slice(first, first + self._microbatch_rows)

    def _to_device(self, tokens: NDArray[Any] | Tensor) -> Tensor:
        if isinstance(tokens, np.ndarray):
            return torch.from_numpy(tokens.astype(np.int64))
        # Tokens cross to the device in their own width, and widen there: an eighth of the bytes.
        return tokens.to(self._device, non_blocking=True).to(torch.int64)

    def _to_host_buffer(self, tokens: NDArray[Any]) -> NDArray[Any] | Tensor:
        """What is kept until delivery: the array for the CPU, pinned memory for a GPU."""
        if self._device.type == "cpu":
            return tokens
        host_tensor = torch.from_numpy(tokens)
        return host_tensor.pin_memory() if DEVICES[self._device.type].pinning else host_tensor

    def _gather(self, ids: NDArray[np.int64]) -> _StepRows:
        return _StepRows(ids, self._to_host_buffer(self._dataset.gather(ids, self._sequence)))

    def _gather_step(self, step: int, indices: range) -> _StepRows:
        if not indices:
            return self._gather(np.empty(0, np.int64))
        block_ids, first_step, block_indices = self._id_block
        if block_indices != indices or not 0 <= step - first_step < len(block_ids):
            self._id_block = block_ids, first_step, _ = self._compute_id_block(step, indices)
        return self._gather(block_ids[step - first_step])

    def _compute_id_block(self, step: int, indices: range) -> tuple[NDArray[np.int64], int, range]:
        """Row ids of `indices` in this and the next steps, at most ID_BLOCK_ROWS or one step."""
        order = self._order
        start = order.positions(step, indices[0]).start
        width = len(indices) * self._microbatch_rows
        if order.positions(step, indices[-1]).stop != start + width:
            raise DataError(
                "the microbatches of a rank are not contiguous",
                values={"indices": indices},
                fix=f"range({indices[0]}, {indices[-1] + 1})",
            )
        steps = np.arange(max(1, ID_BLOCK_ROWS // width), dtype=np.int64)
        positions = (start + steps * order.step_rows)[:, None] + np.arange(width)
        return order.row_ids_at(positions), step, indices

    def _take_prefetch(self, step: int, indices: range) -> _StepRows:
        """What the thread gathered, if it is what is wanted; else gathered now."""
        request, self._next_request = self._next_request, None
        if request is None:
            return self._gather_step(step, indices)
        # Wait even for an answer that is not wanted: the two threads never gather at once.
        request.done_signal.get()
        if request.rows is None:
            # It failed and its thread is gone. The call below fails likewise, where it is seen.
            self.close()
        elif (request.step, request.indices) == (step, indices):
            return request.rows
        return self._gather_step(step, indices)

    def _serve_requests(self) -> None:
        requests = self._requests
        while requests is not None and (request := requests.get()) is not None:
            try:
                request.rows = self._gather_step(request.step, request.indices)
            finally:
                request.done_signal.put(None)


def held_out_token_batches(
    dataset: TokenDataset, sequence: int, rows: int, count: int | None = None
) -> Iterator[Tensor]:
    """Batches of the held-out split in file order, int64 (rows, sequence + 1): the same for every
    layout and run. At most `count` batches (None: all of them); the last may have fewer rows. Of a
    mixture, sources take turns by weight for as long as none comes round again."""
    mixture = dataset.mixture_order(0, sequence)
    row_count = mixture.max_draws_without_repeat if mixture else dataset.rows(sequence)
    stop = row_count if count is None else min(row_count, rows * count)
    for first in range(0, stop, rows):
        last = min(first + rows, stop)
        file_order_ids = np.arange(first, last, dtype=np.int64)
        ids = mixture.unshuffled_row_ids(first, last) if mixture else file_order_ids
        yield torch.from_numpy(dataset.gather(ids, sequence).astype(np.int64))


# ---- samples of a caller's own -------------------------------------------------------------------

Batch = tuple[Tensor, ...]


class MapDataset(Protocol):
    """What a caller may bring as data (torch.utils.data.Dataset is one)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """One sample: a tensor, a number, or a tuple of them, of the same shapes for all."""
        ...


class SampleLoader:
    """The microbatches of any step, of a caller's own samples; nothing is loaded ahead."""

    def __init__(self, samples: MapDataset, order: SampleOrder) -> None:
        self._samples = samples
        self._order = order

    def begin(self, step: int, indices: range) -> None:
        """Nothing to do."""

    def microbatch(self, step: int, index: int) -> Batch:
        """The samples of a microbatch, each field stacked [rows, ...]."""
        with fixed_random_state("train", self._order.seed, step, index):
            return stack_samples(self._samples, self.ids(step, index).tolist())

    def ids(self, step: int, index: int) -> NDArray[np.int64]:
        """Ids of the samples of a microbatch."""
        return self._order.microbatch_row_ids(step, index)


@contextmanager
def fixed_random_state(*key: object) -> Iterator[None]:
    """Inside, the generators of torch (on the CPU), numpy and random are a function of `key`, so
    that samples that draw are the same on any rank and after a restart; outside, they go on."""
    text = " ".join(map(str, ("samples", *key))).encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        with seeded_rng(seed >> 1, torch.device("cpu")):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def stack_samples(samples: MapDataset, ids: Sequence[int]) -> Batch:
    """Samples `ids`, each field stacked; DataError when they do not fit together."""
    items = [samples[i] for i in ids]
    rows = [item if isinstance(item, tuple | list) else (item,) for item in items]
    try:
        return tuple(
            torch.stack([torch.as_tensor(value) for value in fields])
            for fields in zip(*rows, strict=True)
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            "the samples of a microbatch do not stack",
            values={"samples": list(ids)[:4], "error": str(error)[:200]},
            fix="items that are tensors of one shape, or tuples of such",
        ) from error


def sample_batches(samples: MapDataset, rows: int, count: int) -> Iterator[Batch]:
    """At most `count` batches of `rows` samples in their own order; the last may be shorter."""
    stop = min(len(samples), rows * count)
    for first in range(0, stop, rows):
        with fixed_random_state("held out", first):
            batch = stack_samples(samples, range(first, min(first + rows, stop)))
        yield batch


def describe_samples(samples: MapDataset, seed: int) -> DatasetInfo:
    """What a run keeps of a data set that it cannot copy: its length, and some samples' bits.

    DataError when there are no samples, or one is another when it is read again: the run could
    neither go on after a fault nor be the same on other ranks.
    """
    if not len(samples):
        raise DataError("the data has no samples", values={"data": type(samples).__name__})
    digest = xxhash.xxh3_128(str(len(samples)).encode())
    for index in sorted({0, len(samples) // 2, len(samples) - 1}):
        first_read = _sample_bytes(samples, index, seed)
        if first_read != _sample_bytes(samples, index, seed):
            raise DataError(
                "a sample is another one when it is read again: what does it draw from?",
                values={"data": type(samples).__name__, "sample": index},
                fix="torch.rand, numpy.random or random.random without a generator of your own:"
                " these follow from the seed, the step and the microbatch",
            )
        digest.update(first_read)
    return DatasetInfo(
        folder=Path(), name=type(samples).__name__, vocabulary=2, dtype="", tokenizer="none",
        bytes_per_token=1.0, entropy_bits=None, end_of_document=None, held_out=0.0, seed=seed,
        sources=(), skipped={}, splits={}, fingerprint=digest.hexdigest(),
    )  # fmt: skip


def _sample_bytes(samples: MapDataset, index: int, seed: int) -> bytes:
    """A sample as bytes: shapes, types and elements."""
    with fixed_random_state("described", seed, index):
        fields = stack_samples(samples, [index])
    chunks = []
    for tensor in fields:
        raw_bytes = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        chunks += [f"{tuple(tensor.shape)} {tensor.dtype}".encode(), raw_bytes.numpy().tobytes()]
    return b"".join(chunks)
