"""The counted table beside a model's bits per byte: probabilities, and a slow way to the same."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cordee.data.byte_table import table_bits_per_byte


def by_hand(trained: bytes, rows: list[bytes], order: int) -> float:
    """The same by dictionaries, one byte at a time."""
    counts = [
        Counter((trained[i : i + k], trained[i + k]) for i in range(len(trained) - k))
        for k in range(order + 1)
    ]

    def probability(context: bytes, byte: int) -> float:
        value = 1 / 256
        for k in range(min(order, len(context)) + 1):
            suffix = context[len(context) - k :]
            after = {b: n for (c, b), n in counts[k].items() if c == suffix}
            if after:
                value = (after.get(byte, 0) + len(after) * value) / (
                    sum(after.values()) + len(after)
                )
        return value

    bits = [-math.log2(probability(row[:i], row[i])) for row in rows for i in range(1, len(row))]
    return sum(bits) / len(bits)


def array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


texts = st.text("abc", max_size=60).map(str.encode)


@given(texts, st.lists(st.text("abcd", min_size=6, max_size=6).map(str.encode), min_size=1,
                       max_size=4), st.integers(0, 4))  # fmt: skip
def test_it_is_what_counting_by_hand_gives(trained: bytes, rows: list[bytes], order: int) -> None:
    table = table_bits_per_byte(array(trained), np.stack([array(row) for row in rows]), order)
    assert table == pytest.approx(by_hand(trained, rows, order), rel=1e-12)


@given(texts, st.text("abcd", min_size=2, max_size=7).map(str.encode))
def test_probabilities_of_the_next_byte_sum_to_one(trained: bytes, context: bytes) -> None:
    before = (len(context) - 1) * table_bits_per_byte(array(trained), array(context)[None])
    total = 0.0
    for byte in range(256):
        row = array(context + bytes([byte]))[None]
        total += 2 ** (before - len(context) * table_bits_per_byte(array(trained), row))
    assert total == pytest.approx(1.0, rel=1e-9)
