"""What counting can do: bits per byte of a table of the last bytes, the figure beside a model's.

An interpolated n-gram model of bytes: order k mixes its counts with order k - 1 by how many
different bytes followed (Witten & Bell 1991), down to 1/256 for each byte, so that the
probabilities of the 256 bytes sum to 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NGRAM_ORDER = 4
"""Bytes of context."""

ByteArray = NDArray[np.uint8]


def ngram_bits_per_byte(train_bytes: ByteArray, rows: ByteArray, order: int = NGRAM_ORDER) -> float:
    """Mean bits per byte of `rows` [rows, length]: each byte but a row's first, from up to
    `order` bytes before it in the row; counts are those of `train_bytes` [bytes]."""
    windows = _context_windows(rows, order)
    probability = np.full(windows.shape[0], 1 / 256)
    for length in range(order + 1):
        mask = windows[:, order] >= length
        contexts, targets = _context_keys(windows[mask], length, order)
        context_counts, distinct_counts, target_counts = _look_up(
            _count_ngrams(train_bytes, length), contexts, targets
        )
        denominator = context_counts + distinct_counts
        mixture = (target_counts + distinct_counts * probability[mask]) / np.maximum(denominator, 1)
        probability[mask] = np.where(denominator > 0, mixture, probability[mask])
    return float(-np.log2(probability).mean())


def _context_windows(rows: ByteArray, order: int) -> NDArray[np.int64]:
    """For each target: the `order` bytes before it (oldest first; 0 where the row has none), how
    many of them there are, the target."""
    row_count, length = rows.shape
    padded_rows = np.concatenate([np.zeros((row_count, order), np.uint8), rows], axis=1)
    columns = [padded_rows[:, i + 1 : i + length].reshape(-1) for i in range(order)]
    context_lengths = np.broadcast_to(
        np.minimum(np.arange(1, length), order), (row_count, length - 1)
    )
    return np.stack(
        [*columns, context_lengths.reshape(-1), rows[:, 1:].reshape(-1)], axis=1
    ).astype(np.int64)


def _context_keys(
    windows: NDArray[np.int64], length: int, order: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The last `length` bytes of the context as one number, and the target."""
    context = np.zeros(windows.shape[0], np.int64)
    for i in range(order - length, order):
        context = context * 256 + windows[:, i]
    return context, windows[:, order + 1]


_NgramCounts = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _count_ngrams(train_bytes: ByteArray, length: int) -> _NgramCounts:
    """Sorted keys of (context, next byte) with their counts; where each context starts among them,
    and sorted contexts."""
    stop = max(0, train_bytes.size - length)
    keys = np.zeros(stop, np.int64)
    for i in range(length + 1):
        keys = keys * 256 + train_bytes[i : i + stop]
    pairs, counts = np.unique(keys, return_counts=True)
    contexts, starts = np.unique(pairs >> 8, return_index=True)
    return pairs, counts, starts, contexts


def _look_up(
    table: _NgramCounts, contexts: NDArray[np.int64], targets: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For each (context, target): how often the context came, how many different bytes followed,
    and how often the target did."""
    pairs, counts, starts, table_contexts = table
    if not pairs.size:
        zeros = np.zeros_like(contexts)
        return zeros, zeros, zeros
    totals = np.add.reduceat(counts, starts)
    distinct_counts = np.diff(np.append(starts, pairs.size))
    context_index = np.minimum(np.searchsorted(table_contexts, contexts), table_contexts.size - 1)
    has_context = table_contexts[context_index] == contexts
    pair_keys = contexts * 256 + targets
    pair_index = np.minimum(np.searchsorted(pairs, pair_keys), pairs.size - 1)
    target_counts = np.where(pairs[pair_index] == pair_keys, counts[pair_index], 0)
    return (
        np.where(has_context, totals[context_index], 0),
        np.where(has_context, distinct_counts[context_index], 0),
        target_counts,
    )
