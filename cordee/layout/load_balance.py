"""How many microbatches each island computes when devices differ, and when that should change.

All ranks compute it from the same seconds (of the step's summary) and so come to the same shares
without a message. A share is taken to cost its microbatches alone.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

from cordee.errors import LayoutError
from cordee.layout.microbatches import split_evenly

WINDOW = 5
"""Steps whose seconds count."""

CHANGE_INTERVAL_STEPS = 3
"""Steps between two changes, and before the first."""

MIN_GAIN = 0.05
"""Part of a step's time that a change must save."""

RETRY_STEPS = 50
"""Steps after which an island without work is tried again; twice as many after every trial."""

MIN_SECONDS = 1e-9
"""Seconds of a microbatch below which none is taken to be."""


def balance_microbatches(
    seconds: Sequence[float],
    total: int,
    unit: int = 1,
    min_share: int = 0,
    max_shares: Sequence[int] | None = None,
) -> list[int]:
    """Microbatches of each island, `total` in all, such that the slowest island is done earliest.

    `seconds[i]` is island i's time for one microbatch; every share is a multiple of `unit` (the
    workers of an island compute equally many), at least `min_share` and at most `max_shares[i]`
    (its memory). Each next unit goes to the island that would be done with it first, the lower
    number of two; that is optimal, since no other could finish the unit earlier. LayoutError where
    there are no such shares.
    """
    islands = len(seconds)
    capacities = [total] * islands
    if max_shares is not None:
        capacities = [limit - limit % unit for limit in max_shares]
    min_count = -(-min_share // unit) * unit
    has_room = sum(capacities) >= total and min(capacities) >= min_count
    if total % unit or min_count * islands > total or not has_room:
        nearest_total = max(min_count * islands, -(-total // unit) * unit)
        raise LayoutError(
            "these microbatches do not go round",
            values={"microbatches": total, "unit": unit, "least": min_count, "most": capacities},
            fix=f"batch.microbatches={nearest_total}" if has_room else "room for more microbatches",
        )
    costs = [max(s, MIN_SECONDS) for s in seconds]
    # Each island takes at once what it can finish in the time of shares that need not be whole.
    ideal_time = (1 - 1e-9) * total / math.fsum(1 / s for s in costs)
    counts = [
        max(min_count, min(capacity, int(ideal_time / (s * unit)) * unit))
        for s, capacity in zip(costs, capacities, strict=True)
    ]
    if sum(counts) > total:
        counts = [min_count] * islands
    open_islands = [island for island in range(islands) if counts[island] < capacities[island]]
    heap = [((counts[island] + unit) * costs[island], island) for island in open_islands]
    heapq.heapify(heap)
    for _ in range((total - sum(counts)) // unit):
        _, island = heapq.heappop(heap)
        counts[island] += unit
        if counts[island] < capacities[island]:
            heapq.heappush(heap, ((counts[island] + unit) * costs[island], island))
    return counts


def slowest_island_s(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds until all islands have computed their shares."""
    return max(count * s for count, s in zip(counts, seconds, strict=True))


def microbatch_ranges(counts: Sequence[int], ranks: int) -> tuple[tuple[int, int], ...]:
    """[start, stop) of each worker's microbatches: islands' shares one after another, each cut
    evenly over the `ranks` of an island (the form of `Plan.splits`)."""
    ranges, start = [], 0
    for count in counts:
        for microbatches in split_evenly(count, ranks):
            ranges.append((start + microbatches.start, start + microbatches.stop))
        start += count
    return tuple(ranges)


def describe_balance(counts: Sequence[int], seconds: Sequence[float]) -> str:
    """One sentence: who is how much slower, and what all compute."""
    min_s, max_s = min(seconds), max(seconds)
    slowest_island = list(seconds).index(max_s)
    if len(counts) <= 8:
        counts_text = " + ".join(map(str, counts))
    else:
        counts_text = f"{counts[slowest_island]} there, {min(counts)} to {max(counts)} elsewhere,"
    ratio = max_s / max(min_s, MIN_SECONDS)
    return (
        f"island {slowest_island} takes {ratio:.1f} times as long for a microbatch;"
        f" {counts_text} of {sum(counts)} microbatches"
    )


class LoadBalancer:
    """Decides when the shares of a run's islands change.

    An island's estimate is the median of its last WINDOW steps. A change is proposed when it saves
    more than MIN_GAIN by the medians and by each of the last WINDOW steps (or as many as there
    were): noise and single steps (a save, compilation) do not cause one. An island with no work
    keeps its estimate and gets one unit again after RETRY_STEPS steps.
    """

    def __init__(
        self,
        counts: Sequence[int],
        unit: int = 1,
        min_share: int = 0,
        max_shares: Sequence[int] | None = None,
    ) -> None:
        """`counts` are the present shares; the rest is as for `balance_microbatches`."""
        self.counts = list(counts)
        self.microbatch_seconds = [0.0] * len(self.counts)
        """Each island's estimate for one microbatch."""
        self._limits = (unit, min_share, max_shares)
        self._recent_s = [deque[float](maxlen=WINDOW) for _ in self.counts]
        self._step_seconds = deque[list[float]](maxlen=WINDOW)
        self._steps_since_change = 0
        self._idle_steps = [0] * len(self.counts)
        self._retry_steps = [RETRY_STEPS] * len(self.counts)

    def add_step(self, seconds: Sequence[float]) -> None:
        """A step: seconds that each island computed for its whole share (its slowest rank)."""
        step_seconds = []
        for island, (elapsed_s, count) in enumerate(zip(seconds, self.counts, strict=True)):
            if count:
                self._recent_s[island].append(max(elapsed_s / count, MIN_SECONDS))
                self.microbatch_seconds[island] = median(self._recent_s[island])
            self._idle_steps[island] = 0 if count else self._idle_steps[island] + 1
            step_seconds.append(
                self._recent_s[island][-1] if count else self.microbatch_seconds[island]
            )
        self._step_seconds.append(step_seconds)
        self._steps_since_change += 1

    def rebalance(self) -> dict[str, Any] | None:
        """As `next_counts`, with what a record says of the change: shares before and after, seconds
        of each island for a microbatch, and why in one sentence."""
        before, after = list(self.counts), self.next_counts()
        if after is None:
            return None
        seconds = [round(s, 6) for s in self.microbatch_seconds]
        reason = describe_balance(after, self.microbatch_seconds)
        return {"before": before, "after": after, "seconds_per_microbatch": seconds, "why": reason}

    def next_counts(self) -> list[int] | None:
        """New shares, which hold from the next step on, or None: as they are."""
        if self._steps_since_change < CHANGE_INTERVAL_STEPS:
            return None
        unit, min_share, max_shares = self._limits
        new_counts = balance_microbatches(
            self.microbatch_seconds, sum(self.counts), unit, min_share, max_shares
        )
        if not self._is_worthwhile(new_counts):
            return self._retry_idle(unit)
        for island, count in enumerate(new_counts):
            self._retry_steps[island] = RETRY_STEPS if count > unit else self._retry_steps[island]
        return self._set_counts(new_counts)

    def _is_worthwhile(self, new_counts: Sequence[int]) -> bool:
        return new_counts != self.counts and all(
            slowest_island_s(new_counts, step)
            < (1 - MIN_GAIN) * slowest_island_s(self.counts, step)
            for step in (self.microbatch_seconds, *self._step_seconds)
        )

    def _retry_idle(self, unit: int) -> list[int] | None:
        """One unit for an island that had no work for long: it may have recovered."""
        for island, idle_steps in enumerate(self._idle_steps):
            if idle_steps < self._retry_steps[island]:
                continue
            self._retry_steps[island] *= 2
            self._recent_s[island].clear()
            self._step_seconds.clear()
            new_counts = list(self.counts)
            new_counts[new_counts.index(max(new_counts))] -= unit
            new_counts[island] += unit
            return self._set_counts(new_counts)
        return None

    def _set_counts(self, counts: list[int]) -> list[int]:
        self.counts = counts
        self._steps_since_change = 0
        return list(counts)
