"""What survives moves between layouts: saved by the ranks of one, read by the ranks of any other.

Ranks are only coordinates here; the savers and the files are real. Runs of real processes that
stop and go on are in tests/drills.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cordee.checkpoint.checkpointer import Checkpointer, SaveStatus
from cordee.checkpoint.load import Checkpoint, open_checkpoint
from cordee.checkpoint.pieces import Piece
from cordee.checkpoint.train_state import collect_local_tensors, make_reader, select_pieces
from cordee.errors import CheckpointError
from cordee.layout.microbatches import shard_rows
from cordee.layout.slices import Box, LocalSlice

torch.set_num_threads(1)

AXES = ("island", "expert", "shard", "tensor")
LAYOUTS = ((1, 1, 1, 1), (3, 1, 1, 1), (1, 1, 3, 1), (2, 1, 2, 2), (1, 2, 2, 1), (2, 2, 1, 3))
TENSOR_CUTS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "up": ((7, 5), ("tensor,shard", "")),
    "down": ((5, 7), ("shard", "tensor")),
    "experts": ((4, 3, 6), ("expert", "shard", "tensor")),
    "norm": ((5,), ("shard",)),
    "row": ((1, 9), ("shard", "")),  # fewer rows than shards
    "scale": ((), ()),
    "empty": ((0, 3), ("shard", "")),
}
"""Whole shape, and the axes that cut each dim, the outermost first."""


def make_local_slice(name: str, layout: tuple[int, ...], coords: tuple[int, ...]) -> LocalSlice:
    """As a recipe would cut it: one axis after the other, by rows as FSDP2 does."""
    shape, cuts = TENSOR_CUTS[name]
    degree, axis_index = dict(zip(AXES, layout, strict=True)), dict(zip(AXES, coords, strict=True))
    box: Box = ()
    for size, axes in zip(shape, cuts, strict=True):
        span = range(size)
        for axis in filter(None, axes.split(",")):
            rows = shard_rows(len(span), degree[axis], axis_index[axis])
            span = span[rows.start : rows.stop]
        box = (*box, (span.start, span.stop))
    replicated_axes = tuple(axis for axis in AXES if axis not in ",".join(cuts))
    copy_index = 0
    for axis in replicated_axes:
        copy_index = copy_index * degree[axis] + axis_index[axis]
    return LocalSlice(
        box, shape, replicated_axes, copy_index, math.prod(degree[axis] for axis in replicated_axes)
    )


def rank_coordinates(layout: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return product(*map(range, layout))


def slice_tensor(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(*dim) for dim in box)]


def full_state() -> dict[str, Tensor]:
    """Every tensor of a run, whole, by its name in the checkpoint."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for number, (name, (shape, _)) in enumerate(TENSOR_CUTS.items()):
        for key in (f"model/{name}", f"optim/matrices/{name}/exp_avg"):
            tensors[key] = torch.randn(shape, generator=generator)
        tensors[f"optim/matrices/{name}/step"] = torch.tensor(float(number))
        tensors[f"optim/matrices/{name}/row_var"] = torch.randn(2, 11, generator=generator)
    return tensors


def local_state(layout: tuple[int, ...], coords: tuple[int, ...]) -> dict[str, Tensor]:
    """A rank's tensors: parameters and what is like them cut, the others whole."""
    tensors = {}
    for key, tensor in full_state().items():
        name = key.split("/")[2 if key.startswith("optim") else 1]
        has_full_shape = tensor.shape == TENSOR_CUTS[name][0]
        tensors[key] = (
            slice_tensor(tensor, make_local_slice(name, layout, coords).box)
            if has_full_shape
            else tensor
        )
    return tensors


def select_rank_pieces(layout: tuple[int, ...], coords: tuple[int, ...]) -> list[Piece]:
    tensors = local_state(layout, coords)
    parameters = {name: nn.Parameter(tensors[f"model/{name}"]) for name in TENSOR_CUTS}
    optimizer = {k.removeprefix("optim/"): t for k, t in tensors.items() if k.startswith("optim/")}
    places = {name: make_local_slice(name, layout, coords) for name in TENSOR_CUTS}
    return select_pieces(collect_local_tensors(parameters, optimizer, places))


def save_checkpoint(layout: tuple[int, ...], folder: Path) -> Checkpoint:
    """Every rank of the layout writes what it is dealt."""
    pieces_by_rank = [select_rank_pieces(layout, coords) for coords in rank_coordinates(layout)]
    savers = [
        Checkpointer(folder, rank, len(pieces_by_rank), 1, lambda name, step: None)
        for rank in range(len(pieces_by_rank))
    ]
    for saver, saver_pieces in zip(savers, pieces_by_rank, strict=True):
        saver.begin(1, 0, saver_pieces, {})
    assert {saver.join(20) for saver in savers} == {SaveStatus.WRITTEN}
    report = savers[0].commit()
    assert report is not None, savers[0].failure
    return open_checkpoint(report.path)


@pytest.mark.parametrize("source_layout", LAYOUTS, ids=str)
def test_any_layout_reads_what_any_layout_wrote(
    source_layout: tuple[int, ...], tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(source_layout, tmp_path / "c")
    unsaved_names = {f"optim/matrices/empty/{suffix}" for suffix in ("step", "row_var")}
    assert set(checkpoint.names()) == set(full_state()) - unsaved_names
    for target_layout in LAYOUTS:
        for coords in rank_coordinates(target_layout):
            read_local = make_reader(
                checkpoint,
                {name: make_local_slice(name, target_layout, coords) for name in TENSOR_CUTS},
            )
            for key, tensor in local_state(target_layout, coords).items():
                if key not in unsaved_names:
                    assert torch.equal(read_local(key), tensor), (target_layout, coords, key)


def test_copies_share_the_writing_evenly() -> None:
    def make_tensor(number: int) -> Tensor:
        return torch.zeros(100 + 7 * number, 10)

    bytes_by_copy = []
    for copy in range(4):
        parameters = {f"w{number}": nn.Parameter(make_tensor(number)) for number in range(23)}
        places = {
            name: LocalSlice(((0, len(p)), (0, 10)), (len(p), 10), ("island", "tensor"), copy, 4)
            for name, p in parameters.items()
        }
        copy_pieces = select_pieces(collect_local_tensors(parameters, {}, places))
        bytes_by_copy.append({p.name: p.tensor.nbytes for p in copy_pieces})
    assert sorted(name for piece_bytes in bytes_by_copy for name in piece_bytes) == sorted(
        f"model/w{number}" for number in range(23)
    )
    loads = [sum(piece_bytes.values()) for piece_bytes in bytes_by_copy]
    assert max(loads) - min(loads) <= make_tensor(23).nbytes


def test_a_parameter_that_is_not_its_box_is_refused() -> None:
    places = {"w": LocalSlice(((0, 3),), (6,))}
    with pytest.raises(CheckpointError, match="not the box"):
        collect_local_tensors({"w": nn.Parameter(torch.ones(6))}, {}, places)


def test_a_parameter_of_another_shape_is_refused(tmp_path: Path) -> None:
    checkpoint = save_checkpoint((1, 1, 1, 1), tmp_path / "c")
    read_local = make_reader(checkpoint, {"up": LocalSlice(((0, 1), (0, 5)), (1, 5))})
    with pytest.raises(CheckpointError, match="another shape"):
        read_local("model/up")
