"""Two islands of unequal speed against two equal ones: how much of the sum of both speeds is used.

    python benchmarks/unequal.py [--json] [--steps N] [--part 0.333] [WORD ...]

One island is stopped for 1 - part of every 30 ms. Runs, one after another, of the same words (those
given are overrides): equal; uneven from its first step; the same with layout.balance=false; uneven
from the middle on. Their speeds are held to (1 + part) / 2 of the equal run's, the sum of both
islands' speeds (`of_measured_speeds`: with the slow one's speed as the run itself measured it,
since stopping and waking cost something too). Goals: >= 0.90, rebalanced within 10 steps, the same
digest everywhere. Speeds are medians over the steps after the last change of shares, and at least
10 steps. Run it on a quiet machine with a core for each island.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from cordee.launcher.run_ranks import throttle
from cordee.report.reader import last_event, read_records

BASE_OVERRIDES = (
    "run.exact=true", "model.layers=4", "model.width=128", "model.heads=4", "data.sequence=256",
    "data.path=builtin:markov", "data.tokens=200000", "batch.microbatch=8",
    "batch.microbatches=32", "optim.name=adamw",
    "evaluate.sample=0", "evaluate.tokens=2048", "checkpoint.every=0", "launch.threads=1",
    "launch.processes=2",
)  # fmt: skip

PERIOD_S = 0.03
"""Long against a switch of processes, short against a message: a slow device is slow, not deaf."""


def rank_pid(folder: Path, rank: int) -> int:
    """The pid of a rank of the run in `folder`, as it is now."""
    memberships = [e["members"] for e in read_records(folder / "events.jsonl") if "members" in e]
    return int(memberships[-1][rank]["pid"])


def measure_run(
    folder: Path, overrides: list[str], slow_step: int | None, speed_fraction: float
) -> dict[str, Any]:
    """A run in which island 1 is slow from step `slow_step` on (None: never)."""
    command = [sys.executable, "-m", "cordee", "train", f"run.dir={folder}", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begin_step = 0
    try:
        while process.poll() is None and begin_step < max(1, slow_step or 0):
            time.sleep(0.005)
            begin_step = len(read_records(folder / "metrics.jsonl"))
        with (
            nullcontext()
            if slow_step is None
            else throttle(rank_pid(folder, 1), speed_fraction, PERIOD_S)
        ):
            exit_code = process.wait()
    finally:
        process.kill()  # its ranks die with it
    if exit_code:
        raise SystemExit(f"{' '.join(command)} failed with {exit_code}")
    rows = read_records(folder / "metrics.jsonl")
    events = read_records(folder / "events.jsonl")
    rebalances = [e for e in events if e["event"] == "rebalanced"]
    rebalance_steps = [e["step"] for e in rebalances if e["step"] > begin_step]
    island_times = [e["seconds_per_microbatch"] for e in rebalances]
    steady_index = min(max([begin_step, *rebalance_steps]), len(rows) - 10)
    return {
        "tokens_per_s": median(row["tokens_per_s"] for row in rows[steady_index:]),
        "steps_to_rebalanced": rebalance_steps[0] - begin_step if rebalance_steps else None,
        "shares": rows[-1]["shares"],
        "changes": len(rebalance_steps),
        "times_slower": [round(max(s) / min(s), 2) for s in island_times],
        "digest": last_event(folder)["weights_sha256"],
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--part", type=float, default=1 / 3)
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    overrides = [*BASE_OVERRIDES, f"run.steps={args.steps}", *args.words]
    cases: dict[str, tuple[list[str], int | None]] = {
        "equal": (overrides, None),
        "uneven": (overrides, 1),
        "uneven, balance=false": ([*overrides, "layout.balance=false"], 1),
        "uneven from the middle": (overrides, args.steps // 2),
        "equal again": (overrides, None),
    }
    with tempfile.TemporaryDirectory() as home:
        results = {
            name: measure_run(Path(home) / str(index), case_overrides, slow_step, args.part)
            for index, (name, (case_overrides, slow_step)) in enumerate(cases.items())
        }
    equal_speed = (results["equal"]["tokens_per_s"] + results["equal again"]["tokens_per_s"]) / 2
    reference_digest = results["equal"]["digest"]
    for name, result in results.items():
        full_speed = equal_speed * (1 if name.startswith("equal") else (1 + args.part) / 2)
        speed = result.pop("tokens_per_s")
        result["of_both_speeds"] = round(speed / full_speed, 3)
        if slowdowns := result["times_slower"]:
            result["of_measured_speeds"] = round(
                speed / (equal_speed * (1 + 1 / slowdowns[-1]) / 2), 3
            )
        result["digest"] = "same" if result["digest"] == reference_digest else result["digest"]
        result_text = "  ".join(f"{key} {value}" for key, value in result.items())
        print(f"{name:24s} {result_text}", file=sys.stderr)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
