"""From a fault to the next committed step: Cordée beside torchrun's restart, in one go.

    python -m benchmarks.recovery [--json] [--trials N] [--only NAME,NAME] [--steps N]
                                  [--rivals PYTHON]

For the table of docs/performance.md, alone on a quiet machine of two cores (about an hour):

    python -m benchmarks.recovery --trials 10 --json

The clock starts when SIGKILL (or SIGSTOP) is sent, at a random moment of a step, and is read when a
step of a later generation is in metrics.jsonl (looked at every millisecond): `first` by whoever is
left, `make_pieces` with two islands again. A process that is to take a place is warm before the
fault. Trials of all systems take turns; a table's figure is the median (smallest - largest).
`same`: the run's digest (a rival's: every step's loss) is that of a run without faults, bit by bit.

Systems: `measure_spare` (two workers, a warm spare), `measure_cold` (no spare), `measure_hosts`
(two supervisors of one worker and a spare each, on loopback; a dead host is started again at once,
a frozen one wakes after it was replaced), `measure_cost` (no fault: step time with the supervisor
and its spare running and stopped in turns, and what they use), and those of rivals.py:
`measure_torchrun`, `torchrun-stop`, and, with the interpreter of an environment that has them,
`measure_torchft`, `torchft-all`, `measure_nvrx`, `nvrx-launcher`.
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

from benchmarks.rivals import RIVALS, find_interpreter, missing_packages
from benchmarks.watched import (
    DeadlineExceeded,
    FaultTrial,
    RunMonitor,
    child_pids,
    cpu_s,
    find_live_address,
    free_port,
    is_settled,
    kill_tree,
    median_step_s,
    member_pids,
    send_signal,
    subreaper,
    thread_cpu_s,
    train_command,
    wait_for_rows,
    with_digest_check,
    worker_name,
)
from cordee.report.reader import last_event

TURNS, TURN_STEPS = 60, 10
"""Of the two sides of `cost`. A checkpoint is due every 10 steps, so each turn has one."""
CHANNEL_THREAD = "cordee line"
"""The name of the thread in a worker that beats and hears the supervisor."""

GOALS_S = {
    "spare: kill rank 1": 0.3, "spare: kill rank 0": 0.3, "spare: SIGSTOP rank 1": 5.5,
    "cold: kill rank 1": 2.0, "cold: kill rank 0": 2.0,
    "hosts: kill follower": 3.0, "hosts: kill leader": 3.0, "hosts: SIGSTOP follower": 5.5,
}  # fmt: skip
"""What issue 4 allows beyond one median step."""


class RecoveryBench:
    """What all trials share: folder, steps, references, random moments, the rivals' python."""

    def __init__(self, home: Path, steps: int, seed: int, rival_python: str = "") -> None:
        self.home, self.steps, self.rng = home, steps, random.Random(seed)
        self.digest, self.rival_python = "", rival_python
        self.losses: dict[str, dict[int, float]] = {}
        self._run_count = 0

    def new_run(self) -> RunMonitor:
        """A run in a new folder."""
        self._run_count += 1
        folder = self.home / str(self._run_count)
        folder.mkdir()
        return RunMonitor(folder, self.home / f"{self._run_count}.log")

    def overrides(self, *extra: str) -> tuple[str, ...]:
        """The overrides of every Cordée run here."""
        return (f"run.steps={self.steps}", "launch.processes=2", *extra)

    def clean_digest(self) -> str:
        """The digest of the run without a fault."""
        if not self.digest:
            with self.new_run() as run:
                run.start(train_command(run.folder, *self.overrides("fault.spares=0")))
                self.digest = final_digest(run)
        return self.digest

    def inject_fault(
        self, run: RunMonitor, fault: str, inject: Callable[[], None], full_islands: int = 2
    ) -> FaultTrial:
        """One fault at a random moment of a step, and how the run came back."""
        run.read_new_rows()
        step_s = median_step_s(run)
        time.sleep(self.rng.uniform(0, step_s))
        return FaultTrial(fault, *run.measure_recovery(inject, full_islands), step_s)


def wait_until_settled(
    run: RunMonitor, hosts: list[subprocess.Popen[bytes]], spare_count: int
) -> None:
    """Waits until two islands compute and every host has its warm spares."""
    run.wait_until(
        lambda: is_settled(run, hosts, 2, spare_count), 90, "two islands and warm spares", 0.1
    )


def final_digest(run: RunMonitor) -> str:
    """Waits for the end of a run; its digest. Late: it did not end well."""
    run.wait_until(
        lambda: all(p.poll() is not None for p in run.processes), 600, "the end of a run"
    )
    last_record = last_event(run.folder)
    if last_record.get("event") != "finished":
        raise DeadlineExceeded(f"a run ended as {last_record}\n{run.log_tail()}")
    return str(last_record["weights_sha256"])


# ---- Cordée --------------------------------------------------------------------------------------


def rank_killer(
    run: RunMonitor, rank: int, signal_number: int = signal.SIGKILL
) -> Callable[[], None]:
    """A strike at a rank of the newest generation."""
    pid = member_pids(run.folder)[rank]
    return lambda: send_signal(pid, signal_number)


def measure_spare(bench: RecoveryBench) -> list[FaultTrial]:
    """Two workers and a warm spare."""
    trials = []
    with bench.new_run() as run:
        host = run.start(train_command(run.folder, *bench.overrides()))

        for fault, rank, signal_number in (
            ("spare: kill rank 1", 1, signal.SIGKILL),
            ("spare: kill rank 0", 0, signal.SIGKILL),
            ("spare: SIGSTOP rank 1", 1, signal.SIGSTOP),
        ):
            wait_until_settled(run, [host], 1)
            trials.append(bench.inject_fault(run, fault, rank_killer(run, rank, signal_number)))
        wait_until_settled(run, [host], 1)
        worker_pids = [p for p in child_pids(host.pid) if worker_name(p) != "template"]

        def kill_all() -> None:
            for pid in worker_pids:
                send_signal(pid, signal.SIGKILL)

        trials.append(bench.inject_fault(run, "spare: kill all workers", kill_all))
        return with_digest_check(trials, final_digest(run) == bench.clean_digest())


def measure_cold(bench: RecoveryBench) -> list[FaultTrial]:
    """Two workers, nobody else."""
    trials = []
    with bench.new_run() as run:
        host = run.start(train_command(run.folder, *bench.overrides("fault.spares=0")))
        for rank in (1, 0):
            wait_until_settled(run, [host], 0)
            wait_for_rows(run, len(run.rows) + 20)
            trials.append(
                bench.inject_fault(run, f"cold: kill rank {rank}", rank_killer(run, rank))
            )
        return with_digest_check(trials, final_digest(run) == bench.clean_digest())


def measure_hosts(bench: RecoveryBench) -> list[FaultTrial]:
    """Two supervisors, each with a worker and a spare."""
    address, trials = f"127.0.0.1:{free_port()}", []
    with bench.new_run() as run:
        overrides = (f"run.steps={bench.steps}", "launch.processes=1")

        def start_joiner(target: str) -> Any:
            return run.start([*train_command(run.folder, *overrides), "--join", target])

        leader = run.start([*train_command(run.folder, *overrides), "--listen", address])
        run.wait_until(lambda: len(run.rows) > 5, 60, "the first host's steps")
        follower = start_joiner(address)

        def kill_follower() -> None:
            nonlocal follower
            kill_tree(follower.pid)
            follower = start_joiner(address)

        def freeze_follower() -> None:
            for pid in (follower.pid, *child_pids(follower.pid)):
                send_signal(pid, signal.SIGSTOP)

        wait_until_settled(run, [leader, follower], 1)
        trials.append(bench.inject_fault(run, "hosts: kill follower", kill_follower))
        wait_until_settled(run, [leader, follower], 1)
        frozen_pids = (follower.pid, *child_pids(follower.pid))
        trials.append(
            bench.inject_fault(run, "hosts: SIGSTOP follower", freeze_follower, full_islands=1)
        )
        for pid in frozen_pids:
            send_signal(pid, signal.SIGCONT)
        wait_until_settled(run, [leader, follower], 1)

        def kill_leader() -> None:
            kill_tree(leader.pid)
            start_joiner(find_live_address(run.folder, address))

        trials.append(bench.inject_fault(run, "hosts: kill leader", kill_leader))
        return with_digest_check(trials, final_digest(run) == bench.clean_digest())


# ---- cost ----------------------------------------------------------------------------------------


def measure_cost(bench: RecoveryBench) -> dict[str, float]:
    """What supervision costs a step without a fault. Two runs of the same command differ by several
    percent here, so one run is compared with itself: in turns its supervisor and warm spare are
    stopped (`error`: the standard error of the mean ratio, which is what such turns can tell).
    Finer is the processor time that they and the workers' own line threads use."""
    step_times_s: dict[int, list[float]] = {signal.SIGCONT: [], signal.SIGSTOP: []}
    with bench.new_run() as run:
        host = run.start(train_command(run.folder, *bench.overrides("fault.silence_s=60")))
        wait_until_settled(run, [host], 1)
        rank_pids = member_pids(run.folder)
        supervisor_pids = [host.pid, *(pid for pid in child_pids(host.pid) if pid not in rank_pids)]

        def cpu_used_s() -> float:
            return sum(map(cpu_s, supervisor_pids)) + sum(
                thread_cpu_s(pid, CHANNEL_THREAD) for pid in rank_pids
            )

        for _ in range(TURNS):
            for signal_number, times_s in step_times_s.items():
                for pid in supervisor_pids:
                    send_signal(pid, signal_number)
                times_s.append(measure_turn(run))
        for pid in supervisor_pids:
            send_signal(pid, signal.SIGCONT)
        measure_turn(run)  # what waited for them meanwhile is read now
        cpu_before_s, start_s = cpu_used_s(), time.monotonic()
        wait_for_rows(run, len(run.rows) + TURNS * TURN_STEPS // 2)
        cpu_share = (cpu_used_s() - cpu_before_s) / (time.monotonic() - start_s)
        is_same_digest = final_digest(run) == bench.clean_digest()
    ratios = [a / b for a, b in zip(*step_times_s.values(), strict=True)]
    return {
        "step_s": median(step_times_s[signal.SIGCONT]), "ratio": median(ratios),
        "error": stdev(ratios) / math.sqrt(len(ratios)), "part of two cores": cpu_share / 2,
        "same": is_same_digest,
    }  # fmt: skip


def measure_turn(run: RunMonitor) -> float:
    """Mean seconds of some steps from now on."""
    run.read_new_rows()
    first_step = max(run.rows) + 2  # not the step of the change, nor the next one
    run.wait_until(lambda: max(run.rows) >= first_step + TURN_STEPS, 120, "a turn of steps")
    rows = run.rows[first_step], run.rows[first_step + TURN_STEPS]
    return float(rows[1]["elapsed_s"] - rows[0]["elapsed_s"]) / TURN_STEPS


# ---- all of it -----------------------------------------------------------------------------------

SYSTEMS: dict[str, Callable[[RecoveryBench], list[FaultTrial]]] = {
    "spare": measure_spare, "cold": measure_cold, "hosts": measure_hosts, **RIVALS,
}  # fmt: skip


def run_trials(bench: RecoveryBench, names: list[str], trials: int) -> Iterator[FaultTrial]:
    """Systems take turns; a system that fails says so and goes on with its next trial."""
    for trial_number in range(trials):
        for name in names:
            if name == "torchrun-stop" and trial_number > 1:
                continue
            try:
                yield from SYSTEMS[name](bench)
            except DeadlineExceeded as error:
                print(f"{name}, trial {trial_number}: {error}", file=sys.stderr)
                yield FaultTrial(f"{name}: LATE", math.nan, math.nan, math.nan)


def summarise_trials(trials: list[FaultTrial]) -> dict[str, dict[str, Any]]:
    """By fault: medians, spread, what lies beyond a step, and the ratio to torchrun's restart."""
    by_fault: dict[str, list[FaultTrial]] = {}
    for trial in trials:
        by_fault.setdefault(trial.fault, []).append(trial)
    restart_trials = by_fault.get("torchrun: kill rank 1")
    summary: dict[str, dict[str, Any]] = {}
    for fault, fault_trials in by_fault.items():
        first_times_s = [t.first_s for t in fault_trials]
        beyond_step_s = [t.first_s - t.step_s for t in fault_trials]
        digest_checks = [t.same for t in fault_trials if t.same is not None]
        summary[fault] = {
            "n": len(fault_trials),
            "first_s": spread(first_times_s),
            "full_s": spread([t.full_s for t in fault_trials]),
            "step_s": spread([t.step_s for t in fault_trials]),
            "beyond_a_step_s": spread(beyond_step_s),
            "goal_s": GOALS_S.get(fault),
            "times_faster_than_torchrun": (
                round(median(t.first_s for t in restart_trials) / median(first_times_s), 1)
                if restart_trials
                else None
            ),
            "same": f"{digest_checks.count(True)} of {len(digest_checks)}",
        }
    return summary


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
    args = parser.parse_args()
    names, python = args.only.split(","), find_interpreter(args.rivals)
    if missing_systems := {
        name: package for name, package in missing_packages(python).items() if name in names
    }:
        names = [name for name in names if name not in missing_systems]
        missing_text = ", ".join(f"{name} ({package})" for name, package in missing_systems.items())
        print(f"left out, as --rivals names no interpreter with: {missing_text}", file=sys.stderr)
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    with tempfile.TemporaryDirectory(prefix="cordee-recovery-") as home, subreaper():
        bench = RecoveryBench(Path(home), args.steps, args.seed, python)
        trials, costs = [], []
        for trial in run_trials(bench, [n for n in names if n in SYSTEMS], args.trials):
            trials.append(trial)
            print(json.dumps(asdict(trial)), file=sys.stderr, flush=True)
        for _ in range(args.trials if "cost" in names else 0):
            costs.append(measure_cost(bench))
            print(json.dumps(costs[-1]), file=sys.stderr, flush=True)
    summary: dict[str, Any] = summarise_trials(trials)
    for fault, row in summary.items():
        print(f"{fault:26s}" + "  ".join(f"{key} {value}" for key, value in row.items()))
    if costs:
        summary["cost"] = {key: spread([cost_row[key] for cost_row in costs]) for key in costs[0]}
        print(f"{'cost':26s}{summary['cost']}")
    if args.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
