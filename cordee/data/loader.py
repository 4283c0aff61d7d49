"""Microbatches as tensors: the order says which rows, the source gathers, this file hands over.

Not here: worker processes and shuffle buffers. For tokens one indexed copy is faster than any
hand-over between processes, and with nothing buffered the step number is the whole state. Traded
away: transforms on the fly; a token is what the dataset folder holds.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cordee.data.order import Order
from cordee.data.source import TokenSource
from cordee.devices import DEVICES
from cordee.errors import DataError

# Row ids computed ahead in one go: they cost 40 ns each so, and 4 us each for a batch of 32 alone.
AHEAD_ROWS = 16_384


@dataclass(frozen=True)
class _Gathered:
    """Rows of a step: their ids, and their tokens as they are kept until delivery."""

    ids: NDArray[np.int64]
    tokens: NDArray[Any] | torch.Tensor


@dataclass
class _Request:
    """A step to gather, and the answer; `gathered` stays None if gathering failed."""

    step: int
    indices: range
    gathered: _Gathered | None = None
    done: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)


class Loader:
    """The microbatches of any step, int64 (microbatch_rows, sequence + 1), on `device`.

    `begin(step, indices)` gathers all that this rank needs of a step at once; `microbatch` then
    returns slices, and gathers by itself what was not begun. `prefetch=1` lets one background
    thread gather the step after the begun one: for files that are not in memory yet, and for
    pinned copies to a GPU. There is no state to save: what comes follows from the step.
    DataError when the source has no row of that length or the order is of another length.
    """

    def __init__(
        self,
        source: TokenSource,
        order: Order,
        sequence: int,
        device: str | torch.device = "cpu",
        prefetch: int = 0,
    ) -> None:
        if order.rows != source.rows(sequence):
            raise DataError(
                "the order and the source differ in their number of rows",
                values={"order": order.rows, "source": source.rows(sequence), "sequence": sequence},
                fix=f"Order(rows={source.rows(sequence)})",
            )
        if prefetch not in (0, 1):
            raise DataError(
                "prefetch is 0 or 1 steps ahead", values={"prefetch": prefetch}, fix="prefetch=1"
            )
        self._source = source
        self._order = order
        self._sequence = sequence
        self._device = torch.device(device)
        self._rows = order.microbatch_rows
        # The step at hand: tokens (rows, sequence + 1) in the native dtype, of these microbatches.
        self._step = -1
        self._indices = range(0)
        self._now = _Gathered(np.empty(0, np.int64), np.empty((0, sequence + 1), source.dtype))
        # Row ids of some steps, (steps, rows of the range), first step, microbatches.
        self._ahead: tuple[NDArray[np.int64], int, range] = (
            np.empty((0, 0), np.int64),
            0,
            range(0),
        )
        self._next: _Request | None = None
        self._requests: queue.SimpleQueue[_Request | None] | None = None
        if prefetch:
            self._requests = queue.SimpleQueue()
            # A daemon: storage that hangs must not keep a process alive that wants to end.
            threading.Thread(target=self._serve, name="cordee-loader", daemon=True).start()

    def begin(self, step: int, indices: range) -> None:
        """Gather the microbatches `indices` (contiguous) of a step: one order, one gather."""
        self._now = self._take(step, indices) if self._next else self._gather(step, indices)
        self._step, self._indices = step, indices
        if self._requests is not None:
            self._next = _Request(step + 1, indices)
            self._requests.put(self._next)

    def microbatch(self, step: int, index: int) -> torch.Tensor:
        """Microbatch `index` of a step, int64 (microbatch_rows, sequence + 1), on the device."""
        if step != self._step or index not in self._indices:
            rows = self._order.rows_of(step, index)
            return self._deliver(self._host(self._source.gather(rows, self._sequence)))
        if len(self._indices) == 1:
            return self._deliver(self._now.tokens)
        return self._deliver(self._now.tokens[self._place(index)])

    def ids(self, step: int, index: int) -> NDArray[np.int64]:
        """Ids of the rows of which `microbatch` hands over the tokens, int64 (microbatch_rows,)."""
        if step != self._step or index not in self._indices:
            return self._order.rows_of(step, index)
        return self._now.ids[self._place(index)]

    def close(self) -> None:
        """End the background thread, if there is one. The loader goes on without it."""
        if self._requests is not None:
            self._requests.put(None)
            self._requests = None
            self._next = None

    def _place(self, index: int) -> slice:
        first = (index - self._indices.start) * self._rows
        return slice(first, first + self._rows)

    def _deliver(self, tokens: NDArray[Any] | torch.Tensor) -> torch.Tensor:
        if isinstance(tokens, np.ndarray):
            return torch.from_numpy(tokens.astype(np.int64))
        # Tokens cross to the device in their own width, and widen there: an eighth of the bytes.
        return tokens.to(self._device, non_blocking=True).to(torch.int64)

    def _host(self, tokens: NDArray[Any]) -> NDArray[Any] | torch.Tensor:
        """What is kept until delivery: the array for the CPU, pinned memory for a GPU."""
        if self._device.type == "cpu":
            return tokens
        pinned = torch.from_numpy(tokens)
        return pinned.pin_memory() if DEVICES[self._device.type].pinned else pinned

    def _gather(self, step: int, indices: range) -> _Gathered:
        if not indices:
            none = np.empty(0, np.int64)
            return _Gathered(none, self._host(self._source.gather(none, self._sequence)))
        rows, first, known = self._ahead
        if known != indices or not 0 <= step - first < len(rows):
            self._ahead = rows, first, _ = self._rows_ahead(step, indices)
        ids = rows[step - first]
        return _Gathered(ids, self._host(self._source.gather(ids, self._sequence)))

    def _rows_ahead(self, step: int, indices: range) -> tuple[NDArray[np.int64], int, range]:
        """Row ids of `indices` in this and the next steps, at most AHEAD_ROWS or one step."""
        order = self._order
        start = order.positions(step, indices[0]).start
        width = len(indices) * self._rows
        if order.positions(step, indices[-1]).stop != start + width:
            raise DataError(
                "the microbatches of a rank are not contiguous",
                values={"indices": indices},
                fix=f"range({indices[0]}, {indices[-1] + 1})",
            )
        steps = np.arange(max(1, AHEAD_ROWS // width), dtype=np.int64)
        positions = (start + steps * order.step_rows)[:, None] + np.arange(width)
        return order.rows_at(positions), step, indices

    def _take(self, step: int, indices: range) -> _Gathered:
        """What the thread gathered, if it is what is wanted; else gathered now."""
        request, self._next = self._next, None
        if request is None:
            return self._gather(step, indices)
        # Wait even for an answer that is not wanted: the two threads never gather at once.
        request.done.get()
        if request.gathered is None:
            # It failed and its thread is gone. The call below fails likewise, where it is seen.
            self.close()
        elif (request.step, request.indices) == (step, indices):
            return request.gathered
        return self._gather(step, indices)

    def _serve(self) -> None:
        requests = self._requests
        while requests is not None and (request := requests.get()) is not None:
            try:
                request.gathered = self._gather(request.step, request.indices)
            finally:
                request.done.put(None)


def held_out(
    source: TokenSource, sequence: int, rows: int, count: int | None = None
) -> Iterator[torch.Tensor]:
    """Batches of the held-out split in file order, int64 (rows, sequence + 1): the same for every
    layout and run. At most `count` batches (None: all of them); the last may have fewer rows. Of a
    mixture, sources take turns by weight for as long as none comes round again."""
    mixture = source.mixture(0, sequence)
    total = mixture.once if mixture else source.rows(sequence)
    stop = total if count is None else min(total, rows * count)
    for first in range(0, stop, rows):
        last = min(first + rows, stop)
        plain = np.arange(first, last, dtype=np.int64)
        ids = mixture.ids_in_turn(first, last) if mixture else plain
        yield torch.from_numpy(source.gather(ids, sequence).astype(np.int64))
