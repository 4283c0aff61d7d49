"""One large model on one device: Cordée's loop against FSDP2 and torch.compile written by hand.

    python benchmarks/gpu.py [--preset 1b] [--sequence 4096] [--microbatch 2] [--json]

Both sides train the same blocks from the same tokens in bf16 with compiled blocks and fused AdamW,
and take turns in one process; the ratio is the median over blocks of the hand-written time /
Cordée's, so more than 1 is faster than by hand. Peaks are of separate processes, one a side. By
hand is `fully_shard` on a mesh of one under autocast, the same arithmetic; `--hand mixed` gives it
FSDP2's bf16 policy instead, whose residual stream is bf16 too. `--device cpu --preset micro
--sequence 64 --compile none` tries the code where there is no GPU; its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from overhead import CordeeLoop
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from cordee import Run, override
from cordee.data.dataset import open_dataset
from cordee.dist.process_group import LaunchInfo, RankProcess, join_process_group
from cordee.hardware.system import peak_bytes
from cordee.launcher.prepare import prepare_dataset, resolve_config
from cordee.model.init_weights import init_weights
from cordee.model.transformer import Transformer
from cordee.planner.cluster import local_cluster
from cordee.planner.plan import Plan, make_plan

SIDES = ("cordee", "by hand")


def make_run(args: argparse.Namespace, folder: str) -> Run:
    """The run that both sides train."""
    return override(
        Run(),
        {
            "run.dir": folder, "run.steps": 100_000, "run.precision": "bf16",
            "run.compile": args.compile, "model.preset": args.preset,
            "data.sequence": args.sequence, "batch.microbatch": args.microbatch,
            "batch.microbatches": args.microbatches, "memory.recompute": args.recompute,
            "memory.loss_chunk": args.loss_chunk, "optim.name": "adamw", "optim.lr": 1e-4,
            "optim.schedule": "constant", "launch.processes": 1, "launch.device": args.device,
            "checkpoint.every": 0,
        },
    )  # fmt: skip


class HandwrittenFsdp:
    """FSDP2 on one device, compiled block by block, in one place."""

    def __init__(self, run: Run, process: RankProcess, is_mixed: bool) -> None:
        self.run, self.device, self.is_mixed = run, torch.device(process.device), is_mixed
        with self.device:
            model: Any = Transformer(run.model, run.model.vocabulary or 256)
        init_weights(model, run.initial, run.run.seed, run.model.layers)
        model.memory = run.memory
        mesh = init_device_mesh(self.device.type, (1,))
        dtype = torch.bfloat16 if is_mixed else None
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for block in model.blocks.values():
            if run.run.compile == "blocks":
                block.compile()
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.tokens = open_dataset(Path(run.run.dir) / "data", "train").read_tokens(0, 4_000_000)
        self.rng = np.random.default_rng(0)

    def steps(self, count: int) -> None:
        """Runs `count` steps: accumulate, reduce on the last microbatch, clip, update, read."""
        batch, length = self.run.batch, self.run.data.sequence
        token_count = batch.microbatches * batch.microbatch * length
        for _ in range(count):
            loss_sum = torch.zeros((), device=self.device)
            for index in range(batch.microbatches):
                starts = self.rng.integers(0, len(self.tokens) - length - 1, batch.microbatch)
                rows = np.stack([self.tokens[s : s + length + 1] for s in starts])
                windows = torch.from_numpy(rows.astype(np.int64)).to(self.device, non_blocking=True)
                self.model.set_requires_gradient_sync(index == batch.microbatches - 1)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=not self.is_mixed):
                    loss = self.model(windows[:, :-1], windows[:, 1:]) / token_count
                loss.backward()
                loss_sum += loss.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            float(loss_sum), float(grad_norm)


def make_side(
    name: str, run: Run, process: RankProcess, hand_mode: str
) -> CordeeLoop | HandwrittenFsdp:
    """One of SIDES, warmed up (compiled)."""
    loop = (
        CordeeLoop(run, process)
        if name == SIDES[0]
        else HandwrittenFsdp(run, process, hand_mode == "mixed")
    )
    loop.steps(3)
    return loop


def race(run: Run, plan: Plan, process: RankProcess, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn: the ratio of every block, and each side's fastest step."""
    sides = [make_side(name, run, process, args.hand) for name in SIDES]
    ratios, best_times_s = [], [float("inf")] * 2
    for block in range(args.blocks):
        times_s = [0.0, 0.0]
        for turn in (0, 1) if block % 2 == 0 else (1, 0):
            start_s = time.perf_counter()
            sides[turn].steps(args.steps)
            times_s[turn] = (time.perf_counter() - start_s) / args.steps
            best_times_s[turn] = min(best_times_s[turn], times_s[turn])
        ratios.append(times_s[1] / times_s[0])
    tokens = run.batch.microbatches * run.batch.microbatch * run.data.sequence
    prediction = plan.predicted
    result: dict[str, Any] = {"ratio": median(ratios), "low": min(ratios), "high": max(ratios)}
    result |= {"planned_step_s": prediction.step_s}
    for name, step_s in zip(SIDES, best_times_s, strict=True):
        mfu = prediction.flops / step_s / prediction.peak_flops if prediction.peak_flops else None
        result[name] = {"step_s": step_s, "tokens_per_s": tokens / step_s, "mfu": mfu}
    return result


def measure_memory(run: Run, process: RankProcess, args: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes of one side alone in this process."""
    loop = make_side(args.memory_of, run, process, args.hand)
    loop.steps(2)
    is_cuda = torch.device(process.device).type == "cuda"
    return {"bytes": torch.cuda.max_memory_allocated() if is_cuda else peak_bytes()}


def main() -> None:
    """Races, then measures each side's memory in a process of its own; prints one line each."""
    parser = argparse.ArgumentParser(description="one device, by Cordée and by hand")
    for flag, default in (
        ("preset", "1b"), ("device", "auto"), ("compile", "blocks"), ("recompute", "none"),
        ("hand", "autocast"), ("memory-of", ""), ("folder", ""),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", default=default)
    for flag, default_count in (
        ("sequence", 4096), ("microbatch", 2), ("microbatches", 4), ("loss-chunk", 0),
        ("blocks", 8), ("steps", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=default_count)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = resolve_config(make_run(args, args.folder or folder))
        prepare_dataset(run)
        plan = make_plan(run, local_cluster(), run.model.vocabulary or 256)
        with join_process_group(
            LaunchInfo(), plan.device, plan.threads, 600.0, force_group=True
        ) as process:
            if args.memory_of:
                print(json.dumps(measure_memory(run, process, args)))
                return
            result = race(run, plan, process, args)
        for name in SIDES:
            command = [sys.executable, *sys.argv, "--memory-of", name, "--folder", folder]
            child_result = subprocess.run(command, capture_output=True, text=True, check=True)
            result[name]["peak_bytes"] = json.loads(child_result.stdout.splitlines()[-1])["bytes"]
    print(f"ratio     {result['ratio']:.3f} ({result['low']:.3f}-{result['high']:.3f})")
    for name in SIDES:
        row = result[name]
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        print(
            f"{name:<9} {row['step_s'] * 1e3:.1f} ms a step, {row['tokens_per_s']:,.0f} tokens/s,"
            f" MFU {mfu}, peak {row['peak_bytes'] / 2**30:.2f} GiB"
        )
    print(f"planned   {result['planned_step_s'] * 1e3:.1f} ms a step")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
