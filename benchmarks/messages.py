"""Gathers and scatters of sums by direct messages (dist/flat.py) against the library's own.

    python benchmarks/messages.py [--json] [--ranks 2,4] [--blocks N]

Same tensors, one thread a rank, blocks of calls that alternate in the same processes; the ratio is
the median over blocks of the library's time / direct time, so more than 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.dist.flat import gather_flat, scatter_flat
from cordee.dist.start import World
from cordee.testing import launch

PART_BYTES = [1 << power for power in (12, 14, 16, 18, 19, 20, 22)]
CALLS = 10


def seconds(call: Callable[[], object]) -> float:
    """Time of one call, all ranks having begun together."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS


def race(world: World, blocks: int) -> dict[str, list[float]]:
    """Name and size -> the median ratio, and the library's and our median microseconds."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    group, found = dist.group.WORLD, {}
    for size in PART_BYTES:
        part, whole = torch.randn(size // 4), torch.randn(world.size * size // 4)
        sides: dict[str, tuple[Any, Any, Tensor, Tensor]] = {
            "gather": (dist.all_gather_into_tensor, gather_flat, whole, part),
            "scatter of sums": (dist.reduce_scatter_tensor, scatter_flat, part, whole),
        }
        for name, (library, ours, *given) in sides.items():
            calls = [partial(side, *given, group=group) for side in (library, ours)]
            times = [[seconds(call) for call in calls] for _ in range(blocks + 1)][1:]
            ratio = median(theirs / direct for theirs, direct in times)
            medians = [1e6 * median(column) for column in zip(*times, strict=True)]
            found[f"{name}, {size >> 10} KiB"] = [ratio, *medians]
    return found


def main() -> None:
    """Prints a row for each collective, size and number of ranks; with --json one object at the
    end."""
    parser = argparse.ArgumentParser(description="direct messages against the library's")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--blocks", type=int, default=15)
    asked = parser.parse_args()
    found = {}
    for ranks in map(int, asked.ranks.split(",")):
        for name, row in launch(race, asked.blocks, ranks=ranks, deadline_s=400)[0].items():
            ratio, library, ours = row
            print(f"{name:<26}{ranks}  {ratio:5.2f}  {library:7.0f} -> {ours:6.0f} us", flush=True)
            found[f"{name} on {ranks}"] = [round(value, 3) for value in row]
    if asked.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
