"""Batches of a data set that a caller brings: any samples, in the house's global order.

A data set has a length and items; an item is a tensor, a number or a tuple of such. Which sample is
in which microbatch follows from (seed, step, microbatch), as for tokens, and so does what items
draw (augmentation) from the generators of torch, numpy and random. Not here: files, workers that
load ahead. Traded away: a collate function; fields are stacked.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from cordee.data.manifest import DatasetInfo
from cordee.data.order import SampleOrder
from cordee.errors import DataError
from cordee.model.init_weights import seeded_rng

Batch = tuple[Tensor, ...]


class MapDataset(Protocol):
    """What a caller may bring as data (torch.utils.data.Dataset is one)."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int) -> Any:
        """One sample: a tensor, a number, or a tuple of them, of the same shapes for all."""
        ...


class SampleLoader:
    """Gives the engine its microbatches."""

    def __init__(self, samples: MapDataset, order: SampleOrder) -> None:
        self._samples = samples
        self._order = order

    def begin(self, step: int, indices: range) -> None:
        """Nothing is loaded ahead."""

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
            torch.stack([torch.as_tensor(field) for field in fields])
            for fields in zip(*rows, strict=True)
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            "the samples of a microbatch do not stack",
            values={"samples": list(ids)[:4], "error": str(error)[:200]},
            fix="items that are tensors of one shape, or tuples of such",
        ) from error


def sample_batches(samples: MapDataset, rows: int, count: int) -> Iterator[Batch]:
    """At most `count` batches of `rows` samples in their own order; the last may be
    shorter."""
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
        first_read, second_read = (
            _sample_bytes(samples, index, seed),
            _sample_bytes(samples, index, seed),
        )
        if first_read != second_read:
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
    for field in fields:
        raw_bytes = field.detach().cpu().contiguous().view(-1).view(torch.uint8)
        chunks += [f"{tuple(field.shape)} {field.dtype}".encode(), raw_bytes.numpy().tobytes()]
    return b"".join(chunks)
