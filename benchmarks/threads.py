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

from cordee.dist.start import LIFELINE, PARENT
from cordee.metrics.sinks import read_lines

WORDS = (
    "model.preset=micro", "model.layers=4", "model.width=128", "model.heads=4",
    "data.path=builtin:markov", "data.tokens=200000", "data.sequence=128", "batch.microbatch=4",
    "run.precision=fp32", "optim.name=adamw", "evaluate.sample=0", "evaluate.tokens=0",
    "checkpoint.every=0", "fault.recover=false",
)  # fmt: skip
ALIVE = os.pipe()
OURS = {PARENT: str(os.getpid()), LIFELINE: str(ALIVE[0])}
"""A run ends with this process: its other end of the pipe closes then."""
SPIN = {"GOMP_SPINCOUNT": "300000"}
"""libgomp's own, where nobody says how threads wait."""
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"
"""The other program; like the run, it does not outlive the benchmark."""
CONDITIONS = ("alone", "beside", "fewer")
GOAL = 1.3


@dataclass(frozen=True)
class Case:
    """Ranks and threads on all of `cores`; `spins`: with the library's own way to wait."""

    name: str
    ranked: bool
    spins: bool = False

    def words(self, cores: int) -> list[str]:
        """One rank of as many threads, or as many ranks of one."""
        ranks, threads = (cores, 1) if self.ranked else (1, cores)
        return [f"launch.processes={ranks}", f"launch.threads={threads}"]


def step_s(case: Case, condition: str, cores: Sequence[int], words: Sequence[str]) -> float:
    """Median seconds of a step."""
    mine = list(cores[:-1] if condition == "fewer" else cores)
    with tempfile.TemporaryDirectory() as home, ExitStack() as at_end:
        folder = Path(home) / "run"
        if condition == "beside":
            busy = subprocess.Popen(
                [sys.executable, "-c", BUSY, str(os.getpid())],
                preexec_fn=partial(os.sched_setaffinity, 0, cores),
            )
            at_end.callback(busy.wait)
            at_end.callback(busy.kill)
        command = [sys.executable, "-m", "cordee", "train", f"run.dir={folder}", *words]
        done = subprocess.run(
            [*command, *case.words(len(mine))],
            env={**os.environ, **OURS, **(SPIN if case.spins else {})},
            pass_fds=(ALIVE[0],),
            preexec_fn=partial(os.sched_setaffinity, 0, mine),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(done.args)} failed:\n{done.stderr[-2000:]}")
        rows = read_lines(folder / "metrics.jsonl")
        return median(row["step_s"] for row in rows[len(rows) // 4 :])


def ratios(rounds: Sequence[dict[str, float]], over: str, under: str) -> float:
    """Median over rounds of one condition's time over another's."""
    return median(each[over] / each[under] for each in rounds)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--spin", action="store_true")
    parser.add_argument("words", nargs="*")
    asked = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("one core: none can be left to another program")
    # As many microbatches as all cores and one fewer can share evenly: the same work for each.
    even = math.lcm(len(cores), len(cores) - 1)
    microbatches = even * -(-8 // even)
    words = [*WORDS, f"batch.microbatches={microbatches}", f"run.steps={asked.steps}", *asked.words]
    cases = [Case(f"1 rank x {len(cores)} threads", False), Case(f"{len(cores)} ranks x 1", True)]
    if asked.spin:
        cases.append(Case(f"1 rank x {len(cores)} that spin", False, True))
    turns = [(case, condition) for case in cases for condition in CONDITIONS]
    found: dict[str, list[dict[str, float]]] = {case.name: [] for case in cases}
    for number in range(asked.rounds):
        for case in cases:
            found[case.name].append({})
        first = number * len(CONDITIONS) % len(turns) + number % len(CONDITIONS)
        for case, condition in turns[first:] + turns[:first]:
            found[case.name][-1][condition] = step_s(case, condition, cores, words)
    told = {}
    for case in cases:
        rounds = found[case.name]
        seconds = {f"{c}_s": round(median(r[c] for r in rounds), 5) for c in CONDITIONS}
        beside = ratios(rounds, "beside", "fewer")
        told[case.name] = {
            **seconds,
            "beside_over_fewer": round(beside, 3),
            "beside_over_alone": round(ratios(rounds, "beside", "alone"), 3),
            "met": beside <= GOAL,
        }
        shown = "  ".join(f"{key} {value}" for key, value in told[case.name].items())
        print(f"{case.name:24s} {shown}", file=sys.stderr)
    if asked.json:
        print(json.dumps({"cores": len(cores), "rounds": asked.rounds, "goal": GOAL, **told}))


if __name__ == "__main__":
    main()
