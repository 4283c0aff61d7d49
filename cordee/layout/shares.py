"""How many microbatches each island computes when devices differ, and when that should change.

Seconds for a microbatch in, whole numbers out. All ranks feed the same numbers (the step's tally)
and so come to the same shares without a word: no clock and no chance here. Not here: measuring
(`parallel/engine.py`), or giving a live run its new share (`balance.py`). Traded away: the time
that an island needs whatever its share; a share is taken to cost its microbatches alone.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from statistics import median

from cordee.errors import LayoutError
from cordee.layout.split import split_evenly

WINDOW = 5
"""Steps whose seconds count."""

HOLD = 3
"""Steps between two changes, and before the first."""

GAIN = 0.05
"""Part of a step's time that a change must save."""

PATIENCE = 50
"""Steps after which an island without work is tried again; twice as many after every trial."""

LEAST_S = 1e-9
"""Seconds for a microbatch that a share is reckoned with at least."""


def shares(
    seconds: Sequence[float],
    total: int,
    unit: int = 1,
    least: int = 0,
    most: Sequence[int] | None = None,
) -> list[int]:
    """Microbatches of each island, `total` in all, such that the slowest island is done earliest.

    `seconds[i]` is island i's time for one microbatch; every share is a multiple of `unit` (the
    workers of an island compute equally many), at least `least` and at most `most[i]` (what its
    memory holds). Each next unit goes to the island that would be done with it first, the lower
    number of two; that is optimal, since nothing else could take the unit earlier. Raises
    LayoutError where no such shares are.
    """
    islands = len(seconds)
    rooms = [total if most is None else most[i] - most[i] % unit for i in range(islands)]
    low = -(-least // unit) * unit
    if total % unit or low * islands > total or sum(rooms) < total or min(rooms) < low:
        raise LayoutError(
            "these microbatches do not go round",
            values={"microbatches": total, "unit": unit, "least": low, "most": rooms},
            fix=f"batch.microbatches={max(low * islands, -(-total // unit) * unit)}"
            if sum(rooms) >= total and min(rooms) >= low
            else "room for more microbatches",
        )
    cost = [max(s, LEAST_S) for s in seconds]
    # What everybody can finish in the time of undivided shares is theirs in any case.
    ideal = (1 - 1e-9) * total / math.fsum(1 / s for s in cost)
    found = [
        max(low, min(room, int(ideal / (s * unit)) * unit))
        for s, room in zip(cost, rooms, strict=True)
    ]
    if sum(found) > total:
        found = [low] * islands
    free = [i for i in range(islands) if found[i] < rooms[i]]
    heap = [((found[i] + unit) * cost[i], i) for i in free]
    heapq.heapify(heap)
    for _ in range((total - sum(found)) // unit):
        _, i = heapq.heappop(heap)
        found[i] += unit
        if found[i] < rooms[i]:
            heapq.heappush(heap, ((found[i] + unit) * cost[i], i))
    return found


def slowest(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds until all islands have computed their shares."""
    return max(count * s for count, s in zip(counts, seconds, strict=True))


def deal(counts: Sequence[int], workers: int) -> tuple[tuple[int, int], ...]:
    """[start, stop) of each worker's microbatches: islands' shares one after another, each cut
    evenly over the `workers` of an island (the form of `Plan.splits`)."""
    found, start = [], 0
    for count in counts:
        for part in split_evenly(count, workers):
            found.append((start + part.start, start + part.stop))
        start += count
    return tuple(found)


def explain(counts: Sequence[int], seconds: Sequence[float]) -> str:
    """One sentence: who is how much slower, and what all compute."""
    fast, slow = min(seconds), max(seconds)
    worst = list(seconds).index(slow)
    if len(counts) <= 8:
        given = " + ".join(map(str, counts))
    else:
        given = f"{counts[worst]} there, {min(counts)} to {max(counts)} elsewhere,"
    times = slow / max(fast, LEAST_S)
    return f"island {worst} takes {times:.1f} times as long for a microbatch;" + (
        f" {given} of {sum(counts)} microbatches"
    )


class Balance:
    """Watches the islands of one run and says when their shares should change.

    An island's estimate is the median of its last WINDOW steps. A change is proposed when the
    medians say that it saves more than GAIN, and every one of the last WINDOW steps (or as many as
    there were) says so too: noise and single steps (a save, compilation) do not move it. An island
    with no work keeps its estimate and is given one unit again after PATIENCE steps.
    """

    def __init__(
        self,
        counts: Sequence[int],
        unit: int = 1,
        least: int = 0,
        most: Sequence[int] | None = None,
    ) -> None:
        """`counts` are the islands' shares as they are; the rest is as for `shares`."""
        self.counts = list(counts)
        self.seconds = [0.0] * len(self.counts)
        """Each island's estimate for one microbatch."""
        self._given = (unit, least, most)
        self._seen = [deque[float](maxlen=WINDOW) for _ in self.counts]
        self._steps = deque[list[float]](maxlen=WINDOW)
        self._since = 0
        self._idle = [0] * len(self.counts)
        self._patience = [PATIENCE] * len(self.counts)

    def feed(self, seconds: Sequence[float]) -> None:
        """A step: seconds that each island computed for its whole share (its slowest rank)."""
        now = []
        for i, (taken, count) in enumerate(zip(seconds, self.counts, strict=True)):
            if count:
                self._seen[i].append(max(taken / count, LEAST_S))
                self.seconds[i] = median(self._seen[i])
            self._idle[i] = 0 if count else self._idle[i] + 1
            now.append(self._seen[i][-1] if count else self.seconds[i])
        self._steps.append(now)
        self._since += 1

    def decide(self) -> list[int] | None:
        """New shares, which hold from the next step on, or None: as they are."""
        if self._since < HOLD:
            return None
        unit, least, most = self._given
        wanted = shares(self.seconds, sum(self.counts), unit, least, most)
        if not self._pays(wanted):
            return self._try_again(unit)
        for i, count in enumerate(wanted):
            self._patience[i] = PATIENCE if count > unit else self._patience[i]
        return self._change(wanted)

    def _pays(self, wanted: Sequence[int]) -> bool:
        return wanted != self.counts and all(
            slowest(wanted, step) < (1 - GAIN) * slowest(self.counts, step)
            for step in (self.seconds, *self._steps)
        )

    def _try_again(self, unit: int) -> list[int] | None:
        """One unit for an island that had no work for long: it may have recovered."""
        for i, idle in enumerate(self._idle):
            if idle < self._patience[i]:
                continue
            self._patience[i] *= 2
            self._seen[i].clear()
            self._steps.clear()
            given = list(self.counts)
            given[given.index(max(given))] -= unit
            given[i] += unit
            return self._change(given)
        return None

    def _change(self, counts: list[int]) -> list[int]:
        self.counts = counts
        self._since = 0
        return list(counts)
