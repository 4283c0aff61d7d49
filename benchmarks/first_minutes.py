"""The first two minutes on this machine: the default run in an empty folder with an empty cache,
and how near plans come to the steps of twelve short runs (3 models, 1 and 2 processes, fp32, bf16).

    python -m benchmarks.first_minutes [--json] [--runs 3] [--no-train] [--no-plans]

Goals: first loss within 10 s of the command, everything within 120 s, evaluation and sample at most
a tenth of it, plans off by 15 % (median) and 40 % (worst). A busy machine makes every figure worse.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from cordee.planner.profile import local_host

MODELS = {
    "micro": ("model.preset=micro",),
    "tiny": ("model.preset=tiny",),
    "small": ("model.preset=small", "data.sequence=128", "batch.microbatch=1"),
}
MAX_STEPS, MIN_STEPS = 24, 4
"""Steps of a run at most and at least; between, SECONDS end it."""
RUN_LIMIT_S = 12.0
COMMAND = (sys.executable, "-m", "cordee", "train")


def first_run(folder: Path) -> dict[str, Any]:
    """`cordee train` as a new user gives it; the profile is measured too."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    run_folder = folder / "runs" / "tiny"
    start_s = time.perf_counter()
    process = subprocess.Popen(
        COMMAND, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    first_row_s, last_step_s, row_count = 0.0, 0.0, 0
    while process.poll() is None:
        time.sleep(0.02)
        metrics = run_folder / "metrics.jsonl"
        count = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if count > row_count:
            row_count, last_step_s = count, time.perf_counter() - start_s
            first_row_s = first_row_s or last_step_s
    total_s = time.perf_counter() - start_s
    assert process.stderr is not None
    stderr_text = process.stderr.read()
    if process.returncode:
        raise SystemExit(stderr_text)
    finish_event = json.loads((run_folder / "events.jsonl").read_text().splitlines()[-1])
    settings = tomllib.loads((run_folder / "run.toml").read_text())
    return {
        "seconds_to_first_loss": first_row_s,
        "seconds_total": total_s,
        "bits_per_byte": finish_event["held_out_bits_per_byte"],
        "table_bits_per_byte": finish_event["table_bits_per_byte"],
        "steps": finish_event["steps"],
        "precision": settings["run"]["precision"],
        "evaluation_share": (total_s - last_step_s) / total_s,
        "screen": stderr_text,
    }


def compare_plans(folder: Path) -> list[dict[str, Any]]:
    """A row for each of the twelve runs: seconds of a step as planned and as measured (median)."""
    rows = []
    for model, overrides in MODELS.items():
        for processes in (1, 2):
            for precision in ("fp32", "bf16"):
                name = f"{model}-{processes}-{precision}"
                command = [
                    *COMMAND, *overrides, f"run.dir={folder / name}", f"run.precision={precision}",
                    f"launch.processes={processes}", f"run.steps={MAX_STEPS}",
                    f"run.minutes={RUN_LIMIT_S / 60}", "evaluate.tokens=0", "evaluate.sample=0",
                    "checkpoint.every=0", "fault.spares=0",
                ]  # fmt: skip
                subprocess.run(command, check=True, capture_output=True)
                plan = json.loads((folder / name / "plan.json").read_text())
                lines = (folder / name / "metrics.jsonl").read_text().splitlines()
                step_times_s = [json.loads(line)["step_s"] for line in lines]
                steady_times_s = step_times_s[min(MIN_STEPS, len(step_times_s) - 1) :]
                planned_s, measured_s = (
                    plan["predicted"]["step_s"],
                    statistics.median(steady_times_s),
                )
                rows.append(
                    {
                        "run": name, "threads": plan["threads"], "planned_s": planned_s,
                        "measured_s": measured_s, "error": abs(planned_s / measured_s - 1),
                        "inside": plan["predicted"]["low_s"] <= measured_s
                        <= plan["predicted"]["high_s"],
                    }
                )  # fmt: skip
    return rows


def main() -> None:
    """Prints a table, or with --json one object in the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=1, help="default runs; the median counts")
    parser.add_argument("--no-train", action="store_true")
    parser.add_argument("--no-plans", action="store_true")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": f"{local_host().cpu}, {platform.python_version()}"}
    with tempfile.TemporaryDirectory(prefix="cordee-first-") as home:
        runs = []
        for index in range(0 if args.no_train else args.runs):
            folder = Path(home) / f"first{index}"
            folder.mkdir()
            runs.append(first_run(folder))
            print(runs[-1].pop("screen"), file=sys.stderr)
        if runs:
            median_run = sorted(runs, key=lambda run: run["bits_per_byte"])[len(runs) // 2]
            result |= median_run
        rows = [] if args.no_plans else compare_plans(Path(home))
    for row in rows:
        print(
            f"{row['run']:<16}{row['threads']} threads  planned {row['planned_s'] * 1e3:9.1f} ms"
            f"  measured {row['measured_s'] * 1e3:9.1f} ms"
            f"  ratio {row['measured_s'] / row['planned_s']:.2f}"
            f"  {'inside' if row['inside'] else 'outside'}",
            file=sys.stderr,
        )
    if rows:
        errors = [row["error"] for row in rows]
        result["prediction_error_median"] = statistics.median(errors)
        result["prediction_error_worst"] = max(errors)
    if args.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{key:<26}{value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
