"""Processes that really die, and a newcomer in their place; and states that are known at any step.

For tests of what survives (`test_peer`, `test_neighbour`). Processes are forked from one that has
imported torch, so that a fault costs a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.checkpoint.state import Holding
from cordee.dist.start import World
from cordee.layout.boxes import Box, Place, shape_of, whole

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16)
Held = Sequence[tuple[str, Box]]
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def truth(name: str, step: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The whole tensor `name` as of the end of `step`."""
    seed = 1000 * step + sum(map(ord, name))
    values = torch.randint(-99, 99, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def by_hand(name: str, step: int, box: Box, shapes: Shapes) -> Tensor:
    return truth(name, step, *shapes[name])[tuple(slice(*span) for span in box)]


def hold(held: Held, step: int, shapes: Shapes) -> list[Holding]:
    """Tensors of their own with what is true at `step`."""
    return [
        Holding(name, by_hand(name, step, box, shapes).clone(), Place(box, shapes[name][0]))
        for name, box in held
    ]


def empty(held: Held, shapes: Shapes) -> list[Holding]:
    """Tensors to be filled; every second one is not contiguous."""
    found = []
    for number, (name, box) in enumerate(held):
        shape, dtype = shapes[name]
        part = torch.zeros(shape_of(box), dtype=dtype)
        if number % 2 and len(box) == 2:
            part = torch.zeros(shape_of(box)[::-1], dtype=dtype).t()
        found.append(Holding(name, part, Place(box, shape)))
    return found


def check(wanted: Sequence[Holding], step: int, shapes: Shapes) -> None:
    for item in wanted:
        assert torch.equal(item.part, by_hand(item.name, step, item.place.box, shapes)), item


def meta(step: int) -> dict[str, Any]:
    return {"progress": {"step": step}, "data": "d"}


MODEL: Shapes = {f"w{n}": ((64 + n, 33), DTYPES[n % 3]) for n in range(9)} | {
    "step": ((), torch.float32), "big": ((1 << 11, 1 << 10), torch.float32),
}  # fmt: skip
ALL: Held = [(name, whole(shape)) for name, (shape, _) in MODEL.items()]


def halves(dim: int, ranks: int = 2) -> list[Held]:
    """What each of some ranks holds of the model when `dim` is cut (0-d tensors: everybody)."""
    found: list[Held] = []
    for rank in range(ranks):
        mine = []
        for name, box in ALL:
            if box:
                size = box[dim][1]
                span = (size * rank // ranks, size * (rank + 1) // ranks)
                box = (*box[:dim], span, *box[dim + 1 :])
            mine.append((name, box))
        found.append(mine)
    return found


def crew(life: Any, folder: Path, victim: int, moment: int, ranks: int = 3) -> dict[int, Any]:
    """Some ranks, of which `victim` kills itself at its fault point number `moment`, and a
    newcomer who takes its place: what each of the second generation returned."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "tests.metal.crew"])
    folder.mkdir(parents=True)
    pipes, processes = [], []
    for rank, new in [*((rank, False) for rank in range(ranks)), (victim, True)]:
        receiver, sender = context.Pipe(duplex=False)
        place = World(rank, ranks, rank, "cpu", "h", 0)
        job = (life, str(folder), place, -1 if new or rank != victim else moment, new, sender)
        processes.append(context.Process(target=_live, args=job, daemon=True))
        pipes.append((rank, receiver, sender))
    try:
        for process, (_, _, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        found = {}
        for index, (rank, receiver, _) in enumerate(pipes):
            if index != victim:
                assert receiver.poll(60), f"rank {rank} is silent"
                found[rank] = receiver.recv()
        processes[victim].join(10)
        assert processes[victim].exitcode == -signal.SIGKILL, "the victim outlived its fault"
        return found
    finally:
        for process in processes:
            process.kill()
            process.join()


def _live(life: Any, folder: str, place: World, moment: int, new: bool, sender: Connection) -> None:
    torch.set_num_threads(1)

    def join(generation: int) -> None:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{generation}", rank=place.rank,
            world_size=place.size, timeout=timedelta(seconds=30),
        )  # fmt: skip

    left = moment

    def point(name: str, step: int) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            os.kill(os.getpid(), signal.SIGKILL)

    sender.send(life(join, point, place, new))
    dist.destroy_process_group()
