"""Cordée's loop against a hand-written PyTorch loop, interleaved in the same processes.

    python benchmarks/overhead.py [--json] [--blocks N] [--precision fp32]

Both sides have the same model, batch, precision, threads and update rule (AdamW, fused), read the
same tokens, clip by global norm and write a line a step. Blocks of steps alternate; the ratio is
the median over blocks of hand-written time / Cordée's time, so more than 1 is faster than by hand.
`exact_cost` is the time run.exact adds on two processes; `memory` compares peak resident bytes of
separate processes, what the libraries take before training subtracted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cordee import Run, override
from cordee.begin import get_ready, lay_out_data
from cordee.build import RunState, build
from cordee.data.source import open_dataset
from cordee.desk import Desk
from cordee.dist.start import World
from cordee.fault.leave import Asked
from cordee.model.initial import initialise
from cordee.model.transformer import Transformer
from cordee.parts import Parts
from cordee.plan.cluster import local_cluster
from cordee.plan.plan import make_plan
from cordee.system import peak_bytes, resident_bytes
from cordee.testing import launch
from cordee.train import step

STEPS_A_BLOCK = 2


def settings(folder: str, ranks: int, precision: str, exact: bool = False) -> Run:
    """The run that both sides train: the default model and batch with AdamW."""
    return override(
        Run(),
        {
            "run.dir": folder, "run.steps": 100_000,
            "run.precision": precision, "optim.name": "adamw", "optim.lr": 1e-3,
            "optim.schedule": "constant", "launch.processes": ranks, "run.exact": exact,
            "launch.threads": max(1, (os.cpu_count() or 1) // ranks) if not exact else 1,
            "checkpoint.every": 0,
        },
    )  # fmt: skip


class Ours:
    """A Cordée run that can be stepped in blocks."""

    def __init__(self, run: Run, world: World) -> None:
        plan = make_plan(run, local_cluster(), processes=world.size)
        self.state: RunState = build(run, plan, world, lay_out_data(run), Parts())
        self.desk = Desk(self.state, Asked())

    def steps(self, count: int) -> None:
        """Runs `count` steps as `walk` does."""
        for _ in range(count):
            outcome = step(self.state, self.desk)
            self.desk.record(self.state, outcome)


class ByHand:
    """The loop that one would write without Cordée, in one place."""

    def __init__(self, run: Run, world: World) -> None:
        self.run, self.world = run, world
        model = Transformer(run.model, 256)
        initialise(model, run.initial, run.run.seed, run.model.layers)
        self.model = DistributedDataParallel(model) if world.size > 1 else model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.tokens = open_dataset(Path(run.run.dir) / "data", "train").slice(0, 4_000_000)
        self.random = np.random.default_rng(world.rank)
        self.log = open(Path(run.run.dir) / f"by-hand-{world.rank}.jsonl", "a")  # noqa: SIM115
        self.number = 0

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random windows from the memory map."""
        length, rows = self.run.data.sequence, self.run.batch.microbatch
        starts = self.random.integers(0, len(self.tokens) - length - 1, rows)
        windows = np.stack([self.tokens[s : s + length + 1] for s in starts]).astype(np.int64)
        both = torch.from_numpy(windows)
        return both[:, :-1], both[:, 1:]

    def steps(self, count: int) -> None:
        """Runs `count` steps: accumulate, all-reduce on the last microbatch, clip, update, log."""
        run = self.run
        mine = run.batch.microbatches // self.world.size
        tokens = mine * run.batch.microbatch * run.data.sequence
        for _ in range(count):
            began = time.perf_counter()
            total = torch.zeros(())
            for index in range(mine):
                x, y = self.batch()
                last = index == mine - 1
                if self.world.size > 1:
                    self.model.require_backward_grad_sync = last
                with torch.autocast("cpu", torch.bfloat16, enabled=run.run.precision == "bf16"):
                    loss = self.model(x, y) / tokens
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.number += 1
            if self.world.size > 1:
                dist.all_reduce(total)
            row = {
                "step": self.number,
                "loss": float(total) / self.world.size,
                "grad_norm": float(norm),
                "step_s": time.perf_counter() - began,
            }
            self.log.write(json.dumps(row) + "\n")
            self.log.flush()


def race(world: World, folder: str, blocks: int, against: str, precision: str) -> list[float]:
    """Alternates blocks of both sides; the ratio (other side / Cordée) of each block, on rank 0."""
    run = settings(folder, world.size, precision)
    if against == "exact":
        torch.set_num_threads(1)
        sides = [Ours(settings(folder, world.size, precision, exact=True), world), Ours(run, world)]
    else:
        sides = [Ours(run, world), ByHand(run, world)]
    for side in sides:
        side.steps(2)
    ratios = []
    for block in range(blocks):
        seconds = [0.0, 0.0]
        for turn in (0, 1) if block % 2 == 0 else (1, 0):
            if world.size > 1:
                dist.barrier()
            began = time.perf_counter()
            sides[turn].steps(STEPS_A_BLOCK)
            seconds[turn] = time.perf_counter() - began
        ratios.append(seconds[1] / seconds[0])
    return ratios


def memory_of(side: str, folder: str, precision: str) -> None:
    """Child process: peak bytes that training on one side adds."""
    run = settings(folder, 1, precision)
    torch.set_num_threads(run.launch.threads)
    world = World(0, 1, 0, "cpu", "", 0)
    before = resident_bytes()
    (Ours if side == "ours" else ByHand)(run, world).steps(6)
    print(json.dumps({"bytes": peak_bytes() - before}))


def memory(folder: str, precision: str) -> float:
    """Cordée's peak over the hand-written peak, each in its own process."""
    peaks = {}
    for side in ("ours", "by_hand"):
        command = [
            sys.executable, __file__, "--memory-of", side, "--folder", folder,
            "--precision", precision,
        ]  # fmt: skip
        runs = [
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for _ in range(3)
        ]
        peaks[side] = median(r["bytes"] for r in runs)
    return peaks["ours"] / peaks["by_hand"]


def main() -> None:
    """Runs all comparisons and prints ratios; the last line is one JSON object with --json."""
    parser = argparse.ArgumentParser(description="Cordée's loop against one written by hand")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--memory-of", default="")
    parser.add_argument("--folder", default="")
    asked = parser.parse_args()
    if asked.memory_of:
        memory_of(asked.memory_of, asked.folder, asked.precision)
        return
    with tempfile.TemporaryDirectory() as folder:
        ready = get_ready(settings(folder, 1, asked.precision))
        lay_out_data(ready.run)
        cores = os.cpu_count() or 1
        found = {}
        for name, ranks, against in (
            ("one_process", 1, "by_hand"),
            ("two_processes", 2, "by_hand"),
            ("exact", 2, "exact"),
        ):
            threads = max(1, cores // ranks)
            ratios = launch(
                race,
                folder,
                asked.blocks,
                against,
                asked.precision,
                ranks=ranks,
                threads=threads,
                deadline_s=900,
            )[0]
            found[name] = median(ratios)
            spread = f"{min(ratios):.3f} .. {max(ratios):.3f}"
            print(f"{name:<14} {found[name]:.3f}   blocks {spread}", flush=True)
        found["exact_cost"] = 1 / found.pop("exact") - 1
        found["memory"] = memory(folder, asked.precision)
        print(f"exact_cost     {found['exact_cost']:+.3f}   memory {found['memory']:.3f}")
    rounded = {k: round(v, 4) for k, v in found.items() if math.isfinite(v)}
    if asked.json:
        print(json.dumps(rounded))


if __name__ == "__main__":
    main()
