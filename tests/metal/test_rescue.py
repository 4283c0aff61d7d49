"""What ranks that are no island save together is a checkpoint like any other, or nothing at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cordee.checkpoint.load import complete, open_checkpoint
from cordee.checkpoint.peer import Kept
from cordee.checkpoint.rescue import Rescued, rescue
from cordee.checkpoint.save import Saver
from cordee.checkpoint.state import Holding
from cordee.dist.start import World
from cordee.layout.boxes import Place
from cordee.testing import launch

ROWS, COLUMNS = 6, 4
META = {"progress": {}, "owed": ["checkpoint"]}


def matrix(step: int) -> Tensor:
    """The whole of the tensor that is cut, as of a step."""
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS) + 1000 * step


def part(step: int, number: int) -> Holding:
    """The third of it that rank `number` of three held."""
    rows = slice(2 * number, 2 * number + 2)
    box = ((rows.start, rows.stop), (0, COLUMNS))
    return Holding("model/cut", matrix(step)[rows].clone(), Place(box, (ROWS, COLUMNS)))


def count(step: int) -> Holding:
    """What all hold alike."""
    return Holding("optim/a/cut/step", torch.tensor(float(step)), Place((), (), ("shard",), 0, 3))


def save(
    world: World, folder: Path, kept: list[Kept], required: tuple[str, ...], newest: int
) -> Rescued:
    """As `keep_safe` does, with what a rank is given."""
    saver = Saver(folder, world.rank, world.size, 2, lambda *_: None)
    group = dist.group.WORLD if world.size > 1 else None
    return rescue(kept, required, saver, 9, newest, group, world.rank, world.size)


def two_of_three(world: World, folder: Path, copied: bool, newest: int) -> tuple[Any, str]:
    """Ranks 0 and 2 of three are left, at step 7; rank 1's third of step 5 lies beside rank 2's."""
    own = 2 * world.rank
    kept = [Kept(7, META, [part(7, own), count(7)]), Kept(5, META, [part(5, own), count(5)])]
    if copied and world.rank:
        kept.append(Kept(5, META, [part(5, 1)]))
    found = save(world, folder, kept, ("model/cut",), newest)
    return found.step, found.why


def test_the_newest_step_that_copies_complete_is_saved(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert launch(two_of_three, folder, True, 4, ranks=2) == [(5, ""), (5, "")]
    (path,) = complete(folder)
    made = open_checkpoint(path)
    assert (made.step, made.generation) == (5, 9)
    assert made.meta == {"progress": {}}
    assert torch.equal(made.read("model/cut"), matrix(5))
    assert made.read("optim/a/cut/step") == 5


@pytest.mark.parametrize(("copied", "newest"), [(False, -1), (True, 5)])
def test_nothing_is_saved_that_is_not_whole_or_not_new(
    copied: bool, newest: int, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    for step, why in launch(two_of_three, folder, copied, newest, ranks=2):
        assert step == (5 if copied else None)
        assert why == (
            "the checkpoint of step 5 is as new" if copied else "of no step they hold all"
        )
    assert not folder.exists()


def test_a_tensor_that_nobody_left_has_seen_is_missed(tmp_path: Path) -> None:
    alone = World(0, 1, 0, "cpu", "here", 1)
    kept = [Kept(7, META, [part(7, 0), part(7, 1), part(7, 2)])]
    found = save(alone, tmp_path, kept, ("model/cut", "model/other"), -1)
    assert found == Rescued(None, None, "nobody holds model/other")
    assert save(alone, tmp_path, [], (), -1).step is None


def one_cannot_write(world: World, folder: Path) -> tuple[int | None, bool, str]:
    """Rank 1 finds its file's name taken by a folder."""
    step = folder / "step-00000007.g9"
    if world.rank:
        (step / "rank-00001.safetensors").mkdir(parents=True)
    dist.barrier()
    kept = [Kept(7, META, [part(7, n) for n in ([0, 2] if world.rank else [1])])]
    found = save(world, folder, kept, (), -1)
    return found.step, found.report is None, found.why


def test_a_disk_that_refuses_one_rank_leaves_no_checkpoint(tmp_path: Path) -> None:
    first, second = launch(one_cannot_write, tmp_path, ranks=2)
    assert first == (7, True, "rank 1 could not write")
    assert second[:2] == (7, True) and "step 7 is not saved" in second[2]
    assert complete(tmp_path) == []
