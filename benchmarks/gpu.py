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
from overhead import Ours
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from cordee import Run, override
from cordee.begin import lay_out_data, settle
from cordee.data.source import open_dataset
from cordee.dist.start import Launched, World, world
from cordee.model.initial import initialise
from cordee.model.transformer import Transformer
from cordee.plan.cluster import local_cluster
from cordee.plan.plan import Plan, make_plan
from cordee.system import peak_bytes

SIDES = ("cordee", "by hand")


def settings(asked: argparse.Namespace, folder: str) -> Run:
    """The run that both sides train."""
    return override(
        Run(),
        {
            "run.dir": folder, "run.steps": 100_000, "run.precision": "bf16",
            "run.compile": asked.compile, "model.preset": asked.preset,
            "data.sequence": asked.sequence, "batch.microbatch": asked.microbatch,
            "batch.microbatches": asked.microbatches, "memory.recompute": asked.recompute,
            "memory.loss_chunk": asked.loss_chunk, "optim.name": "adamw", "optim.lr": 1e-4,
            "optim.schedule": "constant", "launch.processes": 1, "launch.device": asked.device,
            "checkpoint.every": 0,
        },
    )  # fmt: skip


class ByHand:
    """FSDP2 on one device, compiled block by block, in one place."""

    def __init__(self, run: Run, here: World, mixed: bool) -> None:
        self.run, self.device, self.mixed = run, torch.device(here.device), mixed
        with self.device:
            model: Any = Transformer(run.model, run.model.vocabulary or 256)
        initialise(model, run.initial, run.run.seed, run.model.layers)
        model.memory = run.memory
        mesh = init_device_mesh(self.device.type, (1,))
        dtype = torch.bfloat16 if mixed else None
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
        self.tokens = open_dataset(Path(run.run.dir) / "data", "train").slice(0, 4_000_000)
        self.random = np.random.default_rng(0)

    def steps(self, count: int) -> None:
        """Runs `count` steps: accumulate, reduce on the last microbatch, clip, update, read."""
        batch, length = self.run.batch, self.run.data.sequence
        tokens = batch.microbatches * batch.microbatch * length
        for _ in range(count):
            total = torch.zeros((), device=self.device)
            for index in range(batch.microbatches):
                starts = self.random.integers(0, len(self.tokens) - length - 1, batch.microbatch)
                rows = np.stack([self.tokens[s : s + length + 1] for s in starts])
                both = torch.from_numpy(rows.astype(np.int64)).to(self.device, non_blocking=True)
                self.model.set_requires_gradient_sync(index == batch.microbatches - 1)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=not self.mixed):
                    loss = self.model(both[:, :-1], both[:, 1:]) / tokens
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            float(total), float(norm)


def side(name: str, run: Run, here: World, hand: str) -> Ours | ByHand:
    """One of SIDES, warmed up (compiled)."""
    made = Ours(run, here) if name == SIDES[0] else ByHand(run, here, hand == "mixed")
    made.steps(3)
    return made


def race(run: Run, plan: Plan, here: World, asked: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn: the ratio of every block, and each side's fastest step."""
    sides = [side(name, run, here, asked.hand) for name in SIDES]
    ratios, best = [], [float("inf")] * 2
    for block in range(asked.blocks):
        spent = [0.0, 0.0]
        for turn in (0, 1) if block % 2 == 0 else (1, 0):
            began = time.perf_counter()
            sides[turn].steps(asked.steps)
            spent[turn] = (time.perf_counter() - began) / asked.steps
            best[turn] = min(best[turn], spent[turn])
        ratios.append(spent[1] / spent[0])
    tokens = run.batch.microbatches * run.batch.microbatch * run.data.sequence
    told = plan.predicted
    found: dict[str, Any] = {"ratio": median(ratios), "low": min(ratios), "high": max(ratios)}
    found |= {"planned_step_s": told.step_s}
    for name, step_s in zip(SIDES, best, strict=True):
        mfu = told.flops / step_s / told.peak_flops if told.peak_flops else None
        found[name] = {"step_s": step_s, "tokens_per_s": tokens / step_s, "mfu": mfu}
    return found


def memory(run: Run, here: World, asked: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes of one side alone in this process."""
    made = side(asked.memory_of, run, here, asked.hand)
    made.steps(2)
    cuda = torch.device(here.device).type == "cuda"
    return {"bytes": torch.cuda.max_memory_allocated() if cuda else peak_bytes()}


def main() -> None:
    """Races, then measures each side's memory in a process of its own; prints one line each."""
    parser = argparse.ArgumentParser(description="one device, by Cordée and by hand")
    for flag, default in (
        ("preset", "1b"), ("device", "auto"), ("compile", "blocks"), ("recompute", "none"),
        ("hand", "autocast"), ("memory-of", ""), ("folder", ""),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", default=default)
    for flag, number in (
        ("sequence", 4096), ("microbatch", 2), ("microbatches", 4), ("loss-chunk", 0),
        ("blocks", 8), ("steps", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=number)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        run = settle(settings(asked, asked.folder or made))
        lay_out_data(run)
        plan = make_plan(run, local_cluster(), run.model.vocabulary or 256)
        with world(Launched(), plan.device, plan.threads, 600.0, always=True) as here:
            if asked.memory_of:
                print(json.dumps(memory(run, here, asked)))
                return
            found = race(run, plan, here, asked)
        for name in SIDES:
            command = [sys.executable, *sys.argv, "--memory-of", name, "--folder", made]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name]["peak_bytes"] = json.loads(done.stdout.splitlines()[-1])["bytes"]
    print(f"ratio     {found['ratio']:.3f} ({found['low']:.3f}-{found['high']:.3f})")
    for name in SIDES:
        row = found[name]
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        print(
            f"{name:<9} {row['step_s'] * 1e3:.1f} ms a step, {row['tokens_per_s']:,.0f} tokens/s,"
            f" MFU {mfu}, peak {row['peak_bytes'] / 2**30:.2f} GiB"
        )
    print(f"planned   {found['planned_step_s'] * 1e3:.1f} ms a step")
    if asked.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
