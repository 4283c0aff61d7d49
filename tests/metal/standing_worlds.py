"""Processes that really die, and a newcomer in their place; and states that are known at any step.

For tests of what survives (`test_peer_restore`, `test_peer_backup`). Processes are forked from one
that has imported torch, so that a fault costs a second.
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

from cordee.checkpoint.train_state import LocalTensor
from cordee.dist.process_group import RankProcess
from cordee.layout.slices import Box, LocalSlice, box_shape, full_box

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16)
NamedBoxes = Sequence[tuple[str, Box]]
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def expected_tensor(name: str, step: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The whole tensor `name` as of the end of `step`."""
    seed = 1000 * step + sum(map(ord, name))
    values = torch.randint(-99, 99, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def expected_slice(name: str, step: int, box: Box, shapes: Shapes) -> Tensor:
    return expected_tensor(name, step, *shapes[name])[tuple(slice(*span) for span in box)]


def make_local_tensors(named_boxes: NamedBoxes, step: int, shapes: Shapes) -> list[LocalTensor]:
    """Tensors of their own with what is true at `step`."""
    return [
        LocalTensor(
            name, expected_slice(name, step, box, shapes).clone(), LocalSlice(box, shapes[name][0])
        )
        for name, box in named_boxes
    ]


def make_empty_tensors(named_boxes: NamedBoxes, shapes: Shapes) -> list[LocalTensor]:
    """Tensors to be filled; every second one is not contiguous."""
    local_tensors = []
    for index, (name, box) in enumerate(named_boxes):
        shape, dtype = shapes[name]
        tensor = torch.zeros(box_shape(box), dtype=dtype)
        if index % 2 and len(box) == 2:
            tensor = torch.zeros(box_shape(box)[::-1], dtype=dtype).t()
        local_tensors.append(LocalTensor(name, tensor, LocalSlice(box, shape)))
    return local_tensors


def check_tensors(local_tensors: Sequence[LocalTensor], step: int, shapes: Shapes) -> None:
    for item in local_tensors:
        assert torch.equal(
            item.tensor, expected_slice(item.name, step, item.local_slice.box, shapes)
        ), item


def meta(step: int) -> dict[str, Any]:
    return {"progress": {"step": step}, "data": "d"}


MODEL: Shapes = {f"w{n}": ((64 + n, 33), DTYPES[n % 3]) for n in range(9)} | {
    "step": ((), torch.float32), "big": ((1 << 11, 1 << 10), torch.float32),
}  # fmt: skip
ALL_BOXES: NamedBoxes = [(name, full_box(shape)) for name, (shape, _) in MODEL.items()]


def split_model(dim: int, ranks: int = 2) -> list[NamedBoxes]:
    """What each of some ranks holds of the model when `dim` is cut (0-d tensors: everybody)."""
    boxes_by_rank: list[NamedBoxes] = []
    for rank in range(ranks):
        rank_boxes = []
        for name, box in ALL_BOXES:
            if box:
                size = box[dim][1]
                span = (size * rank // ranks, size * (rank + 1) // ranks)
                box = (*box[:dim], span, *box[dim + 1 :])
            rank_boxes.append((name, box))
        boxes_by_rank.append(rank_boxes)
    return boxes_by_rank


def run_with_replacement(
    rank_function: Any, folder: Path, victim: int, fault_index: int, ranks: int = 3
) -> dict[int, Any]:
    """Some ranks, of which `victim` kills itself at its fault point number `fault_index`, and a
    newcomer who takes its place: what each of the second generation returned."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "tests.metal.standing_worlds"])
    folder.mkdir(parents=True)
    pipes, processes = [], []
    for rank, is_new in [*((rank, False) for rank in range(ranks)), (victim, True)]:
        receiver, sender = context.Pipe(duplex=False)
        rank_process = RankProcess(rank, ranks, rank, "cpu", "h", 0)
        arguments = (
            rank_function,
            str(folder),
            rank_process,
            -1 if is_new or rank != victim else fault_index,
            is_new,
            sender,
        )
        processes.append(context.Process(target=_rank_main, args=arguments, daemon=True))
        pipes.append((rank, receiver, sender))
    try:
        for process, (_, _, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        results = {}
        for index, (rank, receiver, _) in enumerate(pipes):
            if index != victim:
                assert receiver.poll(60), f"rank {rank} is silent"
                results[rank] = receiver.recv()
        processes[victim].join(10)
        assert processes[victim].exitcode == -signal.SIGKILL, "the victim outlived its fault"
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank_main(
    rank_function: Any,
    folder: str,
    rank_process: RankProcess,
    fault_index: int,
    is_new: bool,
    sender: Connection,
) -> None:
    torch.set_num_threads(1)

    def join_group(generation: int) -> None:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{generation}", rank=rank_process.rank,
            world_size=rank_process.size, timeout=timedelta(seconds=30),
        )  # fmt: skip

    remaining = fault_index

    def fault_point(name: str, step: int) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == -1:
            os.kill(os.getpid(), signal.SIGKILL)

    sender.send(rank_function(join_group, fault_point, rank_process, is_new))
    dist.destroy_process_group()
