"""What one writes for torchrun to restart: DDP, a checkpoint every 10 steps, all state in it.

    torchrun --standalone --nproc-per-node 2 --max-restarts 9 benchmarks/restarted.py FOLDER STEPS S

A worker of `rivals.py`, no benchmark by itself; S is the group's timeout. 8 x Linear(256) under DDP
over gloo, AdamW, data by step and rank, and a sleep of 50 ms in place of a larger model. The first
rank writes a row a step, in the same words as Cordée's rows (`quorum` is the number of restarts).
Needs torch alone: the other rivals' scripts take the model, the data and the loop from here.
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
from torch.optim import AdamW, Optimizer

WIDTH, BLOCKS, BATCH_ROWS, SLEEP_S, CHECKPOINT_EVERY = 256, 8, 16, 0.05, 10


def make_model() -> tuple[nn.Module, Optimizer]:
    """The same on every rank and at every start, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS)])
    return model, AdamW(model.parameters(), lr=1e-3)


def batch_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    """The loss of a batch that is a function of step and rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(BATCH_ROWS, WIDTH, generator=generator)
    return (model(x) - x).square().mean()


def metrics_row(step: int, loss: Tensor, generation: int, islands: int, pids: list[int]) -> str:
    """A committed step as a line of metrics.jsonl."""
    fields = {"step": step, "loss": float(loss), "quorum": generation, "islands": islands,
             "pids": pids, "elapsed_s": time.monotonic()}  # fmt: skip
    return json.dumps(fields) + "\n"


def train(
    model: nn.Module, optimizer: Optimizer, folder: Path, steps: int, generation: int
) -> None:
    """From the newest checkpoint to the last step, over the default group, which exists."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    pids: list[int] = [0] * world_size
    dist.all_gather_object(pids, os.getpid())
    checkpoint_path, step = folder / "checkpoint.pt", 0
    if checkpoint_path.exists():
        state = torch.load(checkpoint_path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    ddp_model = DistributedDataParallel(model)
    with open(folder / "metrics.jsonl", "a", buffering=1) as metrics_file:
        while step < steps:
            optimizer.zero_grad()
            loss = batch_loss(ddp_model, step, rank)
            loss.backward()
            time.sleep(SLEEP_S)
            optimizer.step()
            loss_sum = loss.detach()
            dist.all_reduce(loss_sum)
            step += 1
            if rank == 0:
                metrics_file.write(metrics_row(step, loss_sum, generation, world_size, pids))
                if step % CHECKPOINT_EVERY == 0:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    torch.save({**state, "step": step}, folder / "checkpoint.new")
                    os.replace(folder / "checkpoint.new", checkpoint_path)


def main() -> None:
    """A worker of an elastic launcher."""
    torch.set_num_threads(1)
    folder, steps, timeout_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    train(*make_model(), folder, steps, restarts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
