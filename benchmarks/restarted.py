"""What one writes for torchrun to restart: DDP, a checkpoint every 10 steps, all state in it.

    torchrun --standalone --nproc-per-node 2 --max-restarts 9 benchmarks/restarted.py FOLDER STEPS

A worker of `recovery.py`, no benchmark by itself. 8 x Linear(256) under DDP over gloo, AdamW, data
by step and rank, and a sleep of 50 ms in place of a larger model. The first rank writes a row a
step, in the same words as Cordée's rows (`quorum` is the number of restarts).
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

WIDTH, BLOCKS, ROWS, SLEEP_S, EVERY = 256, 8, 16, 0.05, 10


def make_model() -> nn.Module:
    """The same on every rank and at every start."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS)])


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    """The loss of a batch that is a function of step and rank."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(ROWS, WIDTH, generator=random)
    return (model(x) - x).square().mean()


def main() -> None:
    """Trains from the newest checkpoint to the last step."""
    torch.set_num_threads(1)
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", timeout=timedelta(seconds=float(sys.argv[3])))
    rank, size = dist.get_rank(), dist.get_world_size()
    pids: list[int] = [0] * size
    dist.all_gather_object(pids, os.getpid())
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    kept, step = folder / "checkpoint.pt", 0
    if kept.exists():
        state = torch.load(kept)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    parallel = DistributedDataParallel(model)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    with open(folder / "metrics.jsonl", "a", buffering=1) as rows:
        while step < steps:
            loss = loss_of(parallel, step, rank)
            loss.backward()
            time.sleep(SLEEP_S)
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach()
            dist.all_reduce(total)
            step += 1
            if rank == 0:
                row = {"step": step, "loss": float(total), "quorum": restarts, "islands": size,
                       "pids": pids}  # fmt: skip
                rows.write(json.dumps(row) + "\n")
                if step % EVERY == 0:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    torch.save({**state, "step": step}, folder / "checkpoint.new")
                    os.replace(folder / "checkpoint.new", kept)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
