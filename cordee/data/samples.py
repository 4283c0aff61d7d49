"""Batches of a data set that a caller brings: any samples, in the house's global order.

A data set has a length and items; an item is a tensor, a number or a tuple of such. Which sample is
in which microbatch follows from (seed, step, microbatch), as for tokens. Not here: files, workers
that load ahead. Traded away: a collate function; fields are stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        return stack(self._samples, self.ids(step, index).tolist())

    def ids(self, step: int, index: int) -> NDArray[np.int64]:
        """Ids of the samples of a microbatch."""
        return self._order.rows_of(step, index)


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
        yield stack(samples, range(first, min(first + rows, stop)))


def describe_samples(samples: Samples, seed: int) -> DatasetInfo:
    """What a run keeps of a data set that it cannot copy: its length, and some samples' bits."""
    if not len(samples):
        raise DataError("the data has no samples", values={"data": type(samples).__name__})
    digest = xxhash.xxh3_128(str(len(samples)).encode())
    for place in {0, len(samples) // 2, len(samples) - 1}:
        for field in stack(samples, [place]):
            digest.update(f"{tuple(field.shape)} {field.dtype}".encode())
            digest.update(field.contiguous().view(-1).view(torch.uint8).numpy().data)
    return DatasetInfo(
        folder=Path(), name=type(samples).__name__, vocabulary=2, dtype="", tokenizer="none",
        bytes_per_token=1.0, entropy_bits=None, end_of_document=None, held_out=0.0, seed=seed,
        sources=(), skipped={}, splits={}, fingerprint=digest.hexdigest(),
    )  # fmt: skip
