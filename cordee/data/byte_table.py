"""What counting can do: bits per byte of a table of the last bytes, the figure beside a model's.

An interpolated n-gram model of bytes: order k mixes its counts with order k - 1 by how many
different bytes followed (Witten & Bell 1991), down to 1/256 for each byte, so that the
probabilities of the 256 bytes sum to 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ORDER = 4
"""Bytes of context."""

Bytes = NDArray[np.uint8]


def table_bits_per_byte(trained: Bytes, rows: Bytes, order: int = ORDER) -> float:
    """Mean bits per byte of `rows` [rows, length]: each byte but a row's first, from up to `order`
    bytes before it in the row; counts are those of `trained` [bytes]."""
    windows = _contexts(rows, order)
    probability = np.full(windows.shape[0], 1 / 256)
    for length in range(order + 1):
        usable = windows[:, order] >= length
        contexts, targets = _keys(windows[usable], length, order)
        total, distinct, count = _look_up(_counts(trained, length), contexts, targets)
        seen = total + distinct
        mixed = (count + distinct * probability[usable]) / np.maximum(seen, 1)
        probability[usable] = np.where(seen > 0, mixed, probability[usable])
    return float(-np.log2(probability).mean())


def _contexts(rows: Bytes, order: int) -> NDArray[np.int64]:
    """For each target: the `order` bytes before it (oldest first; 0 where the row has none), how
    many of them there are, the target."""
    number, length = rows.shape
    padded = np.concatenate([np.zeros((number, order), np.uint8), rows], axis=1)
    columns = [padded[:, i + 1 : i + length].reshape(-1) for i in range(order)]
    known = np.broadcast_to(np.minimum(np.arange(1, length), order), (number, length - 1))
    return np.stack([*columns, known.reshape(-1), rows[:, 1:].reshape(-1)], axis=1).astype(np.int64)


def _keys(
    windows: NDArray[np.int64], length: int, order: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The last `length` bytes of the context as one number, and the target."""
    context = np.zeros(windows.shape[0], np.int64)
    for i in range(order - length, order):
        context = context * 256 + windows[:, i]
    return context, windows[:, order + 1]


_Counts = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _counts(trained: Bytes, length: int) -> _Counts:
    """Sorted keys of (context, next byte) with their counts; where each context starts among them,
    and sorted contexts."""
    stop = max(0, trained.size - length)
    keys = np.zeros(stop, np.int64)
    for i in range(length + 1):
        keys = keys * 256 + trained[i : i + stop]
    pairs, counts = np.unique(keys, return_counts=True)
    contexts, starts = np.unique(pairs >> 8, return_index=True)
    return pairs, counts, starts, contexts


def _look_up(
    table: _Counts, contexts: NDArray[np.int64], targets: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For each (context, target): how often the context came, how many different bytes followed,
    and how often the target did."""
    pairs, counts, starts, known = table
    if not pairs.size:
        nothing = np.zeros_like(contexts)
        return nothing, nothing, nothing
    totals = np.add.reduceat(counts, starts)
    distinct = np.diff(np.append(starts, pairs.size))
    place = np.minimum(np.searchsorted(known, contexts), known.size - 1)
    there = known[place] == contexts
    pair = contexts * 256 + targets
    at = np.minimum(np.searchsorted(pairs, pair), pairs.size - 1)
    count = np.where(pairs[at] == pair, counts[at], 0)
    return np.where(there, totals[place], 0), np.where(there, distinct[place], 0), count
