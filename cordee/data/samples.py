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
from cordee.data.order import Order
from cordee.errors import DataError
from cordee.model.initial import seeded

Batch = tuple[Tensor, ...]


class Samples(Protocol):
    """What a caller may bring as data (torch.utils.data.Dataset is one)."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int) -> Any:
        """One sample: a tensor, a number, or a tuple of them, of the same shapes for all."""
        ...


class SampleLoader:
    """Gives the engine its microbatches."""

    def __init__(self, samples: Samples, order: Order) -> None:
        self._samples = samples
        self._order = order

    def begin(self, step: int, indices: range) -> None:
        """Nothing is loaded ahead."""

    def microbatch(self, step: int, index: int) -> Batch:
        """The samples of a microbatch, each field stacked [rows, ...]."""
        with drawing("train", self._order.seed, step, index):
            return stack(self._samples, self.ids(step, index).tolist())

    def ids(self, step: int, index: int) -> NDArray[np.int64]:
        """Ids of the samples of a microbatch."""
        return self._order.rows_of(step, index)


@contextmanager
def drawing(*key: object) -> Iterator[None]:
    """Inside, the generators of torch (on the CPU), numpy and random are a function of `key`, so
    that samples that draw are the same on any rank and after a restart; outside, they go on."""
    text = " ".join(map(str, ("samples", *key))).encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    plain, legacy = random.getstate(), np.random.get_state()
    random.seed(number)
    np.random.seed(number % 2**32)
    try:
        with seeded(number >> 1, torch.device("cpu")):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(legacy)


def stack(samples: Samples, ids: Sequence[int]) -> Batch:
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


def batches(samples: Samples, rows: int, count: int) -> Iterator[Batch]:
    """At most `count` batches of `rows` samples in their own order; the last may be shorter."""
    stop = min(len(samples), rows * count)
    for first in range(0, stop, rows):
        with drawing("held out", first):
            batch = stack(samples, range(first, min(first + rows, stop)))
        yield batch


def describe_samples(samples: Samples, seed: int) -> DatasetInfo:
    """What a run keeps of a data set that it cannot copy: its length, and some samples' bits.

    DataError when there are no samples, or one is another when it is read again: the run could
    neither go on after a fault nor be the same on other ranks.
    """
    if not len(samples):
        raise DataError("the data has no samples", values={"data": type(samples).__name__})
    digest = xxhash.xxh3_128(str(len(samples)).encode())
    for place in sorted({0, len(samples) // 2, len(samples) - 1}):
        bits, again = _bits(samples, place, seed), _bits(samples, place, seed)
        if bits != again:
            raise DataError(
                "a sample is another one when it is read again: what does it draw from?",
                values={"data": type(samples).__name__, "sample": place},
                fix="torch.rand, numpy.random or random.random without a generator of your own:"
                " these follow from the seed, the step and the microbatch",
            )
        digest.update(bits)
    return DatasetInfo(
        folder=Path(), name=type(samples).__name__, vocabulary=2, dtype="", tokenizer="none",
        bytes_per_token=1.0, entropy_bits=None, end_of_document=None, held_out=0.0, seed=seed,
        sources=(), skipped={}, splits={}, fingerprint=digest.hexdigest(),
    )  # fmt: skip


def _bits(samples: Samples, place: int, seed: int) -> bytes:
    """A sample as bytes: shapes, types and elements."""
    with drawing("described", seed, place):
        fields = stack(samples, [place])
    found = []
    for field in fields:
        plain = field.detach().cpu().contiguous().view(-1).view(torch.uint8)
        found += [f"{tuple(field.shape)} {field.dtype}".encode(), plain.numpy().tobytes()]
    return b"".join(found)
