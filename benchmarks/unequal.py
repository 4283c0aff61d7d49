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

from cordee.metrics.sinks import last_event, read_lines
from cordee.testing import slowed

WORDS = (
    "run.exact=true", "model.layers=4", "model.width=128", "model.heads=4", "data.sequence=256",
    "data.path=builtin:markov", "data.tokens=200000", "batch.microbatch=8",
    "batch.microbatches=32", "optim.name=adamw",
    "evaluate.sample=0", "evaluate.tokens=2048", "checkpoint.every=0", "launch.threads=1",
    "launch.processes=2",
)  # fmt: skip

PERIOD_S = 0.03
"""Long against a switch of processes, short against a message: a slow device is slow, not deaf."""


def rank_of(folder: Path, rank: int) -> int:
    """The pid of a rank of the run in `folder`, as it is now."""
    told = [e["members"] for e in read_lines(folder / "events.jsonl") if "members" in e]
    return int(told[-1][rank]["pid"])


def run(folder: Path, words: list[str], slow_from: int | None, part: float) -> dict[str, Any]:
    """A run in which island 1 is slow from step `slow_from` on (None: never)."""
    command = [sys.executable, "-m", "cordee", "train", f"run.dir={folder}", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = 0
    try:
        while process.poll() is None and begun < max(1, slow_from or 0):
            time.sleep(0.005)
            begun = len(read_lines(folder / "metrics.jsonl"))
        with nullcontext() if slow_from is None else slowed(rank_of(folder, 1), part, PERIOD_S):
            code = process.wait()
    finally:
        process.kill()  # its ranks die with it
    if code:
        raise SystemExit(f"{' '.join(command)} failed with {code}")
    rows = read_lines(folder / "metrics.jsonl")
    events = read_lines(folder / "events.jsonl")
    told = [e for e in events if e["event"] == "rebalanced"]
    moved = [e["step"] for e in told if e["step"] > begun]
    measured = [e["seconds_per_microbatch"] for e in told]
    settled = min(max([begun, *moved]), len(rows) - 10)
    return {
        "tokens_per_s": median(row["tokens_per_s"] for row in rows[settled:]),
        "steps_to_rebalanced": moved[0] - begun if moved else None,
        "shares": rows[-1]["shares"],
        "changes": len(moved),
        "times_slower": [round(max(s) / min(s), 2) for s in measured],
        "digest": last_event(folder)["weights_sha256"],
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--part", type=float, default=1 / 3)
    parser.add_argument("words", nargs="*")
    asked = parser.parse_args()
    words = [*WORDS, f"run.steps={asked.steps}", *asked.words]
    cases: dict[str, tuple[list[str], int | None]] = {
        "equal": (words, None),
        "uneven": (words, 1),
        "uneven, balance=false": ([*words, "layout.balance=false"], 1),
        "uneven from the middle": (words, asked.steps // 2),
        "equal again": (words, None),
    }
    with tempfile.TemporaryDirectory() as home:
        found = {
            name: run(Path(home) / str(place), case, slow_from, asked.part)
            for place, (name, (case, slow_from)) in enumerate(cases.items())
        }
    equal = (found["equal"]["tokens_per_s"] + found["equal again"]["tokens_per_s"]) / 2
    reference = found["equal"]["digest"]
    for name, each in found.items():
        whole = equal * (1 if name.startswith("equal") else (1 + asked.part) / 2)
        speed = each.pop("tokens_per_s")
        each["of_both_speeds"] = round(speed / whole, 3)
        if slower := each["times_slower"]:
            each["of_measured_speeds"] = round(speed / (equal * (1 + 1 / slower[-1]) / 2), 3)
        each["digest"] = "same" if each["digest"] == reference else each["digest"]
        told = "  ".join(f"{key} {value}" for key, value in each.items())
        print(f"{name:24s} {told}", file=sys.stderr)
    if asked.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
