"""The global order of samples: a keyed permutation per epoch, computed for any position in O(1).

Not here: ranks, islands, worker counts. A row follows from (seed, position) alone, so who computes
which microbatch cannot change what is trained on. Traded away: locality. Neighbours in the order
are far apart on disk, which a memory map forgives and a remote store would not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cordee.errors import DataError

MAX_ROWS = 1 << 40
ROUNDS = 6

_U64 = NDArray[np.uint64]
_I64 = NDArray[np.int64]
_Network = Callable[[_U64, tuple[int, int], _U64], _U64]
_MASK = (1 << 64) - 1
# Odd 64-bit constants: the golden ratio, and Stafford's "variant 13" finaliser (as in SplitMix64).
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_A = 0xBF58476D1CE4E5B9
_MIX_B = 0x94D049BB133111EB
# Work is done in pieces that stay in the second-level cache.
_PIECE = 8192
_32 = np.uint64(32)


@dataclass(frozen=True)
class Order:
    """Which rows step `s`, microbatch `m` takes: the whole state is the step number.

    Step s (from 0) takes the positions [s*B, (s+1)*B), B = microbatches * microbatch_rows, and
    microbatch m its contiguous slice of them. Position p is place p % rows of epoch p // rows, and
    every epoch is its own permutation of [0, rows). Raises DataError for counts out of range.
    """

    seed: int
    rows: int
    microbatch_rows: int
    microbatches: int

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MAX_ROWS:
            raise DataError(
                "the order needs between 1 and 2^40 rows",
                values={"rows": self.rows},
                fix="a shorter data.sequence" if self.rows < 1 else "a longer data.sequence",
            )
        for name in ("microbatch_rows", "microbatches"):
            if getattr(self, name) < 1:
                raise DataError(
                    f"the order needs a {name} of at least 1",
                    values={name: getattr(self, name)},
                    fix=f"{name}=1",
                )

    @property
    def step_rows(self) -> int:
        """Rows that one step takes: microbatches * microbatch_rows."""
        return self.microbatches * self.microbatch_rows

    def positions(self, step: int, microbatch: int) -> range:
        """The positions of one microbatch, a contiguous range of length microbatch_rows."""
        if step < 0 or not 0 <= microbatch < self.microbatches:
            raise DataError(
                "no such microbatch in this order",
                values={"step": step, "microbatch": microbatch, "microbatches": self.microbatches},
                fix=f"step >= 0 and microbatch in 0..{self.microbatches - 1}",
            )
        first = step * self.step_rows + microbatch * self.microbatch_rows
        return range(first, first + self.microbatch_rows)

    def rows_of(self, step: int, microbatch: int) -> _I64:
        """The row ids of one microbatch, int64 (microbatch_rows,)."""
        taken = self.positions(step, microbatch)
        return self.rows_between(taken.start, taken.stop)

    def rows_between(self, start: int, stop: int) -> _I64:
        """The row ids of the positions [start, stop), int64 (stop - start,); epochs may change."""
        return self.rows_at(np.arange(start, stop, dtype=np.int64))

    def rows_at(self, positions: _I64) -> _I64:
        """The row ids of any non-negative positions, int64, in the shape given."""
        flat = positions.reshape(-1)
        out = np.empty(flat.size, dtype=np.int64)
        for begin in range(0, flat.size, _PIECE):
            epoch, place = np.divmod(flat[begin : begin + _PIECE], self.rows)
            if epoch[0] == epoch[-1] and (epoch == epoch[0]).all():
                epoch = epoch[:1]
            out[begin : begin + _PIECE] = permute(place, self.rows, self.seed, epoch)
        return out.reshape(positions.shape)


@dataclass(frozen=True)
class Mixing:
    """How well an order mixes: `distinct` of 256 equal parts of the data met by 32 consecutive
    rows (on average), what pure `chance` gives, and the correlation of neighbours `lag_one`."""

    distinct: float
    chance: float
    lag_one: float


def permute(place: _I64, rows: int, seed: int, epoch: int | _I64 = 0) -> _I64:
    """Row at each place of an epoch's permutation of [0, rows); int64 (n,) to int64 (n,).

    A Feistel network (Luby and Rackoff 1988) over Z_a x Z_b with a*b just above `rows`, and cycle
    walking (Black and Rogaway 2002) for the few values in between: fewer than 1 in sqrt(rows).
    `epoch` is one number, or an array with one entry or as many as `place`.
    """
    return _walk(place, rows, _round_keys(seed, epoch), _forward)


def invert(row: _I64, rows: int, seed: int, epoch: int | _I64 = 0) -> _I64:
    """Place of each row in the epoch's permutation: the inverse of `permute`."""
    return _walk(row, rows, _round_keys(seed, epoch), _backward)


def mixing(order: Order, batches: int = 512) -> Mixing:
    """The mixing figures of the order's first `batches` * 32 positions (at most one epoch)."""
    width = min(32, order.rows)
    batches = max(1, min(batches, order.rows // width))
    rows = order.rows_between(0, batches * width)
    parts = min(256, order.rows)
    part = np.sort((rows * parts // order.rows).reshape(batches, width), axis=1)
    distinct = 1 + (np.diff(part, axis=1) != 0).sum(axis=1)
    # Drawing without replacement from parts of rows/parts each; exact for equal parts.
    miss = 1.0
    for drawn in range(width):
        left = order.rows - drawn
        miss *= max(0.0, left - order.rows / parts) / left
    # Every row once is no random draw: with few rows the correlation means nothing.
    straight = np.corrcoef(rows[:-1], rows[1:])[0, 1] if rows.size > 2 else 0.0
    return Mixing(float(distinct.mean()), parts * (1.0 - miss), float(straight))


def _mix_slow(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX_A) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_B) & _MASK
    return x ^ (x >> 31)


def _sides(rows: int) -> tuple[int, int]:
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
    stream = _mix(np.uint64(_mix_slow((seed & _MASK) ^ _GOLDEN)) ^ epochs)
    numbers = np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(numbers[:, None] + stream[None, :])


def _round(half: _U64, key: _U64, modulus: np.uint64) -> _U64:
    """A keyed value in [0, modulus) for each half. The high 32 bits times the modulus replace a
    remainder (Lemire 2019): faster, and the bias is below modulus / 2^32."""
    x = half ^ key
    x *= np.uint64(_MIX_A)
    x ^= x >> _32
    x *= np.uint64(_MIX_B)
    x >>= _32
    x *= modulus
    x >>= _32
    return x


def _forward(value: _U64, sides: tuple[int, int], keys: _U64) -> _U64:
    a, b = np.uint64(sides[0]), np.uint64(sides[1])
    left = value // b
    right = value - left * b
    for number in range(ROUNDS):
        if number % 2 == 0:
            left += _round(right, keys[number], a)
            # One subtraction at most; below the modulus it wraps to a huge number, which loses.
            left = np.minimum(left, left - a)
        else:
            right += _round(left, keys[number], b)
            right = np.minimum(right, right - b)
    return left * b + right


def _backward(value: _U64, sides: tuple[int, int], keys: _U64) -> _U64:
    a, b = np.uint64(sides[0]), np.uint64(sides[1])
    left = value // b
    right = value - left * b
    for number in reversed(range(ROUNDS)):
        if number % 2 == 0:
            left -= _round(right, keys[number], a)
            left = np.minimum(left, left + a)
        else:
            right -= _round(left, keys[number], b)
            right = np.minimum(right, right + b)
    return left * b + right


def _walk(values: _I64, rows: int, keys: _U64, network: _Network) -> _I64:
    """Apply the network, again for values that left [0, rows): the orbit always returns."""
    sides = _sides(rows)
    out = network(np.ascontiguousarray(values).view(np.uint64), sides, keys)
    outside = np.flatnonzero(out >= rows)
    while outside.size:
        again = keys if keys.shape[1] == 1 else keys[:, outside]
        out[outside] = network(out[outside], sides, again)
        outside = outside[out[outside] >= rows]
    return out.view(np.int64)
