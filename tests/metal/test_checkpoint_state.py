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

from cordee.checkpoint.format import Piece, SaveStatus
from cordee.checkpoint.load import Checkpoint, open_checkpoint
from cordee.checkpoint.save import Saver
from cordee.checkpoint.state import holdings, pieces, reader
from cordee.errors import CheckpointError
from cordee.layout.boxes import Box, Place
from cordee.layout.split import shard_rows

torch.set_num_threads(1)

AXES = ("island", "expert", "shard", "tensor")
LAYOUTS = ((1, 1, 1, 1), (3, 1, 1, 1), (1, 1, 3, 1), (2, 1, 2, 2), (1, 2, 2, 1), (2, 2, 1, 3))
CUTS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "up": ((7, 5), ("tensor,shard", "")),
    "down": ((5, 7), ("shard", "tensor")),
    "experts": ((4, 3, 6), ("expert", "shard", "tensor")),
    "norm": ((5,), ("shard",)),
    "row": ((1, 9), ("shard", "")),  # fewer rows than shards
    "scale": ((), ()),
    "empty": ((0, 3), ("shard", "")),
}
"""Whole shape, and the axes that cut each dim, the outermost first."""


def place_of(name: str, layout: tuple[int, ...], at: tuple[int, ...]) -> Place:
    """As a recipe would cut it: one axis after the other, by rows as FSDP2 does."""
    shape, cuts = CUTS[name]
    degree, place = dict(zip(AXES, layout, strict=True)), dict(zip(AXES, at, strict=True))
    box: Box = ()
    for size, axes in zip(shape, cuts, strict=True):
        span = range(size)
        for axis in filter(None, axes.split(",")):
            rows = shard_rows(len(span), degree[axis], place[axis])
            span = span[rows.start : rows.stop]
        box = (*box, (span.start, span.stop))
    shared = tuple(axis for axis in AXES if axis not in ",".join(cuts))
    copy = 0
    for axis in shared:
        copy = copy * degree[axis] + place[axis]
    return Place(box, shape, shared, copy, math.prod(degree[axis] for axis in shared))


def ranks(layout: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return product(*map(range, layout))


def cut(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(*dim) for dim in box)]


def whole_state() -> dict[str, Tensor]:
    """Every tensor of a run, whole, by its name in the checkpoint."""
    generator, found = torch.Generator().manual_seed(3), {}
    for number, (name, (shape, _)) in enumerate(CUTS.items()):
        for key in (f"model/{name}", f"optim/matrices/{name}/exp_avg"):
            found[key] = torch.randn(shape, generator=generator)
        found[f"optim/matrices/{name}/step"] = torch.tensor(float(number))
        found[f"optim/matrices/{name}/row_var"] = torch.randn(2, 11, generator=generator)
    return found


def local_state(layout: tuple[int, ...], at: tuple[int, ...]) -> dict[str, Tensor]:
    """A rank's tensors: parameters and what is like them cut, the others whole."""
    found = {}
    for key, tensor in whole_state().items():
        name = key.split("/")[2 if key.startswith("optim") else 1]
        like = tensor.shape == CUTS[name][0]
        found[key] = cut(tensor, place_of(name, layout, at).box) if like else tensor
    return found


def own_pieces(layout: tuple[int, ...], at: tuple[int, ...]) -> list[Piece]:
    local = local_state(layout, at)
    parameters = {name: nn.Parameter(local[f"model/{name}"]) for name in CUTS}
    optimizer = {k.removeprefix("optim/"): t for k, t in local.items() if k.startswith("optim/")}
    places = {name: place_of(name, layout, at) for name in CUTS}
    return pieces(holdings(parameters, optimizer, places))


def save(layout: tuple[int, ...], folder: Path) -> Checkpoint:
    """Every rank of the layout writes what it is dealt."""
    own = [own_pieces(layout, at) for at in ranks(layout)]
    team = [Saver(folder, rank, len(own), 1, lambda name, step: None) for rank in range(len(own))]
    for saver, dealt in zip(team, own, strict=True):
        saver.begin(1, 0, dealt, {})
    assert {saver.join(20) for saver in team} == {SaveStatus.WRITTEN}
    report = team[0].commit()
    assert report is not None, team[0].failure
    return open_checkpoint(report.path)


@pytest.mark.parametrize("before", LAYOUTS, ids=str)
def test_any_layout_reads_what_any_layout_wrote(before: tuple[int, ...], tmp_path: Path) -> None:
    found = save(before, tmp_path / "c")
    left_out = {f"optim/matrices/empty/{what}" for what in ("step", "row_var")}
    assert set(found.names()) == set(whole_state()) - left_out
    for after in LAYOUTS:
        for at in ranks(after):
            mine = reader(found, {name: place_of(name, after, at) for name in CUTS})
            for key, tensor in local_state(after, at).items():
                if key not in left_out:
                    assert torch.equal(mine(key), tensor), (after, at, key)


def test_copies_share_the_writing_evenly() -> None:
    def part(number: int) -> Tensor:
        return torch.zeros(100 + 7 * number, 10)

    written = []
    for copy in range(4):
        parameters = {f"w{number}": nn.Parameter(part(number)) for number in range(23)}
        places = {
            name: Place(((0, len(p)), (0, 10)), (len(p), 10), ("island", "tensor"), copy, 4)
            for name, p in parameters.items()
        }
        dealt = pieces(holdings(parameters, {}, places))
        written.append({p.name: p.tensor.nbytes for p in dealt})
    assert sorted(name for own in written for name in own) == sorted(
        f"model/w{number}" for number in range(23)
    )
    loads = [sum(own.values()) for own in written]
    assert max(loads) - min(loads) <= part(23).nbytes


def test_a_parameter_that_is_not_its_box_is_refused() -> None:
    places = {"w": Place(((0, 3),), (6,))}
    with pytest.raises(CheckpointError, match="not the box"):
        holdings({"w": nn.Parameter(torch.ones(6))}, {}, places)


def test_a_parameter_of_another_shape_is_refused(tmp_path: Path) -> None:
    found = save((1, 1, 1, 1), tmp_path / "c")
    mine = reader(found, {"up": Place(((0, 1), (0, 5)), (1, 5))})
    with pytest.raises(CheckpointError, match="another shape"):
        mine("model/up")
