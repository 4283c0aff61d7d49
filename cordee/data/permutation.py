"""Keyed permutations of [0, rows): any place in O(1), both ways, without a table.

6 rounds of a mixing function are enough that no test of order tells them from chance
(tests/paper/test_order.py); they are no cipher.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6

_U64 = NDArray[np.uint64]
_I64 = NDArray[np.int64]
_Network = Callable[[_U64, tuple[int, int], _U64], _U64]
_MASK = (1 << 64) - 1
# Odd 64-bit constants: the golden ratio, and Stafford's "variant 13" finaliser (as in SplitMix64).
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_A = 0xBF58476D1CE4E5B9
_MIX_B = 0x94D049BB133111EB
_SHIFT_32 = np.uint64(32)


def permute(position: _I64, rows: int, seed: int, epoch: int | _I64 = 0) -> _I64:
    """Row at each place of an epoch's permutation of [0, rows); int64 (n,) to int64 (n,).

    A Feistel network (Luby and Rackoff 1988) over Z_a x Z_b with a*b just above `rows`, and
    cycle walking (Black and Rogaway 2002) for the few values in between: fewer than 1 in
    sqrt(rows). `epoch` is one number, or an array with one entry or as many as `position`.
    """
    return _cycle_walk(position, rows, _round_keys(seed, epoch), _feistel_forward)


def invert(row: _I64, rows: int, seed: int, epoch: int | _I64 = 0) -> _I64:
    """Place of each row in the epoch's permutation: the inverse of `permute`."""
    return _cycle_walk(row, rows, _round_keys(seed, epoch), _feistel_backward)


def stream_seed(seed: int, number: int) -> int:
    """A seed of its own for each `number` from 0 on, whatever the seed."""
    return _mix_int((_mix_int((seed & _MASK) ^ _GOLDEN) + (number + 1) * _GOLDEN) & _MASK)


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX_A) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_B) & _MASK
    return x ^ (x >> 31)


def _side_lengths(rows: int) -> tuple[int, int]:
    """a = ceil(sqrt(rows)) and b = ceil(rows / a), so rows <= a*b < rows + a; both <= 2^20."""
    a = math.isqrt(rows - 1) + 1
    return a, -(-rows // a)


def _mix(x: _U64) -> _U64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_A)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_B)
    return x ^ (x >> np.uint64(31))


def _round_keys(seed: int, epoch: int | _I64) -> _U64:
    """Keys (ROUNDS, 1) for one epoch or (ROUNDS, n) for one epoch each."""
    epochs = np.atleast_1d(np.asarray(epoch)).astype(np.uint64)
    stream = _mix(np.uint64(_mix_int((seed & _MASK) ^ _GOLDEN)) ^ epochs)
    numbers = np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(numbers[:, None] + stream[None, :])


def _round_function(half: _U64, key: _U64, modulus: np.uint64) -> _U64:
    """A keyed value in [0, modulus) for each half. The high 32 bits times the modulus replace a
    remainder (Lemire 2019): faster, and the bias is below modulus / 2^32."""
    x = half ^ key
    x *= np.uint64(_MIX_A)
    x ^= x >> _SHIFT_32
    x *= np.uint64(_MIX_B)
    x >>= _SHIFT_32
    x *= modulus
    x >>= _SHIFT_32
    return x


def _feistel_forward(value: _U64, sides: tuple[int, int], keys: _U64) -> _U64:
    a, b = np.uint64(sides[0]), np.uint64(sides[1])
    left = value // b
    right = value - left * b
    for round_index in range(ROUNDS):
        if round_index % 2 == 0:
            left += _round_function(right, keys[round_index], a)
            # One subtraction at most; below the modulus it wraps to a huge number, which loses.
            left = np.minimum(left, left - a)
        else:
            right += _round_function(left, keys[round_index], b)
            right = np.minimum(right, right - b)
    return left * b + right


def _feistel_backward(value: _U64, sides: tuple[int, int], keys: _U64) -> _U64:
    a, b = np.uint64(sides[0]), np.uint64(sides[1])
    left = value // b
    right = value - left * b
    for round_index in reversed(range(ROUNDS)):
        if round_index % 2 == 0:
            left -= _round_function(right, keys[round_index], a)
            left = np.minimum(left, left + a)
        else:
            right -= _round_function(left, keys[round_index], b)
            right = np.minimum(right, right + b)
    return left * b + right


def _cycle_walk(values: _I64, rows: int, keys: _U64, network: _Network) -> _I64:
    """Apply the network, again for values that left [0, rows): the orbit always returns."""
    sides = _side_lengths(rows)
    out = network(np.ascontiguousarray(values).view(np.uint64), sides, keys)
    outside_indices = np.flatnonzero(out >= rows)
    while outside_indices.size:
        outside_keys = keys if keys.shape[1] == 1 else keys[:, outside_indices]
        out[outside_indices] = network(out[outside_indices], sides, outside_keys)
        outside_indices = outside_indices[out[outside_indices] >= rows]
    return out.view(np.int64)
