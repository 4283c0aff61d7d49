"""The global order of samples: a keyed permutation per epoch, computed for any position in O(1).

A row follows from (seed, position) alone, so who computes which microbatch cannot change what is
trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cordee.data.mixture import MixtureOrder
from cordee.data.permutation import invert, permute
from cordee.errors import DataError

MAX_ROWS = 1 << 40

_I64 = NDArray[np.int64]
# Work is done in pieces that stay in the second-level cache.
_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class SampleOrder:
    """Which rows step `s`, microbatch `m` takes: the whole state is the step number.

    Step s (from 0) takes the positions [s*B, (s+1)*B), B = microbatches * microbatch_rows, and
    microbatch m its contiguous slice of them. Position p is place p % rows of epoch p // rows, and
    every epoch is its own permutation of [0, rows). With a `mixture`, of `read_rows` rows in all,
    it is the row that the mixture has there. Raises DataError for counts out of range.
    """

    seed: int
    rows: int
    microbatch_rows: int
    microbatches: int
    mixture: MixtureOrder | None = None

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
        if self.mixture is not None and sum(self.mixture.rows) != self.rows:
            raise DataError(
                "a mixture has other rows than its order",
                values={"rows": self.rows, "mixture": self.mixture.rows},
                fix=f"rows={sum(self.mixture.rows)}",
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

    def microbatch_row_ids(self, step: int, microbatch: int) -> _I64:
        """The row ids of one microbatch, int64 (microbatch_rows,)."""
        position_range = self.positions(step, microbatch)
        return self.row_ids_between(position_range.start, position_range.stop)

    def row_ids_between(self, start: int, stop: int) -> _I64:
        """The row ids of the positions [start, stop), int64 (stop - start,); epochs may change."""
        return self.row_ids_at(np.arange(start, stop, dtype=np.int64))

    def row_ids_at(self, positions: _I64) -> _I64:
        """The row ids of any non-negative positions, int64, in the shape given."""
        flat_positions = positions.reshape(-1)
        out = np.empty(flat_positions.size, dtype=np.int64)
        for begin in range(0, flat_positions.size, _BLOCK_ROWS):
            block = slice(begin, begin + _BLOCK_ROWS)
            if self.mixture is not None:
                out[block] = self.mixture.row_ids_at(flat_positions[block])
                continue
            epoch, offset = np.divmod(flat_positions[block], self.rows)
            if epoch[0] == epoch[-1] and (epoch == epoch[0]).all():
                epoch = epoch[:1]
            out[block] = permute(offset, self.rows, self.seed, epoch)
        return out.reshape(positions.shape)

    def find_uses(self, row: int, stop: int) -> Iterator[tuple[int, int]]:
        """(position, epoch) of every use of a row at positions below `stop`, by epoch."""
        if self.mixture is not None:
            yield from self.mixture.find_uses(row, stop)
            return
        for epoch in range(-(-stop // self.rows)):
            offset = int(invert(np.array([row], np.int64), self.rows, self.seed, epoch)[0])
            if epoch * self.rows + offset < stop:
                yield epoch * self.rows + offset, epoch


@dataclass(frozen=True)
class MixingStats:
    """How well an order mixes: `distinct` of 256 equal parts of the data met by 32 consecutive
    rows (on average), what pure `chance` gives, and the correlation of neighbours `lag_one`."""

    distinct: float
    chance: float
    lag_one: float


def measure_mixing(order: SampleOrder, batches: int = 512) -> MixingStats:
    """The mixing figures of the order's first `batches` * 32 positions (at most one epoch)."""
    width = min(32, order.rows)
    batches = max(1, min(batches, order.rows // width))
    rows = order.row_ids_between(0, batches * width)
    parts = min(256, order.rows)
    part = np.sort((rows * parts // order.rows).reshape(batches, width), axis=1)
    distinct_counts = 1 + (np.diff(part, axis=1) != 0).sum(axis=1)
    # Drawing without replacement from parts of rows/parts each; exact for equal parts.
    miss = 1.0
    for draws in range(width):
        rows_left = order.rows - draws
        miss *= max(0.0, rows_left - order.rows / parts) / rows_left
    # Every row once is no random draw: with few rows the correlation means nothing.
    correlation = np.corrcoef(rows[:-1], rows[1:])[0, 1] if rows.size > 2 else 0.0
    return MixingStats(float(distinct_counts.mean()), parts * (1.0 - miss), float(correlation))
