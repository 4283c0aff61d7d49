"""Several sources drawn by weight: which source, and which of its rows, any position takes, in
O(log sources) and without a table.

Whole weights stand at the leaves of a balanced binary tree; of n draws at a node with weights l and
r below it, floor(n * l / (l + r)) go left, so after every draw each source has its share to within
one row a level, and the counts always add up. A keyed permutation inside blocks of 4,096 positions
hides the regular pattern. Draw d of a source is row permute(d % rows) of its epoch d // rows: of
each source every row once an epoch, whatever the weights. Not here: sizes and names of sources
(`source`). Traded away: weights that change during a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from cordee.data.permutation import invert, permute, stream_seed
from cordee.errors import DataError

BLOCK = 4096
MOST_WEIGHT = 1 << 20
"""The largest sum of weights, in lowest terms: a smaller share than a millionth is never drawn."""

_I64 = NDArray[np.int64]


def whole_weights(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in these proportions. DataError: not positive, or too fine."""
    if any(weight <= 0 for weight in weights):
        raise DataError(
            "a source's weight is more than 0",
            values={"weights": ", ".join(map(str, weights))},
            fix="leave out what is not to be drawn",
        )
    total = sum(weights)
    shares = [Fraction(weight) / total for weight in weights]
    # In lowest terms, whole weights are multiples of 1 / the common denominator.
    denominator = 1
    for share in shares:
        denominator *= share.denominator // np.gcd(denominator, share.denominator).item()
        if denominator > MOST_WEIGHT:
            raise DataError(
                "the weights are too fine: in lowest terms their sum is at most 2^20",
                values={"weights": ", ".join(map(str, weights))},
                fix="weights of fewer digits, such as 7,3",
            )
    return tuple(int(share * denominator) for share in shares)


@dataclass(frozen=True)
class Mixture:
    """`rows[s]` rows of source s, drawn with weight `weights[s]` (whole, see `whole_weights`).

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

    def ids_at(self, positions: _I64) -> _I64:
        """The row id of each position, int64 (n,)."""
        block, place = np.divmod(positions, BLOCK)
        draws = block * BLOCK + permute(place, BLOCK, stream_seed(self.seed, 0), block)
        return self._deal(draws, shuffled=True)

    def ids_in_turn(self, start: int, stop: int) -> _I64:
        """Row ids of draws [start, stop) without any shuffling: sources by weight, rows in their
        own order. Below `once` no row comes twice."""
        return self._deal(np.arange(start, stop, dtype=np.int64), shuffled=False)

    @property
    def once(self) -> int:
        """The most draws after which no source has been drawn more often than it has rows."""
        least, most = 0, sum(self.rows)
        while least < most:
            middle = (least + most + 1) // 2
            fits = all(n <= rows for n, rows in zip(self.counts(middle), self.rows, strict=True))
            least, most = (middle, most) if fits else (least, middle - 1)
        return least

    def counts(self, draws: int) -> tuple[int, ...]:
        """How often each source is drawn in the first `draws` draws of the tree."""
        found = [0] * len(self.rows)

        def share(first: int, last: int, n: int) -> None:
            if last - first == 1:
                found[first] = n
                return
            middle, left, whole = self._split(first, last)
            share(first, middle, n * left // whole)
            share(middle, last, n - n * left // whole)

        share(0, len(self.rows), draws)
        return tuple(found)

    def drawn(self, positions: int) -> tuple[int, ...]:
        """How often each source was drawn at the positions below `positions`."""
        blocks = positions // BLOCK * BLOCK
        rest = self.ids_at(np.arange(blocks, positions, dtype=np.int64))
        sources = np.searchsorted(self.starts, rest, side="right") - 1
        more = np.bincount(sources, minlength=len(self.rows))
        return tuple(n + int(m) for n, m in zip(self.counts(blocks), more, strict=True))

    def source_of(self, row: int) -> int:
        """The number of the source that an id belongs to."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def uses_of(self, row: int, stop: int) -> Iterator[tuple[int, int]]:
        """(position, epoch) of every use of an id at positions below `stop`, by epoch."""
        source = self.source_of(row)
        rows, seed = self.rows[source], stream_seed(self.seed, source + 1)
        ends = -(-stop // BLOCK) * BLOCK
        local = np.array([row - self.starts[source]], np.int64)
        for epoch in range(-(-self.counts(ends)[source] // rows)):
            draw = epoch * rows + int(invert(local, rows, seed, epoch)[0])
            block, place = divmod(self._draw_of(source, draw), BLOCK)
            back = invert(np.array([place], np.int64), BLOCK, stream_seed(self.seed, 0), block)
            if (position := block * BLOCK + int(back[0])) < stop:
                yield position, epoch

    def _split(self, first: int, last: int) -> tuple[int, int, int]:
        """Of the sources [first, last): where they part, the weight left of it, and all of it."""
        middle = (first + last) // 2
        return middle, sum(self.weights[first:middle]), sum(self.weights[first:last])

    def _deal(self, draws: _I64, shuffled: bool) -> _I64:
        """Ids of draws at the tree's root."""
        out = np.empty(draws.size, np.int64)
        starts = self.starts

        def deal(first: int, last: int, where: _I64, n: _I64) -> None:
            if not n.size:
                return
            if last - first == 1:
                rows = self.rows[first]
                epoch, place = np.divmod(n, rows)
                if shuffled:
                    place = permute(place, rows, stream_seed(self.seed, first + 1), epoch)
                out[where] = starts[first] + place
                return
            middle, left, whole = self._split(first, last)
            before = _share(n, left, whole)
            goes_left = _share(n + 1, left, whole) > before
            deal(first, middle, where[goes_left], before[goes_left])
            deal(middle, last, where[~goes_left], (n - before)[~goes_left])

        deal(0, len(self.rows), np.arange(draws.size), draws)
        return out

    def _draw_of(self, source: int, draw: int) -> int:
        """Which draw at the root is a source's draw number `draw`: up the tree again."""
        path, first, last = [], 0, len(self.rows)
        while last - first > 1:
            middle, left, whole = self._split(first, last)
            path.append((source < middle, left, whole))
            first, last = (first, middle) if source < middle else (middle, last)
        for is_left, left, whole in reversed(path):
            # The first n with floor((n + 1) * left / whole) = draw + 1; of the others alike.
            draw = -(-(draw + 1) * whole // left) - 1 if is_left else draw * whole // (whole - left)
        return draw


def _share(n: _I64, left: int, whole: int) -> _I64:
    """floor(n * left / whole), in numbers that stay below 2^63."""
    times, rest = np.divmod(n, whole)
    share: _I64 = times * left + rest * left // whole
    return share
