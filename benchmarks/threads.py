"""Threads beside another program: one rank on all cores, and ranks of one thread.

    python benchmarks/threads.py [--json] [--rounds N] [--steps N] [--spin] [WORD ...]

Each case runs alone, beside one busy process that no core is given to, and alone on one core fewer
(the same ranks or threads less one), in turns; what is first moves on from round to round. Speeds
are medians of a run's steps after the first quarter; ratios are medians over rounds of ratios of
one round. Goal: beside / one core fewer at most 1.3. `--spin` adds one rank whose threads spin as
libgomp's do by default (GOMP_SPINCOUNT=300000): it shows what waiting by sleep costs alone and
gains beside others. WORDs are overrides. On a machine with two or more idle cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from cordee.dist.process_group import LIFELINE_VARIABLE, PARENT_VARIABLE
from cordee.report.reader import read_records

BASE_OVERRIDES = (
    "model.preset=micro", "model.layers=4", "model.width=128", "model.heads=4",
    "data.path=builtin:markov", "data.tokens=200000", "data.sequence=128", "batch.microbatch=4",
    "run.precision=fp32", "optim.name=adamw", "evaluate.sample=0", "evaluate.tokens=0",
    "checkpoint.every=0", "fault.recover=false",
)  # fmt: skip
LIFELINE_PIPE = os.pipe()
WORKER_ENVIRONMENT = {PARENT_VARIABLE: str(os.getpid()), LIFELINE_VARIABLE: str(LIFELINE_PIPE[0])}
"""A run ends with this process: its other end of the pipe closes then."""
SPIN_ENVIRONMENT = {"GOMP_SPINCOUNT": "300000"}
"""libgomp's own, where nobody says how threads wait."""
BUSY_PROGRAM = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"
"""The other program; like the run, it does not outlive the benchmark."""
CONDITIONS = ("alone", "beside", "fewer")
GOAL_RATIO = 1.3


@dataclass(frozen=True)
class ThreadCase:
    """Ranks and threads on all of `usable_cores`; `spins`: with the library's own way to wait."""

    name: str
    uses_ranks: bool
    spins: bool = False

    def overrides(self, cores: int) -> list[str]:
        """One rank of as many threads, or as many ranks of one."""
        rank_count, threads = (cores, 1) if self.uses_ranks else (1, cores)
        return [f"launch.processes={rank_count}", f"launch.threads={threads}"]


def measure_step_s(
    case: ThreadCase, condition: str, cores: Sequence[int], overrides: Sequence[str]
) -> float:
    """Median seconds of a step."""
    case_cores = list(cores[:-1] if condition == "fewer" else cores)
    with tempfile.TemporaryDirectory() as home, ExitStack() as cleanup:
        folder = Path(home) / "run"
        if condition == "beside":
            busy_process = subprocess.Popen(
                [sys.executable, "-c", BUSY_PROGRAM, str(os.getpid())],
                preexec_fn=partial(os.sched_setaffinity, 0, cores),
            )
            cleanup.callback(busy_process.wait)
            cleanup.callback(busy_process.kill)
        command = [sys.executable, "-m", "cordee", "train", f"run.dir={folder}", *overrides]
        result = subprocess.run(
            [*command, *case.overrides(len(case_cores))],
            env={**os.environ, **WORKER_ENVIRONMENT, **(SPIN_ENVIRONMENT if case.spins else {})},
            pass_fds=(LIFELINE_PIPE[0],),
            preexec_fn=partial(os.sched_setaffinity, 0, case_cores),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if result.returncode:
            raise SystemExit(f"{' '.join(result.args)} failed:\n{result.stderr[-2000:]}")
        rows = read_records(folder / "metrics.jsonl")
        return median(row["step_s"] for row in rows[len(rows) // 4 :])


def median_ratio(rounds: Sequence[dict[str, float]], numerator: str, denominator: str) -> float:
    """Median over rounds of one condition's time over another's."""
    return median(times_s[numerator] / times_s[denominator] for times_s in rounds)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--spin", action="store_true")
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("one core: none can be left to another program")
    # As many microbatches as all cores and one fewer can share evenly: the same work for each.
    common_multiple = math.lcm(len(cores), len(cores) - 1)
    microbatches = common_multiple * -(-8 // common_multiple)
    overrides = [
        *BASE_OVERRIDES,
        f"batch.microbatches={microbatches}",
        f"run.steps={args.steps}",
        *args.words,
    ]
    cases = [
        ThreadCase(f"1 rank x {len(cores)} threads", False),
        ThreadCase(f"{len(cores)} ranks x 1", True),
    ]
    if args.spin:
        cases.append(ThreadCase(f"1 rank x {len(cores)} that spin", False, True))
    turns = [(case, condition) for case in cases for condition in CONDITIONS]
    rounds_by_case: dict[str, list[dict[str, float]]] = {case.name: [] for case in cases}
    for round_number in range(args.rounds):
        for case in cases:
            rounds_by_case[case.name].append({})
        first_turn = round_number * len(CONDITIONS) % len(turns) + round_number % len(CONDITIONS)
        for case, condition in turns[first_turn:] + turns[:first_turn]:
            rounds_by_case[case.name][-1][condition] = measure_step_s(
                case, condition, cores, overrides
            )
    results = {}
    for case in cases:
        rounds = rounds_by_case[case.name]
        seconds = {f"{c}_s": round(median(r[c] for r in rounds), 5) for c in CONDITIONS}
        beside_ratio = median_ratio(rounds, "beside", "fewer")
        results[case.name] = {
            **seconds,
            "beside_over_fewer": round(beside_ratio, 3),
            "beside_over_alone": round(median_ratio(rounds, "beside", "alone"), 3),
            "met": beside_ratio <= GOAL_RATIO,
        }
        result_text = "  ".join(f"{key} {value}" for key, value in results[case.name].items())
        print(f"{case.name:24s} {result_text}", file=sys.stderr)
    if args.json:
        print(
            json.dumps({"cores": len(cores), "rounds": args.rounds, "goal": GOAL_RATIO, **results})
        )


if __name__ == "__main__":
    main()
