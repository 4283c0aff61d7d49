"""The counted table beside a model's bits per byte: probabilities, and a slow way to the same."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cordee.data.byte_table import ngram_bits_per_byte


def expected_bits(corpus: bytes, rows: list[bytes], order: int) -> float:
    """The same by dictionaries, one byte at a time."""
    counts = [
        Counter((corpus[i : i + k], corpus[i + k]) for i in range(len(corpus) - k))
        for k in range(order + 1)
    ]

    def probability(context: bytes, byte: int) -> float:
        value = 1 / 256
        for k in range(min(order, len(context)) + 1):
            suffix = context[len(context) - k :]
            next_counts = {b: n for (c, b), n in counts[k].items() if c == suffix}
            if next_counts:
                value = (next_counts.get(byte, 0) + len(next_counts) * value) / (
                    sum(next_counts.values()) + len(next_counts)
                )
        return value

    bits = [-math.log2(probability(row[:i], row[i])) for row in rows for i in range(1, len(row))]
    return sum(bits) / len(bits)


def to_array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


texts = st.text("abc", max_size=60).map(str.encode)


@given(texts, st.lists(st.text("abcd", min_size=6, max_size=6).map(str.encode), min_size=1,
                       max_size=4), st.integers(0, 4))  # fmt: skip
def test_it_is_what_counting_by_hand_gives(corpus: bytes, rows: list[bytes], order: int) -> None:
    bits = ngram_bits_per_byte(to_array(corpus), np.stack([to_array(row) for row in rows]), order)
    assert bits == pytest.approx(expected_bits(corpus, rows, order), rel=1e-12)


@given(texts, st.text("abcd", min_size=2, max_size=7).map(str.encode))
def test_probabilities_of_the_next_byte_sum_to_one(corpus: bytes, context: bytes) -> None:
    context_bits = (len(context) - 1) * ngram_bits_per_byte(
        to_array(corpus), to_array(context)[None]
    )
    total = 0.0
    for byte in range(256):
        row = to_array(context + bytes([byte]))[None]
        total += 2 ** (context_bits - len(context) * ngram_bits_per_byte(to_array(corpus), row))
    assert total == pytest.approx(1.0, rel=1e-9)
