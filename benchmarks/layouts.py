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
from by_hand import ByHand
from overhead import Ours
from torch.profiler import ProfilerActivity, profile

from cordee import Run, override
from cordee.begin import get_ready, lay_out_data
from cordee.dist.start import World
from cordee.testing import launch

MODEL: dict[str, Any] = {
    "run.steps": 100_000, "model.layers": 4, "model.width": 256, "model.heads": 4,
    "data.sequence": 256, "batch.microbatch": 2, "batch.microbatches": 4, "optim.name": "adamw",
    "optim.lr": 1e-3, "optim.schedule": "constant", "launch.threads": 1, "checkpoint.every": 0,
}  # fmt: skip
"""What all runs share: 3.3 M parameters, 2,048 tokens a step."""

MIXED = {"model.moe.experts": 8, "model.moe.active": 2}

Degrees = dict[str, int]
LAYOUTS: dict[str, tuple[Degrees, dict[str, Any]]] = {
    "islands": ({"islands": 0}, {}),
    "shard zero=1": ({"shard": 0}, {"layout.zero": 1}),
    "shard zero=3": ({"shard": 0}, {"layout.zero": 3}),
    "shard zero=3, last sync": ({"shard": 0}, {"layout.zero": 3}),
    "tensor": ({"tensor": 0}, {}),
    "pipeline": ({"pipeline": 0}, {}),
    "context": ({"context": 0}, {}),
    "expert": ({"expert": 0}, MIXED),
}
"""Name -> (axes, words); a degree of 0 is the number of processes."""

PAIRS: dict[str, tuple[Degrees, dict[str, Any]]] = {
    "shard x tensor": ({"shard": 2, "tensor": 2}, {"layout.zero": 1}),
    "pipeline x tensor": ({"pipeline": 2, "tensor": 2}, {}),
    "islands x shard": ({"islands": 2, "shard": 2}, {"layout.zero": 1}),
}

WIDE = {"model.vocabulary": 8192}
LEVERS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "recompute=selective": (1, {}, {"memory.recompute": "selective"}),
    "recompute=full": (1, {}, {"memory.recompute": "full"}),
    "recompute=full, every 2nd": (1, {}, {"memory.recompute": "full", "memory.recompute_every": 2}),
    "loss_chunk=128, 8192 words": (1, WIDE, {**WIDE, "memory.loss_chunk": 128}),
    "compile=blocks": (1, {}, {"run.compile": "blocks"}),
    "compile=blocks, recompute=full": (
        1, {}, {"run.compile": "blocks", "memory.recompute": "full"}
    ),
    "shard=2 zero=2": (
        2, {"layout.shard": 2, "layout.zero": 1}, {"layout.shard": 2, "layout.zero": 2}
    ),
    "shard=2 zero=3": (
        2, {"layout.shard": 2, "layout.zero": 1}, {"layout.shard": 2, "layout.zero": 3}
    ),
}  # fmt: skip
"""Name -> (processes, the run without, the run with)."""


def settings(folder: str, precision: str, words: dict[str, Any]) -> Run:
    """A run of MODEL with `words`."""
    return override(Run(), {**MODEL, "run.dir": folder, "run.precision": precision, **words})


def race(sides: list[Any], world: World, blocks: int, steps: int) -> dict[str, list[float]]:
    """Time of the second side / time of the first, in each block of `steps` steps: by the clock,
    and of this rank's processor (which a busy machine disturbs less)."""
    ratios: dict[str, list[float]] = {"ratios": [], "cpu": []}
    for block in range(blocks):
        seconds = [(0.0, 0.0), (0.0, 0.0)]
        for turn in (0, 1) if block % 2 == 0 else (1, 0):
            if world.size > 1:
                dist.barrier()
            began, busy = time.perf_counter(), time.process_time()
            sides[turn].steps(steps)
            seconds[turn] = time.perf_counter() - began, time.process_time() - busy
        ratios["ratios"].append(seconds[1][0] / seconds[0][0])
        ratios["cpu"].append(seconds[1][1] / seconds[0][1])
    return ratios


def against_hand(
    world: World, folder: str, precision: str, name: str, blocks: int, steps: int
) -> dict[str, Any]:
    """One layout: ratios of blocks, and tokens per second of Cordée's fastest."""
    degrees, words = {**LAYOUTS, **PAIRS}[name]
    degrees = {axis: degree or world.size for axis, degree in degrees.items()}
    axes = {f"layout.{axis}": degree for axis, degree in degrees.items()}
    run = settings(folder, precision, {**words, **axes, "launch.processes": world.size})
    sync_each = words.get("layout.zero") == 3 and "last" not in name
    sides = [Ours(run, world), ByHand(run, world, degrees, sync_each)]
    for side in sides:
        side.steps(2)
    ratios = race(sides, world, blocks, steps)
    began = time.perf_counter()
    sides[0].steps(steps)
    return {**ratios, "step_s": (time.perf_counter() - began) / steps}


def against_none(
    world: World, folder: str, precision: str, name: str, blocks: int, steps: int
) -> dict[str, Any]:
    """One lever: ratios (without / with), peaks in bytes, and the time of the first steps."""
    _, without, words = LEVERS[name]
    size = {"launch.processes": world.size}
    sides, first_s, peaks = [], [], []
    for one in (words, without):
        side = Ours(settings(folder, precision, {**one, **size}), world)
        began = time.perf_counter()
        side.steps(2)
        first_s.append(time.perf_counter() - began)
        sides.append(side)
    ratios = race(sides, world, blocks, steps)
    for side in sides:
        peaks.append(peak_bytes(side))
    return {**ratios, "first_s": first_s[0] - first_s[1], "peaks": peaks}


def peak_bytes(side: Ours) -> int:
    """Most bytes that a step has alive at once, beside what was alive before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        side.steps(1)
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    changes = (e for e in events if e.name() == "[memory]")
    for event in sorted(changes, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def tell(name: str, ranks: int, found: dict[str, Any]) -> dict[str, Any]:
    """Prints a row, and returns it for --json."""
    ratios = found.pop("ratios")
    row = {"ratio": median(ratios), "low": min(ratios), "high": max(ratios)}
    row |= {**found, "cpu": median(found["cpu"])}
    text = f"{name:<32}{ranks}  {row['ratio']:.3f} ({row['low']:.3f}-{row['high']:.3f})"
    text += f"  processor {row['cpu']:.3f}"
    if "step_s" in row:
        text += f"  {row['step_s'] * 1e3:.0f} ms a step"
    if "peaks" in row:
        with_, without = row["peaks"]
        text += f"  {with_ / 2**20:.1f} of {without / 2**20:.1f} MiB"
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
    asked = parser.parse_args()
    only = [name.strip() for name in asked.only.split(";") if name]
    ranks = [int(count) for count in asked.ranks.split(",")]
    jobs: list[tuple[Any, str, int]] = [
        *((against_hand, name, count) for count in ranks for name in LAYOUTS),
        *((against_hand, name, 4) for name in PAIRS if 4 in ranks),
        *((against_none, name, LEVERS[name][0]) for name in LEVERS),
    ]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        lay_out_data(get_ready(settings(folder, asked.precision, {"launch.processes": 1})).run)
        for function, name, count in jobs:
            kind = "layouts" if function is against_hand else "levers"
            if only and name not in only and kind not in only:
                continue
            given = (folder, asked.precision, name, asked.blocks, asked.steps)
            rows = launch(function, *given, ranks=count, threads=1, deadline_s=900)
            found[f"{name} on {count}"] = tell(name, count, rows[0])
    if asked.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
