"""From a command to its first loss, and from a death to the next step of all: workers that import
torch for themselves (before) beside forks of one process that has (after), in turns of one go.

    python -m benchmarks.start [--json] [--trials N]

`worker_import_cpu_s`: processor time that a worker has used when it says that it is ready; of forks
`server_import_cpu_s` comes besides, once for all of them. `cold_replacement_s`: from SIGKILL of one
of two workers, no spare, to a step of two islands. `first_loss_s`: from the command to its first
row of metrics; `after_server_s`: the same from the moment that the first worker could be forked.
Each is [median, smallest, largest]. `same`: all runs have one digest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.watched import (
    RunMonitor,
    child_pids,
    cpu_s,
    is_settled,
    median_step_s,
    member_pids,
    send_signal,
    subreaper,
    train_command,
    wait_for_rows,
    worker_name,
)
from cordee.report.reader import last_event

SIDES = {"before": "launch.fork_server=false", "after": "launch.fork_server=true"}
STEPS = 160
KILLS = 3
"""Deaths in a run of STEPS steps."""
POLL_S = 0.002
SERVER_NAME = "template"


@dataclass
class Figures:
    """What the runs of one side took, in seconds."""

    worker_import_cpu_s: list[float] = field(default_factory=list)
    server_import_cpu_s: list[float] = field(default_factory=list)
    first_loss_s: list[float] = field(default_factory=list)
    after_server_s: list[float] = field(default_factory=list)
    cold_replacement_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)

    def summary(self) -> dict[str, Any]:
        """[median, smallest, largest] of each figure that there is."""
        columns = {name: values for name, values in vars(self).items() if name != "digests"}
        return {
            name: [round(value, 3) for value in (median(values), min(values), max(values))]
            for name, values in columns.items()
            if values
        }


def watch_start(run: RunMonitor, host: subprocess.Popen[bytes], figures: Figures) -> None:
    """Looks at a run's processes until its first loss."""
    start_s, fork_s = time.monotonic(), 0.0
    ready_pids: set[int] = set()
    while not run.rows:
        if host.poll() is not None:
            raise SystemExit(f"the run ended before its first step\n{run.log_tail()}")
        for pid in child_pids(host.pid):
            name = worker_name(pid)
            if pid not in ready_pids and (name == "ready" or name.startswith("rank ")):
                ready_pids.add(pid)
                figures.worker_import_cpu_s.append(cpu_s(pid))
            if not fork_s and name == "worker":
                fork_s = time.monotonic()
                figures.server_import_cpu_s += [
                    cpu_s(child)
                    for child in child_pids(host.pid)
                    if worker_name(child) == SERVER_NAME
                ]
        run.read_new_rows()
        time.sleep(POLL_S)
    figures.first_loss_s.append(time.monotonic() - start_s)
    if fork_s:
        figures.after_server_s.append(time.monotonic() - fork_s)


def measure_run(home: Path, number: int, side: str, figures: Figures, rng: random.Random) -> None:
    """One run of two workers, KILLS times one of them dies at a random moment of a step."""
    folder = home / f"{number}-{side}"
    folder.mkdir()
    with RunMonitor(folder, home / f"{folder.name}.log") as run:
        overrides = (f"run.steps={STEPS}", "launch.processes=2", "fault.spares=0", SIDES[side])
        host = run.start(train_command(folder, *overrides))
        watch_start(run, host, figures)
        for kill in range(KILLS):
            run.wait_until(lambda: is_settled(run, [host], 2, 0), 90, "two islands")
            wait_for_rows(run, len(run.rows) + 15)
            step_s = median_step_s(run)
            pid = member_pids(folder)[kill % 2]
            time.sleep(rng.uniform(0, step_s))
            _, full_s = run.measure_recovery(lambda pid=pid: send_signal(pid, signal.SIGKILL), 2)  # type: ignore[misc]
            figures.cold_replacement_s.append(full_s)
            figures.step_s.append(step_s)
        run.wait_until(lambda: host.poll() is not None, 300, "the end of a run")
        figures.digests.add(str(last_event(folder).get("weights_sha256")))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    rng, figures = random.Random(args.seed), {side: Figures() for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="cordee-start-") as home, subreaper():
        for number in range(args.trials):
            for side in sorted(SIDES, reverse=number % 2 == 0):  # who comes first takes turns too
                measure_run(Path(home), number, side, figures[side], rng)
    digests = set.union(*(side_figures.digests for side_figures in figures.values()))
    result: dict[str, Any] = {side: figures[side].summary() for side in SIDES}
    for side in SIDES:
        for name, values in result[side].items():
            line = f"{side:<8}{name:<22}" + "".join(f"{value:9.3f}" for value in values)
            print(line, file=sys.stderr if args.json else sys.stdout)
    result["same"] = len(digests) == 1 and digests != {"None"}
    print(json.dumps(result) if args.json else f"one digest: {result['same']}")


if __name__ == "__main__":
    main()
