"""From a fault to the next committed step: Cordée beside torchrun's restart, in one go.

    python -m benchmarks.recovery [--json] [--trials N] [--only NAME,NAME] [--steps N]
                                  [--rivals PYTHON]

For the table of docs/performance.md, alone on a quiet machine of two cores (about an hour):

    python -m benchmarks.recovery --trials 10 --json

The clock starts when SIGKILL (or SIGSTOP) is sent, at a random moment of a step, and is read when a
step of a later generation is in metrics.jsonl (looked at every millisecond): `first` by whoever is
left, `full` with two islands again. A process that is to take a place is warm before the fault.
Trials of all systems take turns; a table's figure is the median (smallest - largest). `same`: the
run's digest (a rival's: every step's loss) is that of a run without faults, bit by bit.

Systems: `spare` (two workers, a warm spare), `cold` (no spare), `hosts` (two supervisors of one
worker and a spare each, on loopback; a dead host is started again at once, a frozen one wakes after
it was replaced), `cost` (no fault: step time with the supervisor and its spare running and stopped
in turns, and what they use), and those of rivals.py: `torchrun`, `torchrun-stop`, and, with the
interpreter of an environment that has them, `torchft`, `torchft-all`, `nvrx`, `nvrx-launcher`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median, stdev
from typing import Any

from benchmarks.rivals import RIVALS, interpreter, missing
from benchmarks.watched import (
    Late,
    Trial,
    Watched,
    address_of,
    children,
    command,
    cpu_s,
    end_tree,
    free_port,
    household,
    judged,
    members,
    send,
    settled,
    step_median_s,
    thread_s,
    until_rows,
)
from cordee.metrics.sinks import last_event

TURNS, TURN_STEPS = 60, 10
"""Of the two sides of `cost`. A checkpoint is due every 10 steps, so each turn has one."""
LINE = "cordee line"
"""The name of the thread in a worker that beats and hears the supervisor."""

GOALS_S = {
    "spare: kill rank 1": 0.3, "spare: kill rank 0": 0.3, "spare: SIGSTOP rank 1": 5.5,
    "cold: kill rank 1": 2.0, "cold: kill rank 0": 2.0,
    "hosts: kill follower": 3.0, "hosts: kill leader": 3.0, "hosts: SIGSTOP follower": 5.5,
}  # fmt: skip
"""What issue 4 allows beyond one median step."""


class Bench:
    """What all trials share: folder, steps, references, random moments, the rivals' python."""

    def __init__(self, home: Path, steps: int, seed: int, rivals: str = "") -> None:
        self.home, self.steps, self.random = home, steps, random.Random(seed)
        self.digest, self.rivals = "", rivals
        self.losses: dict[str, dict[int, float]] = {}
        self._made = 0

    def watch(self) -> Watched:
        """A run in a new folder."""
        self._made += 1
        folder = self.home / str(self._made)
        folder.mkdir()
        return Watched(folder, self.home / f"{self._made}.log")

    def words(self, *more: str) -> tuple[str, ...]:
        """The overrides of every Cordée run here."""
        return (f"run.steps={self.steps}", "launch.processes=2", *more)

    def clean(self) -> str:
        """The digest of the run without a fault."""
        if not self.digest:
            with self.watch() as run:
                run.start(command(run.folder, *self.words("fault.spares=0")))
                self.digest = ending(run)
        return self.digest

    def strike(self, run: Watched, fault: str, do: Callable[[], None], full: int = 2) -> Trial:
        """One fault at a random moment of a step, and how the run came back."""
        run.look()
        step_s = step_median_s(run)
        time.sleep(self.random.uniform(0, step_s))
        return Trial(fault, *run.recovery(do, full), step_s)


def until_settled(run: Watched, hosts: list[subprocess.Popen[bytes]], spares: int) -> None:
    """Waits until two islands compute and every host has its warm spares."""
    run.until(lambda: settled(run, hosts, 2, spares), 90, "two islands and warm spares", 0.1)


def ending(run: Watched) -> str:
    """Waits for the end of a run; its digest. Late: it did not end well."""
    run.until(lambda: all(p.poll() is not None for p in run.started), 600, "the end of a run")
    last = last_event(run.folder)
    if last.get("event") != "finished":
        raise Late(f"a run ended as {last}\n{run.words()}")
    return str(last["weights_sha256"])


# ---- Cordée --------------------------------------------------------------------------------------


def kill_rank(run: Watched, rank: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """A strike at a rank of the newest generation."""
    pid = members(run.folder)[rank]
    return lambda: send(pid, number)


def spare(bench: Bench) -> list[Trial]:
    """Two workers and a warm spare."""
    found = []
    with bench.watch() as run:
        host = run.start(command(run.folder, *bench.words()))

        for fault, rank, number in (
            ("spare: kill rank 1", 1, signal.SIGKILL),
            ("spare: kill rank 0", 0, signal.SIGKILL),
            ("spare: SIGSTOP rank 1", 1, signal.SIGSTOP),
        ):
            until_settled(run, [host], 1)
            found.append(bench.strike(run, fault, kill_rank(run, rank, number)))
        until_settled(run, [host], 1)
        everybody = children(host.pid)

        def all_at_once() -> None:
            for pid in everybody:
                send(pid, signal.SIGKILL)

        found.append(bench.strike(run, "spare: kill all workers", all_at_once))
        return judged(found, ending(run) == bench.clean())


def cold(bench: Bench) -> list[Trial]:
    """Two workers, nobody else."""
    found = []
    with bench.watch() as run:
        host = run.start(command(run.folder, *bench.words("fault.spares=0")))
        for rank in (1, 0):
            until_settled(run, [host], 0)
            until_rows(run, len(run.rows) + 20)
            found.append(bench.strike(run, f"cold: kill rank {rank}", kill_rank(run, rank)))
        return judged(found, ending(run) == bench.clean())


def hosts(bench: Bench) -> list[Trial]:
    """Two supervisors, each with a worker and a spare."""
    place, found = f"127.0.0.1:{free_port()}", []
    with bench.watch() as run:
        words = (f"run.steps={bench.steps}", "launch.processes=1")

        def joining(where: str) -> Any:
            return run.start([*command(run.folder, *words), "--join", where])

        leader = run.start([*command(run.folder, *words), "--listen", place])
        run.until(lambda: len(run.rows) > 5, 60, "the first host's steps")
        follower = joining(place)

        def killed() -> None:
            nonlocal follower
            end_tree(follower.pid)
            follower = joining(place)

        def frozen() -> None:
            for pid in (follower.pid, *children(follower.pid)):
                send(pid, signal.SIGSTOP)

        until_settled(run, [leader, follower], 1)
        found.append(bench.strike(run, "hosts: kill follower", killed))
        until_settled(run, [leader, follower], 1)
        stopped = (follower.pid, *children(follower.pid))
        found.append(bench.strike(run, "hosts: SIGSTOP follower", frozen, full=1))
        for pid in stopped:
            send(pid, signal.SIGCONT)
        until_settled(run, [leader, follower], 1)

        def beheaded() -> None:
            end_tree(leader.pid)
            joining(address_of(run.folder, place))

        found.append(bench.strike(run, "hosts: kill leader", beheaded))
        return judged(found, ending(run) == bench.clean())


# ---- cost ----------------------------------------------------------------------------------------


def cost(bench: Bench) -> dict[str, float]:
    """What supervision costs a step without a fault. Two runs of the same command differ by several
    percent here, so one run is compared with itself: in turns its supervisor and warm spare are
    stopped (`error`: the standard error of the mean ratio, which is what such turns can tell).
    Finer is the processor time that they and the workers' own line threads use."""
    steps: dict[int, list[float]] = {signal.SIGCONT: [], signal.SIGSTOP: []}
    with bench.watch() as run:
        host = run.start(command(run.folder, *bench.words("fault.silence_s=60")))
        until_settled(run, [host], 1)
        ranks = members(run.folder)
        others = [host.pid, *(pid for pid in children(host.pid) if pid not in ranks)]

        def used_s() -> float:
            return sum(map(cpu_s, others)) + sum(thread_s(pid, LINE) for pid in ranks)

        for _ in range(TURNS):
            for number, each in steps.items():
                for pid in others:
                    send(pid, number)
                each.append(turn(run))
        for pid in others:
            send(pid, signal.SIGCONT)
        turn(run)  # what waited for them meanwhile is read now
        before_s, began_s = used_s(), time.monotonic()
        until_rows(run, len(run.rows) + TURNS * TURN_STEPS // 2)
        used = (used_s() - before_s) / (time.monotonic() - began_s)
        same = ending(run) == bench.clean()
    ratios = [a / b for a, b in zip(*steps.values(), strict=True)]
    return {
        "step_s": median(steps[signal.SIGCONT]), "ratio": median(ratios),
        "error": stdev(ratios) / math.sqrt(len(ratios)), "part of two cores": used / 2,
        "same": same,
    }  # fmt: skip


def turn(run: Watched) -> float:
    """Mean seconds of some steps from now on."""
    run.look()
    first = max(run.rows) + 2  # not the step of the change, nor the next one
    run.until(lambda: max(run.rows) >= first + TURN_STEPS, 120, "a turn of steps")
    rows = run.rows[first], run.rows[first + TURN_STEPS]
    return float(rows[1]["elapsed_s"] - rows[0]["elapsed_s"]) / TURN_STEPS


# ---- all of it -----------------------------------------------------------------------------------

SYSTEMS: dict[str, Callable[[Bench], list[Trial]]] = {
    "spare": spare, "cold": cold, "hosts": hosts, **RIVALS,
}  # fmt: skip


def measure(bench: Bench, names: list[str], trials: int) -> Iterator[Trial]:
    """Systems take turns; a system that fails says so and goes on with its next trial."""
    for number in range(trials):
        for name in names:
            if name == "torchrun-stop" and number > 1:
                continue
            try:
                yield from SYSTEMS[name](bench)
            except Late as error:
                print(f"{name}, trial {number}: {error}", file=sys.stderr)
                yield Trial(f"{name}: LATE", math.nan, math.nan, math.nan)


def table(trials: list[Trial]) -> dict[str, dict[str, Any]]:
    """By fault: medians, spread, what lies beyond a step, and the ratio to torchrun's restart."""
    by_fault: dict[str, list[Trial]] = {}
    for trial in trials:
        by_fault.setdefault(trial.fault, []).append(trial)
    restart = by_fault.get("torchrun: kill rank 1")
    known: dict[str, dict[str, Any]] = {}
    for fault, each in by_fault.items():
        first = [t.first_s for t in each]
        beyond = [t.first_s - t.step_s for t in each]
        ends = [t.same for t in each if t.same is not None]
        known[fault] = {
            "n": len(each), "first_s": spread(first), "full_s": spread([t.full_s for t in each]),
            "step_s": spread([t.step_s for t in each]), "beyond_a_step_s": spread(beyond),
            "goal_s": GOALS_S.get(fault),
            "times_faster_than_torchrun": (
                round(median(t.first_s for t in restart) / median(first), 1) if restart else None
            ),
            "same": f"{ends.count(True)} of {len(ends)}",
        }  # fmt: skip
    return known


def spread(values: list[float]) -> list[float]:
    """[median, smallest, largest], to the thousandth."""
    return [round(v, 3) for v in (median(values), min(values), max(values))]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--only", default=",".join([*SYSTEMS, "cost"]))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rivals", metavar="PYTHON", help="of an environment with them")
    asked = parser.parse_args()
    names, python = asked.only.split(","), interpreter(asked.rivals)
    if out := {name: needs for name, needs in missing(python).items() if name in names}:
        names = [name for name in names if name not in out]
        told = ", ".join(f"{name} ({needs})" for name, needs in out.items())
        print(f"left out, as --rivals names no interpreter with: {told}", file=sys.stderr)
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    with tempfile.TemporaryDirectory(prefix="cordee-recovery-") as home, household():
        bench = Bench(Path(home), asked.steps, asked.seed, python)
        found, costs = [], []
        for trial in measure(bench, [n for n in names if n in SYSTEMS], asked.trials):
            found.append(trial)
            print(json.dumps(asdict(trial)), file=sys.stderr, flush=True)
        for _ in range(asked.trials if "cost" in names else 0):
            costs.append(cost(bench))
            print(json.dumps(costs[-1]), file=sys.stderr, flush=True)
    known: dict[str, Any] = table(found)
    for fault, row in known.items():
        print(f"{fault:26s}" + "  ".join(f"{key} {value}" for key, value in row.items()))
    if costs:
        known["cost"] = {key: spread([each[key] for each in costs]) for key in costs[0]}
        print(f"{'cost':26s}{known['cost']}")
    if asked.json:
        print(json.dumps(known))


if __name__ == "__main__":
    main()
