"""Gathers and scatters of sums by direct messages (dist/collectives.py) against the library's own.

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

from cordee.dist.collectives import all_gather_flat, reduce_scatter_flat
from cordee.dist.process_group import RankProcess
from cordee.launcher.run_ranks import launch

SHARD_BYTES = [1 << power for power in (12, 14, 16, 18, 19, 20, 22)]
CALLS = 10


def time_call(call: Callable[[], object]) -> float:
    """Time of one call, all ranks having begun together."""
    dist.barrier()
    start_s = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start_s) / CALLS


def race(process: RankProcess, blocks: int) -> dict[str, list[float]]:
    """Name and size -> the median ratio, and the library's and our median microseconds."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    group, results = dist.group.WORLD, {}
    for shard_bytes in SHARD_BYTES:
        shard, full_tensor = (
            torch.randn(shard_bytes // 4),
            torch.randn(process.size * shard_bytes // 4),
        )
        sides: dict[str, tuple[Any, Any, Tensor, Tensor]] = {
            "gather": (dist.all_gather_into_tensor, all_gather_flat, full_tensor, shard),
            "scatter of sums": (
                dist.reduce_scatter_tensor,
                reduce_scatter_flat,
                shard,
                full_tensor,
            ),
        }
        for name, (library_call, direct_call, *tensors) in sides.items():
            calls = [partial(side, *tensors, group=group) for side in (library_call, direct_call)]
            times = [[time_call(timed_call) for timed_call in calls] for _ in range(blocks + 1)][1:]
            ratio = median(library_s / direct_s for library_s, direct_s in times)
            medians = [1e6 * median(column) for column in zip(*times, strict=True)]
            results[f"{name}, {shard_bytes >> 10} KiB"] = [ratio, *medians]
    return results


def main() -> None:
    """Prints a row for each collective, size and number of ranks; with --json one object at the
    end."""
    parser = argparse.ArgumentParser(description="direct messages against the library's")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--blocks", type=int, default=15)
    args = parser.parse_args()
    results = {}
    for rank_count in map(int, args.ranks.split(",")):
        for name, row in launch(race, args.blocks, ranks=rank_count, deadline_s=400)[0].items():
            ratio, library_us, direct_us = row
            print(
                f"{name:<26}{rank_count}  {ratio:5.2f}  {library_us:7.0f} -> {direct_us:6.0f} us",
                flush=True,
            )
            results[f"{name} on {rank_count}"] = [round(value, 3) for value in row]
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
