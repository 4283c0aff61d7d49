"""Who computes what in a generation, from what every host says it has.

PAPER in spirit: values in, values out; the same on whichever host leads. Survivors keep their order
and come first, so that the first rank is one that knows the run; spares and newcomers fill up.
Islands are whole or not at all: what is left over waits. Not here: the split of the batch, which
follows from the plan, and agreement about it (`members.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ready:
    """A worker that may be given a seat. `rank` and `generation`: its last seat; None and 0 for one
    that never had any."""

    host: str
    number: int
    pid: int
    rank: int | None
    generation: int

    def to_list(self) -> list[Any]:
        """As it travels in a report."""
        return [self.number, self.pid, self.rank, self.generation]


def assign(
    reports: Mapping[str, Mapping[str, Any]],
    inside: int,
    plan_for: Callable[[int], tuple[str, int]],
) -> dict[str, Any]:
    """The orders of a view: {"ranks": [[host, number, pid], ...], "plan": JSON, "names": hosts'
    names}; {} when not one island is whole, or a run that has not begun waits for its first ranks.

    A report says: `name`, `wants` (workers with a seat), `ready` (list of `Ready.to_list()`),
    `begun` (whether this host knows of a generation that ran). `inside`: ranks of an island;
    `plan_for(islands)`: the plan (JSON) of so many islands or of fewer, and how many those are.
    """
    wanted = sum(int(report["wants"]) for report in reports.values())
    begun = any(report["begun"] for report in reports.values())
    ready = [Ready(host, *entry) for host, report in reports.items() for entry in report["ready"]]
    if not begun and len(ready) < wanted:
        return {}
    islands = min(wanted, len(ready)) // inside
    if not islands:
        return {}
    plan, islands = plan_for(islands)
    chosen = _in_order(ready, reports, inside)[: islands * inside]
    if len(chosen) < islands * inside:
        return {}
    return {
        "ranks": [[worker.host, worker.number, worker.pid] for worker in chosen],
        "plan": plan,
        "names": {host: str(report["name"]) for host, report in reports.items()},
    }


def _in_order(
    ready: Sequence[Ready], reports: Mapping[str, Mapping[str, Any]], inside: int
) -> list[Ready]:
    """Survivors of islands that are whole, by their last rank: together they hold all of the run.
    Then the other survivors, then the rest by host; of each host no more than it wants."""
    newest = max(worker.generation for worker in ready)
    survivors = {w.rank: w for w in ready if w.rank is not None and w.generation == newest}
    sizes = Counter(rank // inside for rank in survivors)
    by_rank = sorted(survivors, key=lambda rank: (sizes[rank // inside] < inside, rank))
    chosen = [survivors[rank] for rank in by_rank]
    found, counts = [], dict.fromkeys(reports, 0)
    for worker in [*chosen, *(w for w in ready if w not in chosen)]:
        if counts[worker.host] < int(reports[worker.host]["wants"]):
            counts[worker.host] += 1
            found.append(worker)
    return found
