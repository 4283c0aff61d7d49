"""What ranks that are no island save together is a checkpoint like any other, or nothing at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cordee.checkpoint.checkpointer import Checkpointer
from cordee.checkpoint.emergency import EmergencySave, write_emergency_save
from cordee.checkpoint.load import list_complete, open_checkpoint
from cordee.checkpoint.peer_restore import StateSnapshot
from cordee.checkpoint.train_state import LocalTensor
from cordee.dist.process_group import RankProcess
from cordee.launcher.run_ranks import launch
from cordee.layout.slices import LocalSlice

ROWS, COLUMNS = 6, 4
META = {"progress": {}, "owed": ["checkpoint"]}


def make_matrix(step: int) -> Tensor:
    """The whole of the tensor that is cut, as of a step."""
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS) + 1000 * step


def make_part(step: int, rank: int) -> LocalTensor:
    """The third of it that rank `rank` of three held."""
    rows = slice(2 * rank, 2 * rank + 2)
    box = ((rows.start, rows.stop), (0, COLUMNS))
    return LocalTensor(
        "model/cut", make_matrix(step)[rows].clone(), LocalSlice(box, (ROWS, COLUMNS))
    )


def make_count(step: int) -> LocalTensor:
    """What all hold alike."""
    return LocalTensor(
        "optim/a/cut/step", torch.tensor(float(step)), LocalSlice((), (), ("shard",), 0, 3)
    )


def save_emergency(
    process: RankProcess,
    folder: Path,
    snapshots: list[StateSnapshot],
    required_names: tuple[str, ...],
    newest_step: int,
) -> EmergencySave:
    """As `emergency_save` does, with what a rank is given."""
    saver = Checkpointer(folder, process.rank, process.size, 2, lambda *_: None)
    group = dist.group.WORLD if process.size > 1 else None
    return write_emergency_save(
        snapshots, required_names, saver, 9, newest_step, group, process.rank, process.size
    )


def save_on_two_of_three(
    process: RankProcess, folder: Path, has_copy: bool, newest_step: int
) -> tuple[Any, str]:
    """Ranks 0 and 2 of three are left, at step 7; rank 1's third of step 5 lies beside rank 2's."""
    own_rank = 2 * process.rank
    snapshots = [
        StateSnapshot(7, META, [make_part(7, own_rank), make_count(7)]),
        StateSnapshot(5, META, [make_part(5, own_rank), make_count(5)]),
    ]
    if has_copy and process.rank:
        snapshots.append(StateSnapshot(5, META, [make_part(5, 1)]))
    emergency_save = save_emergency(process, folder, snapshots, ("model/cut",), newest_step)
    return emergency_save.step, emergency_save.reason


def test_the_newest_step_that_copies_complete_is_saved(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert launch(save_on_two_of_three, folder, True, 4, ranks=2) == [(5, ""), (5, "")]
    (path,) = list_complete(folder)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.step, checkpoint.generation) == (5, 9)
    assert checkpoint.meta == {"progress": {}}
    assert torch.equal(checkpoint.read("model/cut"), make_matrix(5))
    assert checkpoint.read("optim/a/cut/step") == 5


@pytest.mark.parametrize(("has_copy", "newest_step"), [(False, -1), (True, 5)])
def test_nothing_is_saved_that_is_not_whole_or_not_new(
    has_copy: bool, newest_step: int, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    for step, reason in launch(save_on_two_of_three, folder, has_copy, newest_step, ranks=2):
        assert step == (5 if has_copy else None)
        assert reason == (
            "the checkpoint of step 5 is as new" if has_copy else "of no step they hold all"
        )
    assert not folder.exists()


def test_a_tensor_that_nobody_left_has_seen_is_missed(tmp_path: Path) -> None:
    process = RankProcess(0, 1, 0, "cpu", "here", 1)
    snapshots = [StateSnapshot(7, META, [make_part(7, 0), make_part(7, 1), make_part(7, 2)])]
    emergency_save = save_emergency(process, tmp_path, snapshots, ("model/cut", "model/other"), -1)
    assert emergency_save == EmergencySave(None, None, "nobody holds model/other")
    assert save_emergency(process, tmp_path, [], (), -1).step is None


def save_with_obstacle(process: RankProcess, folder: Path) -> tuple[int | None, bool, str]:
    """Rank 1 finds its file's name taken by a folder."""
    step_folder = folder / "step-00000007.g9"
    if process.rank:
        (step_folder / "rank-00001.safetensors").mkdir(parents=True)
    dist.barrier()
    snapshots = [
        StateSnapshot(7, META, [make_part(7, n) for n in ([0, 2] if process.rank else [1])])
    ]
    emergency_save = save_emergency(process, folder, snapshots, (), -1)
    return emergency_save.step, emergency_save.report is None, emergency_save.reason


def test_a_disk_that_refuses_one_rank_leaves_no_checkpoint(tmp_path: Path) -> None:
    first_result, second_result = launch(save_with_obstacle, tmp_path, ranks=2)
    assert first_result == (7, True, "rank 1 could not write")
    assert second_result[:2] == (7, True) and "step 7 is not saved" in second_result[2]
    assert list_complete(tmp_path) == []
