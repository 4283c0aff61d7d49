"""Every layout of Cordée against the same layout written by hand, and what memory levers cost.

    python benchmarks/layouts.py [--json] [--blocks N] [--precision bf16] [--only NAME;NAME]

Both sides have the same blocks, batch, precision, one thread a rank and AdamW, and take turns in
the same processes; the ratio is the median over blocks of the other side's time / Cordée's, so more
than 1 is faster than by hand (`by_hand.py`). Levers are runs of Cordée against the run without:
time, and the most bytes alive in a step beside what lives between steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from statistics import median
from typing import Any

import torch.distributed as dist
from by_hand import HandwrittenLayout
from overhead import CordeeLoop
from torch.profiler import ProfilerActivity, profile

from cordee import Run, override
from cordee.dist.process_group import RankProcess
from cordee.launcher.prepare import prepare_dataset, prepare_run
from cordee.launcher.run_ranks import launch

BASE_OVERRIDES: dict[str, Any] = {
    "run.steps": 100_000, "model.layers": 4, "model.width": 256, "model.heads": 4,
    "data.sequence": 256, "batch.microbatch": 2, "batch.microbatches": 4, "optim.name": "adamw",
    "optim.lr": 1e-3, "optim.schedule": "constant", "launch.threads": 1, "checkpoint.every": 0,
}  # fmt: skip
"""What all runs share: 3.3 M parameters, 2,048 tokens a step."""

MOE_OVERRIDES = {"model.moe.experts": 8, "model.moe.active": 2}

Degrees = dict[str, int]
LAYOUTS: dict[str, tuple[Degrees, dict[str, Any]]] = {
    "islands": ({"islands": 0}, {}),
    "shard zero=1": ({"shard": 0}, {"layout.zero": 1}),
    "shard zero=3": ({"shard": 0}, {"layout.zero": 3}),
    "shard zero=3, last sync": ({"shard": 0}, {"layout.zero": 3}),
    "tensor": ({"tensor": 0}, {}),
    "pipeline": ({"pipeline": 0}, {}),
    "context": ({"context": 0}, {}),
    "expert": ({"expert": 0}, MOE_OVERRIDES),
}
"""Name -> (axes, words); a degree of 0 is the number of processes."""

LAYOUT_PAIRS: dict[str, tuple[Degrees, dict[str, Any]]] = {
    "shard x tensor": ({"shard": 2, "tensor": 2}, {"layout.zero": 1}),
    "pipeline x tensor": ({"pipeline": 2, "tensor": 2}, {}),
    "islands x shard": ({"islands": 2, "shard": 2}, {"layout.zero": 1}),
}

LARGE_VOCABULARY = {"model.vocabulary": 8192}
MEMORY_LEVERS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "recompute=selective": (1, {}, {"memory.recompute": "selective"}),
    "recompute=full": (1, {}, {"memory.recompute": "full"}),
    "recompute=full, every 2nd": (1, {}, {"memory.recompute": "full", "memory.recompute_every": 2}),
    "loss_chunk=128, 8192 words": (
        1,
        LARGE_VOCABULARY,
        {**LARGE_VOCABULARY, "memory.loss_chunk": 128},
    ),
    "compile=blocks": (1, {}, {"run.compile": "blocks"}),
    "compile=blocks, recompute=full": (
        1,
        {},
        {"run.compile": "blocks", "memory.recompute": "full"},
    ),
    "shard=2 zero=2": (
        2,
        {"layout.shard": 2, "layout.zero": 1},
        {"layout.shard": 2, "layout.zero": 2},
    ),
    "shard=2 zero=3": (
        2,
        {"layout.shard": 2, "layout.zero": 1},
        {"layout.shard": 2, "layout.zero": 3},
    ),
}
"""Name -> (processes, the run without, the run with)."""


def make_run(folder: str, precision: str, overrides: dict[str, Any]) -> Run:
    """A run of MODEL with `overrides`."""
    return override(
        Run(), {**BASE_OVERRIDES, "run.dir": folder, "run.precision": precision, **overrides}
    )


def race(sides: list[Any], process: RankProcess, blocks: int, steps: int) -> dict[str, list[float]]:
    """Time of the second side / time of the first, in each block of `steps` steps: by the
    clock, and of this rank's processor (which a busy machine disturbs less)."""
    ratios: dict[str, list[float]] = {"ratios": [], "cpu": []}
    for block in range(blocks):
        times_s = [(0.0, 0.0), (0.0, 0.0)]
        for turn in (0, 1) if block % 2 == 0 else (1, 0):
            if process.size > 1:
                dist.barrier()
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            sides[turn].steps(steps)
            times_s[turn] = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        ratios["ratios"].append(times_s[1][0] / times_s[0][0])
        ratios["cpu"].append(times_s[1][1] / times_s[0][1])
    return ratios


def compare_layout(
    process: RankProcess, folder: str, precision: str, name: str, blocks: int, steps: int
) -> dict[str, Any]:
    """One layout: ratios of blocks, and tokens per second of Cordée's fastest."""
    degrees, overrides = {**LAYOUTS, **LAYOUT_PAIRS}[name]
    degrees = {axis: degree or process.size for axis, degree in degrees.items()}
    axes = {f"layout.{axis}": degree for axis, degree in degrees.items()}
    run = make_run(folder, precision, {**overrides, **axes, "launch.processes": process.size})
    sync_each = overrides.get("layout.zero") == 3 and "last" not in name
    sides = [CordeeLoop(run, process), HandwrittenLayout(run, process, degrees, sync_each)]
    for side in sides:
        side.steps(2)
    ratios = race(sides, process, blocks, steps)
    start_s = time.perf_counter()
    sides[0].steps(steps)
    return {**ratios, "step_s": (time.perf_counter() - start_s) / steps}


def compare_lever(
    process: RankProcess, folder: str, precision: str, name: str, blocks: int, steps: int
) -> dict[str, Any]:
    """One lever: ratios (without / with), peaks in bytes, and the time of the first steps."""
    _, base_overrides, lever_overrides = MEMORY_LEVERS[name]
    size_overrides = {"launch.processes": process.size}
    sides, first_s, peaks = [], [], []
    for overrides in (lever_overrides, base_overrides):
        side = CordeeLoop(make_run(folder, precision, {**overrides, **size_overrides}), process)
        start_s = time.perf_counter()
        side.steps(2)
        first_s.append(time.perf_counter() - start_s)
        sides.append(side)
    ratios = race(sides, process, blocks, steps)
    for side in sides:
        peaks.append(measure_peak_bytes(side))
    return {**ratios, "first_s": first_s[0] - first_s[1], "peaks": peaks}


def measure_peak_bytes(side: CordeeLoop) -> int:
    """Most bytes that a step has alive at once, beside what was alive before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        side.steps(1)
    events = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    live_bytes = peak = 0
    allocations = (e for e in events if e.name() == "[memory]")
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        live_bytes += event.nbytes()
        peak = max(peak, live_bytes)
    return peak


def print_row(name: str, rank_count: int, measurement: dict[str, Any]) -> dict[str, Any]:
    """Prints a row, and returns it for --json."""
    ratios = measurement.pop("ratios")
    row = {"ratio": median(ratios), "low": min(ratios), "high": max(ratios)}
    row |= {**measurement, "cpu": median(measurement["cpu"])}
    text = f"{name:<32}{rank_count}  {row['ratio']:.3f} ({row['low']:.3f}-{row['high']:.3f})"
    text += f"  processor {row['cpu']:.3f}"
    if "step_s" in row:
        text += f"  {row['step_s'] * 1e3:.0f} ms a step"
    if "peaks" in row:
        lever_bytes, base_bytes = row["peaks"]
        text += f"  {lever_bytes / 2**20:.1f} of {base_bytes / 2**20:.1f} MiB"
        text += f"  first steps +{row['first_s']:.1f} s"
    print(text, flush=True)
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
    """Runs what is asked for and prints a row each; the last line is one JSON with --json."""
    parser = argparse.ArgumentParser(description="layouts and levers against those by hand")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precision", default="fp32", choices=("bf16", "fp32"))
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument(
        "--only", default="", help="names, separated by semicolons; layouts, levers for all of them"
    )
    args = parser.parse_args()
    selection = [name.strip() for name in args.only.split(";") if name]
    rank_counts = [int(count) for count in args.ranks.split(",")]
    jobs: list[tuple[Any, str, int]] = [
        *((compare_layout, name, count) for count in rank_counts for name in LAYOUTS),
        *((compare_layout, name, 4) for name in LAYOUT_PAIRS if 4 in rank_counts),
        *((compare_lever, name, MEMORY_LEVERS[name][0]) for name in MEMORY_LEVERS),
    ]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare_dataset(prepare_run(make_run(folder, args.precision, {"launch.processes": 1})).run)
        for function, name, count in jobs:
            kind = "layouts" if function is compare_layout else "levers"
            if selection and name not in selection and kind not in selection:
                continue
            arguments = (folder, args.precision, name, args.blocks, args.steps)
            rows = launch(function, *arguments, ranks=count, threads=1, deadline_s=900)
            results[f"{name} on {count}"] = print_row(name, count, rows[0])
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
