"""What one writes for nvidia-resiliency-ext: the training function, wrapped to restart in place.

    RANK=r WORLD_SIZE=3 MASTER_ADDR=... MASTER_PORT=... python -m benchmarks.rival_nvrx FOLDER STEPS

A worker of `rivals.py`, run in an environment of the extension's own; no benchmark by itself and no
part of Cordée. As the extension's guide has it: model, optimizer and store are made once and live
across restarts, the state is read from the newest checkpoint (restarted.py's), two ranks are active
and the third is a reserve. Intervals are as short as the wrapper takes them on two cores.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from nvidia_resiliency_ext import inprocess
from nvidia_resiliency_ext.inprocess.rank_assignment import MaxActiveWorldSize, ShiftRanks
from torch import nn
from torch.optim import Optimizer

from benchmarks.restarted import make_model, train

TIMEOUT, ACTIVE_RANKS = timedelta(seconds=10), 2
POLL_INTERVAL, HEARTBEAT_INTERVAL = timedelta(milliseconds=50), timedelta(milliseconds=250)


@inprocess.Wrapper(
    store_kwargs={"port": int(os.environ["MASTER_PORT"]) + 1},
    rank_assignment=inprocess.Compose(MaxActiveWorldSize(ACTIVE_RANKS), ShiftRanks()),
    monitor_thread_interval=POLL_INTERVAL,
    monitor_process_interval=POLL_INTERVAL,
    progress_watchdog_interval=POLL_INTERVAL,
    heartbeat_interval=HEARTBEAT_INTERVAL,
    heartbeat_timeout=timedelta(seconds=5),
    soft_timeout=TIMEOUT,
    hard_timeout=1.5 * TIMEOUT,
    last_call_wait=timedelta(0),
    termination_grace_time=timedelta(0),
)
def run_attempt(
    model: nn.Module,
    optimizer: Optimizer,
    store: dist.Store,
    folder: Path,
    steps: int,
    call: inprocess.CallWrapper | None = None,
) -> None:
    """One life of the group; the wrapper looks for the last argument by its annotation."""
    assert call is not None
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt_store = dist.PrefixStore(str(call.iteration), store)
    dist.init_process_group(
        "gloo", store=attempt_store, rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    train(model, optimizer, folder, steps, call.iteration)
    dist.destroy_process_group()


def main() -> None:
    """What lives as long as the process."""
    torch.set_num_threads(1)
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    model, optimizer = make_model()
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"]),
        is_master=os.environ["RANK"] == "0", wait_for_workers=False,
    )  # fmt: skip
    run_attempt(model, optimizer, store, folder, steps)


if __name__ == "__main__":
    main()
