"""What one writes for torchft: a replica group of one process, a vote on each step, healing.

    python -m benchmarks.rival_torchft FOLDER RANK LIGHTHOUSE LEAST

A worker of `rivals.py`, run in an environment of torchft's own; no benchmark by itself and no part
of Cordée. Model, data and sleep are restarted.py's. LEAST is the least number of replica groups
that may commit a step: 1 goes on with half the batch, 2 waits for the other group. The first group
writes a row a step. It trains until it is killed. Gradients are averaged in one message by the
Manager: over gloo the package's DDP wrapper (0.2.0) ends the survivor with an AssertionError in
its hook when the other group dies during that message.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ReduceOp, TCPStore
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torchft.manager import Manager
from torchft.optim import OptimizerWrapper
from torchft.process_group import ProcessGroupGloo

from benchmarks.restarted import SLEEP_S, batch_loss, make_model, metrics_row

TIMEOUT, QUORUM_TIMEOUT = timedelta(seconds=5), timedelta(seconds=120)
HEARTBEAT_INTERVAL = timedelta(milliseconds=25)


def wait_for_groups(folder: Path, rank: int) -> None:
    """Waits until both groups of the first quorum are there; later ones find them noted."""
    (folder / f"there-{rank}").touch()
    while not all((folder / f"there-{group}").exists() for group in (0, 1)):
        time.sleep(0.005)


def main() -> None:
    """Trains until killed."""
    torch.set_num_threads(1)
    folder, rank, lighthouse, min_replicas = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5]
    model, inner_optimizer = make_model()

    def load_state(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        inner_optimizer.load_state_dict(state["optimizer"])

    def save_state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": inner_optimizer.state_dict()}

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    wait_for_groups(folder, rank)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT), load_state_dict=load_state, state_dict=save_state,
        min_replica_size=int(min_replicas), timeout=TIMEOUT, quorum_timeout=QUORUM_TIMEOUT, rank=0,
        world_size=1, store_addr="127.0.0.1", store_port=store.port, lighthouse_addr=lighthouse,
        replica_id=f"replica_{rank}", hostname="localhost", heartbeat_interval=HEARTBEAT_INTERVAL,
        init_sync=False,
    )  # fmt: skip
    optimizer = OptimizerWrapper(manager, inner_optimizer)
    with open(folder / "metrics.jsonl", "a", buffering=1) as metrics_file:
        while True:
            step = manager.current_step()
            optimizer.zero_grad()
            loss = batch_loss(model, step, rank)
            loss.backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            flat_gradients = parameters_to_vector(gradients)
            manager.allreduce(flat_gradients).wait()
            vector_to_parameters(flat_gradients, gradients)
            time.sleep(SLEEP_S)
            loss_sum = loss.detach().clone()
            manager.allreduce(loss_sum, reduce_op=ReduceOp.SUM).wait()
            optimizer.step()
            new_step = manager.current_step()
            if rank == 0 and new_step > step:
                participants = manager.num_participants()
                metrics_file.write(
                    metrics_row(new_step, loss_sum, manager._quorum_id, participants, [os.getpid()])
                )


if __name__ == "__main__":
    main()
