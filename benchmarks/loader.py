"""What the exact order costs: Cordée's loader against uniformly random windows, in one run.

Both sides deliver int64 tensors (batch, sequence + 1) from the same memory map and take turns. The
rival draws its random starts for each batch and gathers them in one indexed copy, the fastest of
eight ways tried. Not here: cold files, other libraries. Run: python benchmarks/loader.py [--json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cordee.data.corpora import stdlib_files
from cordee.data.dataset import TokenDataset, map_shard, open_dataset
from cordee.data.loader import TokenLoader
from cordee.data.order import SampleOrder
from cordee.data.prepare import prepare

CASES = ((1024, 32), (256, 16))
CORPUS_BYTES = 96 << 20
TURNS = 21
TURN_S = 0.15
TARGET = 0.95


def make_loader_side(
    source: TokenDataset, sequence: int, batch: int, prefetch: int
) -> Callable[[], int]:
    """A function that delivers one batch and returns its tokens; steps go on from call to call."""
    order = SampleOrder(seed=1, rows=source.rows(sequence), microbatch_rows=batch, microbatches=1)
    source.gather(np.arange(order.rows), sequence)  # touches every page of this map
    loader = TokenLoader(source, order, sequence, prefetch=prefetch)
    microbatches = range(1)
    step = -1

    def deliver() -> int:
        nonlocal step
        step += 1
        loader.begin(step, microbatches)
        return loader.microbatch(step, 0).numel()

    return deliver


def make_random_side(path: Path, sequence: int, batch: int) -> Callable[[], int]:
    """The rival: starts drawn per batch, one gather from the map, one conversion, no order."""
    tokens = map_shard(path)["tokens"]
    tokens.max()  # every page of this map is touched before the clock runs
    windows = np.lib.stride_tricks.sliding_window_view(tokens, sequence + 1)
    rng = np.random.default_rng(1)
    window_count = len(windows)

    def deliver() -> int:
        starts = rng.integers(0, window_count, batch)
        return torch.from_numpy(windows[starts].astype(np.int64)).numel()

    return deliver


def tokens_per_s(deliver: Callable[[], int]) -> float:
    """Tokens a second over one turn; the clock is read once in 50 batches."""
    tokens, start_s = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - start_s) < TURN_S:
        for _ in range(50):
            tokens += deliver()
    return tokens / elapsed_s


def compare(folder: Path, sequence: int, batch: int) -> dict[str, object]:
    """Alternating turns, who begins alternating too; the ratio is the median of paired turns."""
    source = open_dataset(folder, "train")
    sides = {
        "loader": make_loader_side(source, sequence, batch, prefetch=0),
        "random": make_random_side(folder / "train-00000.safetensors", sequence, batch),
        "loader_thread": make_loader_side(source, sequence, batch, prefetch=1),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, TURNS):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            turn_speed = tokens_per_s(sides[name])
            if turn >= 0:
                speeds[name].append(turn_speed)

    def ratio(name: str) -> float:
        pairs = zip(speeds[name], speeds["random"], strict=True)
        return round(
            statistics.median(loader_speed / random_speed for loader_speed, random_speed in pairs),
            3,
        )

    return {
        "sequence": sequence,
        "batch": batch,
        "mtokens_per_s": {
            name: [round(f(values) / 1e6) for f in (min, statistics.median, max)]
            for name, values in speeds.items()
        },
        "ratio": ratio("loader"),
        "ratio_thread": ratio("loader_thread"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        text = b"\n".join(path.read_bytes() for path in stdlib_files()).replace(b"\0", b"")
        corpus = Path(home, "corpus.txt")
        corpus.write_bytes(text * (CORPUS_BYTES // len(text)))
        prepare(str(corpus), Path(home, "data"), held_out=0.0, seed=1)
        cases = [compare(Path(home, "data"), *case) for case in CASES]
    result = {
        "benchmark": "loader",
        "machine": f"{platform.machine()}, torch {torch.__version__}, numpy {np.__version__}",
        "cases": cases,
        "ratios": {f"{case['sequence']}x{case['batch']}": case["ratio"] for case in cases},
        "target": TARGET,
        "met": all(case["ratio"] >= TARGET for case in cases),  # type: ignore[operator]
    }
    if not args.json:
        print(f"{'Mtokens/s: median (min-max)':>30} {'loader':>20} {'random windows':>20}", end="")
        print(f" {'ratio':>7} {'with thread':>20} {'ratio':>7}")
        for case in cases:
            cells = {
                name: f"{median_speed} ({lowest_speed}-{highest_speed})"
                for name, (lowest_speed, median_speed, highest_speed) in case[
                    "mtokens_per_s"
                ].items()  # type: ignore
            }
            print(f"sequence {case['sequence']:>5}, batch {case['batch']:>3}".rjust(30), end="")
            print(f" {cells['loader']:>20} {cells['random']:>20} {case['ratio']:>7}", end="")
            print(f" {cells['loader_thread']:>20} {case['ratio_thread']:>7}")
    print(json.dumps(result), file=sys.stdout)


if __name__ == "__main__":
    main()
