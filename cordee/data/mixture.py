"""Several sources drawn by weight: which source, and which of its rows, any position takes, in
O(log sources) and without a table.

Whole weights stand at the leaves of a balanced binary tree; of n draws at a node with weights l and
r below it, floor(n * l / (l + r)) go left, so after every draw each source has its share to within
one row a level, and the counts always add up. A keyed permutation inside blocks of 4,096 positions
hides the regular pattern. Draw d of a source is row permute(d % rows) of its epoch d // rows: of
each source every row once an epoch, whatever the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from cordee.data.permutation import invert, permute, stream_seed
from cordee.errors import DataError

BLOCK_POSITIONS = 4096
MAX_WEIGHT_SUM = 1 << 20
"""The largest sum of weights, in lowest terms: a smaller share than a millionth is never drawn."""

_I64 = NDArray[np.int64]


def integer_weights(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in these proportions. DataError: not positive, or too fine."""
    values = {"weights": ", ".join(map(str, weights))}
    if any(weight <= 0 for weight in weights):
        fix = "leave out what is not to be drawn"
        raise DataError("a source's weight is more than 0", values=values, fix=fix)
    total = sum(weights)
    shares = [Fraction(weight) / total for weight in weights]
    # In lowest terms, whole weights are multiples of 1 / the common denominator.
    denominator = math.lcm(*(share.denominator for share in shares))
    if denominator > MAX_WEIGHT_SUM:
        raise DataError(
            "the weights are too fine: in lowest terms their sum is at most 2^20",
            values=values,
            fix="weights of fewer digits, such as 7,3",
        )
    return tuple(int(share * denominator) for share in shares)


@dataclass(frozen=True)
class MixtureOrder:
    """`rows[s]` rows of source s, drawn with weight `weights[s]` (whole, see `integer_weights`).

    A row's id is its number when sources stand one after another. The smallest mixture has one
    source. DataError: a source without a row.
    """

    seed: int
    rows: tuple[int, ...]
    weights: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.rows or len(self.rows) != len(self.weights) or min(self.rows) < 1:
            raise DataError(
                "every source of a mixture has a row and a weight",
                values={"rows": self.rows, "weights": self.weights},
                fix="more text in each, or a shorter data.sequence",
            )

    @property
    def starts(self) -> tuple[int, ...]:
        """The id of each source's first row, and one more: the number of rows in all."""
        return tuple(accumulate(self.rows, initial=0))

    def row_ids_at(self, positions: _I64) -> _I64:
        """The row id of each position, int64 (n,)."""
        block, offset = np.divmod(positions, BLOCK_POSITIONS)
        draws = block * BLOCK_POSITIONS + permute(
            offset, BLOCK_POSITIONS, stream_seed(self.seed, 0), block
        )
        return self._ids_of_draws(draws, shuffled=True)

    def unshuffled_row_ids(self, start: int, stop: int) -> _I64:
        """Row ids of draws [start, stop) without any shuffling: sources by weight, rows in their
        own order. Below `max_draws_without_repeat` no row comes twice."""
        return self._ids_of_draws(np.arange(start, stop, dtype=np.int64), shuffled=False)

    @property
    def max_draws_without_repeat(self) -> int:
        """The most draws after which no source has been drawn more often than it has rows."""
        low, high = 0, sum(self.rows)
        while low < high:
            midpoint = (low + high + 1) // 2
            counts = self.draw_counts(midpoint)
            fits = all(count <= rows for count, rows in zip(counts, self.rows, strict=True))
            low, high = (midpoint, high) if fits else (low, midpoint - 1)
        return low

    def draw_counts(self, draws: int) -> tuple[int, ...]:
        """How often each source is drawn in the first `draws` draws of the tree."""
        source_counts = [0] * len(self.rows)

        def distribute(first: int, last: int, n: int) -> None:
            if last - first == 1:
                source_counts[first] = n
                return
            midpoint, left_weight, total_weight = self._split_range(first, last)
            distribute(first, midpoint, n * left_weight // total_weight)
            distribute(midpoint, last, n - n * left_weight // total_weight)

        distribute(0, len(self.rows), draws)
        return tuple(source_counts)

    def counts_below(self, positions: int) -> tuple[int, ...]:
        """How often each source was drawn at the positions below `positions`."""
        block_start = positions // BLOCK_POSITIONS * BLOCK_POSITIONS
        row_ids = self.row_ids_at(np.arange(block_start, positions, dtype=np.int64))
        sources = np.searchsorted(self.starts, row_ids, side="right") - 1
        tail_counts = np.bincount(sources, minlength=len(self.rows)).tolist()
        block_counts = self.draw_counts(block_start)
        return tuple(n + m for n, m in zip(block_counts, tail_counts, strict=True))

    def source_index(self, row: int) -> int:
        """The number of the source that an id belongs to."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def find_uses(self, row: int, stop: int) -> Iterator[tuple[int, int]]:
        """(position, epoch) of every use of an id at positions below `stop`, by epoch."""
        source = self.source_index(row)
        rows, seed = self.rows[source], stream_seed(self.seed, source + 1)
        block_end = -(-stop // BLOCK_POSITIONS) * BLOCK_POSITIONS
        local_rows = np.array([row - self.starts[source]], np.int64)
        for epoch in range(-(-self.draw_counts(block_end)[source] // rows)):
            draw = epoch * rows + int(invert(local_rows, rows, seed, epoch)[0])
            block, offset = divmod(self._root_draw(source, draw), BLOCK_POSITIONS)
            position_offset = invert(
                np.array([offset], np.int64), BLOCK_POSITIONS, stream_seed(self.seed, 0), block
            )
            if (position := block * BLOCK_POSITIONS + int(position_offset[0])) < stop:
                yield position, epoch

    def _split_range(self, first: int, last: int) -> tuple[int, int, int]:
        """Of the sources [first, last): where they part, the weight left of it, and all of it."""
        midpoint = (first + last) // 2
        return midpoint, sum(self.weights[first:midpoint]), sum(self.weights[first:last])

    def _ids_of_draws(self, draws: _I64, shuffled: bool) -> _I64:
        """Ids of draws at the tree's root."""
        out = np.empty(draws.size, np.int64)
        starts = self.starts

        def descend(first: int, last: int, indices: _I64, n: _I64) -> None:
            if not n.size:
                return
            if last - first == 1:
                rows = self.rows[first]
                epoch, offset = np.divmod(n, rows)
                if shuffled:
                    offset = permute(offset, rows, stream_seed(self.seed, first + 1), epoch)
                out[indices] = starts[first] + offset
                return
            midpoint, left_weight, total_weight = self._split_range(first, last)
            left_counts = _floor_share(n, left_weight, total_weight)
            goes_left = _floor_share(n + 1, left_weight, total_weight) > left_counts
            descend(first, midpoint, indices[goes_left], left_counts[goes_left])
            descend(midpoint, last, indices[~goes_left], (n - left_counts)[~goes_left])

        descend(0, len(self.rows), np.arange(draws.size), draws)
        return out

    def _root_draw(self, source: int, draw: int) -> int:
        """Which draw at the root is a source's draw number `draw`: up the tree again."""
        path, first, last = [], 0, len(self.rows)
        while last - first > 1:
            midpoint, left_weight, total_weight = self._split_range(first, last)
            path.append((source < midpoint, left_weight, total_weight))
            first, last = (first, midpoint) if source < midpoint else (midpoint, last)
        for is_left, left_weight, total_weight in reversed(path):
            # The first n with floor((n + 1) * left / whole) = draw + 1; of the others alike.
            draw = (
                -(-(draw + 1) * total_weight // left_weight) - 1
                if is_left
                else draw * total_weight // (total_weight - left_weight)
            )
        return draw


def _floor_share(n: _I64, left_weight: int, total_weight: int) -> _I64:
    """floor(n * left / whole), in numbers that stay below 2^63."""
    quotient, remainder = np.divmod(n, total_weight)
    share: _I64 = quotient * left_weight + remainder * left_weight // total_weight
    return share
