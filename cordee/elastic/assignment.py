"""Who computes what in a generation, from what every host says it has.

Survivors keep their order and come first, so that the first rank knows the run; spares and
newcomers fill up. Islands are whole or not at all, each of workers on one kind of device. What is
left over waits; where nothing else is left for long, it is to save what it holds ("rescue").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def is_training(assignment: Mapping[str, Any]) -> bool:
    """Whether these orders make ranks train; else none is to work, or what is left is saved."""
    return bool(assignment) and not assignment["rescue"]


@dataclass(frozen=True)
class AvailableWorker:
    """A worker that may get a rank. `rank` and `generation` are its last ones, None and 0 where it
    never had any."""

    host: str
    number: int
    pid: int
    rank: int | None
    generation: int

    def to_list(self) -> list[Any]:
        return [self.number, self.pid, self.rank, self.generation]


def assign_ranks(
    reports: Mapping[str, Mapping[str, Any]],
    island_size: int,
    replan: Callable[[int, Sequence[str]], tuple[str, int]],
) -> dict[str, Any]:
    """The orders of a view: {"ranks": [[host, number, pid], ...], "plan": JSON, "names": hosts'
    names}; {} when not one island is whole, or a run that has not begun waits for its first ranks.

    A report says: `name`, `wants` (workers with a rank), `device` (kind of its workers'), `ready`
    (list of `AvailableWorker.to_list()`), `begun` (whether this host knows of a generation that
    ran), `stranded` (whether it has waited long for an island to be whole). `island_size`: ranks of
    an island; `replan(islands, devices)`: the plan (JSON) of so many islands on these kinds of
    device, or of fewer, and how many those are.
    """
    target_ranks = sum(int(report["wants"]) for report in reports.values())
    has_begun = any(report["begun"] for report in reports.values())
    available = [
        AvailableWorker(host, *entry)
        for host, report in reports.items()
        for entry in report["ready"]
    ]
    if not has_begun and len(available) < target_ranks:
        return {}
    islands = _complete_islands(
        _order_workers(available, reports, island_size), reports, island_size
    )
    is_rescue = not islands and any(report["stranded"] for report in reports.values())
    if not (is_rescue or islands):
        return {}
    devices = [str(reports[island[0].host]["device"]) for island in islands]
    plan, island_count = replan(max(1, len(islands)), devices)
    ranked_workers = [worker for island in islands[:island_count] for worker in island]
    ranked_workers = ranked_workers or _survivors(available)
    if not ranked_workers:
        return {}
    return {
        "ranks": [[worker.host, worker.number, worker.pid] for worker in ranked_workers],
        "plan": plan,
        "names": {host: str(report["name"]) for host, report in reports.items()},
        "rescue": is_rescue,
    }


def _complete_islands(
    workers: Sequence[AvailableWorker], reports: Mapping[str, Mapping[str, Any]], island_size: int
) -> list[list[AvailableWorker]]:
    """Islands of `island_size` workers each, of one kind of device, by their first worker's
    place."""
    islands: list[list[AvailableWorker]] = []
    open_islands: dict[str, list[AvailableWorker]] = {}
    for worker in workers:
        device = str(reports[worker.host]["device"])
        if len(open_islands.get(device, ())) in (0, island_size):
            open_islands[device] = []
            islands.append(open_islands[device])
        open_islands[device].append(worker)
    return [island for island in islands if len(island) == island_size]


def _survivors(workers: Sequence[AvailableWorker]) -> list[AvailableWorker]:
    """Who was in the newest generation that anybody was in, by rank."""
    newest_generation = max((worker.generation for worker in workers), default=0)
    survivors = [w for w in workers if w.rank is not None and w.generation == newest_generation]
    return sorted(survivors, key=lambda w: w.rank or 0)


def _order_workers(
    workers: Sequence[AvailableWorker], reports: Mapping[str, Mapping[str, Any]], island_size: int
) -> list[AvailableWorker]:
    """Survivors of islands that are whole, by their last rank: together they hold all of the run.
    Then the other survivors, then the rest by host; of each host no more than it wants."""
    survivors = {w.rank or 0: w for w in _survivors(workers)}
    island_sizes = Counter(rank // island_size for rank in survivors)
    ordered_ranks = sorted(
        survivors, key=lambda rank: (island_sizes[rank // island_size] < island_size, rank)
    )
    ordered_survivors = [survivors[rank] for rank in ordered_ranks]
    ordered_workers, counts_by_host = [], dict.fromkeys(reports, 0)
    for worker in [*ordered_survivors, *(w for w in workers if w not in ordered_survivors)]:
        if counts_by_host[worker.host] < int(reports[worker.host]["wants"]):
            counts_by_host[worker.host] += 1
            ordered_workers.append(worker)
    return ordered_workers
