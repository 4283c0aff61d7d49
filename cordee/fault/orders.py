"""Who computes what in a generation, from what every host says it has.

PAPER in spirit: values in, values out; the same on whichever host leads. Survivors keep their order
and come first, so that the first rank is one that knows the run; spares and newcomers fill up.
Islands are whole or not at all, and each is of workers on one kind of device. What is left over
waits; where nothing else is left, and that has lasted, it is told to save what it holds together
("rescue"). Not here: the split of the batch, which follows from the plan, and agreement about it
(`members.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def is_run(orders: Mapping[str, Any]) -> bool:
    """Whether these orders make ranks train; else none is to work, or what is left is saved."""
    return bool(orders) and not orders["rescue"]


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
    plan_for: Callable[[int, Sequence[str]], tuple[str, int]],
) -> dict[str, Any]:
    """The orders of a view: {"ranks": [[host, number, pid], ...], "plan": JSON, "names": hosts'
    names}; {} when not one island is whole, or a run that has not begun waits for its first ranks.

    A report says: `name`, `wants` (workers with a seat), `device` (kind of its workers'), `ready`
    (list of `Ready.to_list()`), `begun` (whether this host knows of a generation that ran),
    `stranded` (whether it has waited long for an island to be whole). `inside`: ranks of an island;
    `plan_for(islands, devices)`: the plan (JSON) of so many islands on these kinds of device, or of
    fewer, and how many those are.
    """
    wanted = sum(int(report["wants"]) for report in reports.values())
    begun = any(report["begun"] for report in reports.values())
    ready = [Ready(host, *entry) for host, report in reports.items() for entry in report["ready"]]
    if not begun and len(ready) < wanted:
        return {}
    islands = _whole(_in_order(ready, reports, inside), reports, inside)
    rescue = not islands and any(report["stranded"] for report in reports.values())
    if not (rescue or islands):
        return {}
    devices = [str(reports[island[0].host]["device"]) for island in islands]
    plan, count = plan_for(max(1, len(islands)), devices)
    chosen = [worker for island in islands[:count] for worker in island]
    chosen = chosen or _survivors(ready)
    if not chosen:
        return {}
    return {
        "ranks": [[worker.host, worker.number, worker.pid] for worker in chosen],
        "plan": plan,
        "names": {host: str(report["name"]) for host, report in reports.items()},
        "rescue": rescue,
    }


def _whole(
    ordered: Sequence[Ready], reports: Mapping[str, Mapping[str, Any]], inside: int
) -> list[list[Ready]]:
    """Islands of `inside` workers each, of one kind of device, by their first worker's place."""
    islands: list[list[Ready]] = []
    filling: dict[str, list[Ready]] = {}
    for worker in ordered:
        device = str(reports[worker.host]["device"])
        if len(filling.get(device, ())) in (0, inside):
            filling[device] = []
            islands.append(filling[device])
        filling[device].append(worker)
    return [island for island in islands if len(island) == inside]


def _survivors(ready: Sequence[Ready]) -> list[Ready]:
    """Who was in the newest generation that anybody was in, by rank."""
    newest = max((worker.generation for worker in ready), default=0)
    found = [w for w in ready if w.rank is not None and w.generation == newest]
    return sorted(found, key=lambda w: w.rank or 0)


def _in_order(
    ready: Sequence[Ready], reports: Mapping[str, Mapping[str, Any]], inside: int
) -> list[Ready]:
    """Survivors of islands that are whole, by their last rank: together they hold all of the run.
    Then the other survivors, then the rest by host; of each host no more than it wants."""
    survivors = {w.rank or 0: w for w in _survivors(ready)}
    sizes = Counter(rank // inside for rank in survivors)
    by_rank = sorted(survivors, key=lambda rank: (sizes[rank // inside] < inside, rank))
    chosen = [survivors[rank] for rank in by_rank]
    found, counts = [], dict.fromkeys(reports, 0)
    for worker in [*chosen, *(w for w in ready if w not in chosen)]:
        if counts[worker.host] < int(reports[worker.host]["wants"]):
            counts[worker.host] += 1
            found.append(worker)
    return found
