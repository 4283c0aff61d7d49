"""Cordée's loop against a hand-written PyTorch loop, interleaved in the same processes.

    python benchmarks/overhead.py [--json] [--blocks N] [--precision fp32]

Both sides have the same model, batch, precision, threads and update rule (AdamW, fused), read the
same tokens, clip by global norm and write a line a step. Blocks of steps alternate; the ratio is
the median over blocks of hand-written time / Cordée's time, so more than 1 is faster than by hand.
`exact_cost` is the time run.exact adds on two processes; `memory_ratio` compares peak resident
bytes of separate processes, what the libraries take before training subtracted.
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
from cordee.data.dataset import open_dataset
from cordee.dist.process_group import RankProcess
from cordee.hardware.system import peak_bytes, resident_bytes
from cordee.launcher.prepare import prepare_dataset, prepare_run
from cordee.launcher.run_ranks import launch
from cordee.model.init_weights import init_weights
from cordee.model.transformer import Transformer
from cordee.planner.cluster import local_cluster
from cordee.planner.plan import make_plan
from cordee.training.run_logger import RunLogger
from cordee.training.trainer import Trainer
from cordee.training.user_parts import Parts

STEPS_PER_BLOCK = 2


def make_run(folder: str, rank_count: int, precision: str, exact: bool = False) -> Run:
    """The run that both sides train: the default model and batch with AdamW."""
    return override(
        Run(),
        {
            "run.dir": folder, "run.steps": 100_000,
            "run.precision": precision, "optim.name": "adamw", "optim.lr": 1e-3,
            "optim.schedule": "constant", "launch.processes": rank_count, "run.exact": exact,
            "launch.threads": max(1, (os.cpu_count() or 1) // rank_count) if not exact else 1,
            "checkpoint.every": 0,
        },
    )  # fmt: skip


class CordeeLoop:
    """A Cordée run that can be stepped in blocks."""

    def __init__(self, run: Run, process: RankProcess) -> None:
        plan = make_plan(run, local_cluster(), processes=process.size)
        self.trainer = Trainer(run, plan, process, prepare_dataset(run), Parts())
        self.trainer.logger = RunLogger(run, process)

    def steps(self, count: int) -> None:
        """Runs `count` steps, each with its record."""
        for _ in range(count):
            self.trainer.train_step()


class HandwrittenLoop:
    """The loop that one would write without Cordée, in one place."""

    def __init__(self, run: Run, process: RankProcess) -> None:
        self.run, self.process = run, process
        model = Transformer(run.model, 256)
        init_weights(model, run.initial, run.run.seed, run.model.layers)
        self.model = DistributedDataParallel(model) if process.size > 1 else model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.tokens = open_dataset(Path(run.run.dir) / "data", "train").read_tokens(0, 4_000_000)
        self.rng = np.random.default_rng(process.rank)
        self.log_file = open(Path(run.run.dir) / f"by-hand-{process.rank}.jsonl", "a")  # noqa: SIM115
        self.step_count = 0

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random windows from the memory map."""
        length, rows = self.run.data.sequence, self.run.batch.microbatch
        starts = self.rng.integers(0, len(self.tokens) - length - 1, rows)
        windows = np.stack([self.tokens[s : s + length + 1] for s in starts]).astype(np.int64)
        tokens = torch.from_numpy(windows)
        return tokens[:, :-1], tokens[:, 1:]

    def steps(self, count: int) -> None:
        """Runs `count` steps: accumulate, all-reduce on the last microbatch, clip, update, log."""
        run = self.run
        local_microbatches = run.batch.microbatches // self.process.size
        tokens = local_microbatches * run.batch.microbatch * run.data.sequence
        for _ in range(count):
            start_s = time.perf_counter()
            loss_sum = torch.zeros(())
            for index in range(local_microbatches):
                x, y = self.next_batch()
                is_last = index == local_microbatches - 1
                if self.process.size > 1:
                    self.model.require_backward_grad_sync = is_last
                with torch.autocast("cpu", torch.bfloat16, enabled=run.run.precision == "bf16"):
                    loss = self.model(x, y) / tokens
                loss.backward()
                loss_sum += loss.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step_count += 1
            if self.process.size > 1:
                dist.all_reduce(loss_sum)
            row = {
                "step": self.step_count,
                "loss": float(loss_sum) / self.process.size,
                "grad_norm": float(grad_norm),
                "step_s": time.perf_counter() - start_s,
            }
            self.log_file.write(json.dumps(row) + "\n")
            self.log_file.flush()


def race(
    process: RankProcess, folder: str, blocks: int, opponent: str, precision: str
) -> list[float]:
    """Alternates blocks of both sides; the ratio (other side / Cordée) of each block, on rank 0."""
    run = make_run(folder, process.size, precision)
    if opponent == "exact":
        torch.set_num_threads(1)
        sides = [
            CordeeLoop(make_run(folder, process.size, precision, exact=True), process),
            CordeeLoop(run, process),
        ]
    else:
        sides = [CordeeLoop(run, process), HandwrittenLoop(run, process)]
    for side in sides:
        side.steps(2)
    ratios = []
    for block in range(blocks):
        times_s = [0.0, 0.0]
        for turn in (0, 1) if block % 2 == 0 else (1, 0):
            if process.size > 1:
                dist.barrier()
            start_s = time.perf_counter()
            sides[turn].steps(STEPS_PER_BLOCK)
            times_s[turn] = time.perf_counter() - start_s
        ratios.append(times_s[1] / times_s[0])
    return ratios


def print_side_memory(side: str, folder: str, precision: str) -> None:
    """Child process: peak bytes that training on one side adds."""
    run = make_run(folder, 1, precision)
    torch.set_num_threads(run.launch.threads)
    process = RankProcess(0, 1, 0, "cpu", "", 0)
    start_bytes = resident_bytes()
    (CordeeLoop if side == "ours" else HandwrittenLoop)(run, process).steps(6)
    print(json.dumps({"bytes": peak_bytes() - start_bytes}))


def memory_ratio(folder: str, precision: str) -> float:
    """Cordée's peak over the hand-written peak, each in its own process."""
    peaks = {}
    for side in ("ours", "by_hand"):
        command = [
            sys.executable, __file__, "--memory-of", side, "--folder", folder,
            "--precision", precision,
        ]  # fmt: skip
        rows = [
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for _ in range(3)
        ]
        peaks[side] = median(row["bytes"] for row in rows)
    return peaks["ours"] / peaks["by_hand"]


def main() -> None:
    """Runs all comparisons and prints ratios; the last line is one JSON object with --json."""
    parser = argparse.ArgumentParser(description="Cordée's loop against one written by hand")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--memory-of", default="")
    parser.add_argument("--folder", default="")
    args = parser.parse_args()
    if args.memory_of:
        print_side_memory(args.memory_of, args.folder, args.precision)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepared_run = prepare_run(make_run(folder, 1, args.precision))
        prepare_dataset(prepared_run.run)
        cores = os.cpu_count() or 1
        results = {}
        for name, rank_count, opponent in (
            ("one_process", 1, "by_hand"),
            ("two_processes", 2, "by_hand"),
            ("exact", 2, "exact"),
        ):
            threads = max(1, cores // rank_count)
            ratios = launch(
                race,
                folder,
                args.blocks,
                opponent,
                args.precision,
                ranks=rank_count,
                threads=threads,
                deadline_s=900,
            )[0]
            results[name] = median(ratios)
            spread_text = f"{min(ratios):.3f} .. {max(ratios):.3f}"
            print(f"{name:<14} {results[name]:.3f}   blocks {spread_text}", flush=True)
        results["exact_cost"] = 1 / results.pop("exact") - 1
        results["memory"] = memory_ratio(folder, args.precision)
        print(f"exact_cost     {results['exact_cost']:+.3f}   memory {results['memory']:.3f}")
    rounded_results = {k: round(v, 4) for k, v in results.items() if math.isfinite(v)}
    if args.json:
        print(json.dumps(rounded_results))


if __name__ == "__main__":
    main()
