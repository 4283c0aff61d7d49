"""Checkpoints under fire: kills at any moment, full and vanished disks, failing ranks, pruning.

Real kills and real disks. Run as a script this file is the process whose children get killed.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from cordee.checkpoint.checkpointer import Checkpointer, CommitReport, SaveStatus
from cordee.checkpoint.load import Checkpoint, find_newest, list_complete
from cordee.checkpoint.pieces import Piece

torch.set_num_threads(1)
FAULT_POINTS = (
    "save.stage",
    "save.write",
    "save.part",
    "save.manifest",
    "save.rename",
    "save.delete",
)


def no_fault(name: str, step: int) -> None:
    """No fault."""


def fail_on_reject(path: Path, reason: str) -> None:
    raise AssertionError(f"{path}: {reason}")


def make_pieces(value: float) -> list[Piece]:
    """600 kB that tell which step they are of."""
    weights = torch.full((150, 1000), float(value))
    return [
        Piece("w", weights, (150, 1000), (0, 0)),
        Piece("s", torch.tensor(float(value)), (), ()),
    ]


def save_all(
    savers: Sequence[Checkpointer],
    step: int,
    pieces_by_rank: Sequence[Sequence[Piece]],
    generation: int = 0,
) -> CommitReport | None:
    """What the caller of a real run does, in one process; `finish_all` is left to the test."""
    for saver, saver_pieces in zip(savers, pieces_by_rank, strict=True):
        saver.begin(step, generation, saver_pieces, {})
    statuses = [saver.join(20) for saver in savers]
    return savers[0].commit() if set(statuses) == {SaveStatus.WRITTEN} else None


def finish_all(savers: Sequence[Checkpointer]) -> None:
    for saver in savers:
        saver.finish()


def nonempty_folders(folder: Path) -> set[str]:
    """The folders that hold any file."""
    return {path.parent.name for path in folder.glob("step-*/*")}


def test_prune_keeps_the_newest_and_what_is_not_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    first_saver = Checkpointer(folder, 0, 1, 2, no_fault)
    for step in (10, 20, 30):
        assert save_all([first_saver], step, [make_pieces(step)])
        finish_all([first_saver])
    assert nonempty_folders(folder) == {"step-00000020.g0", "step-00000030.g0"}
    for stale_name in ("step-00000015.g0", "step-00000050.g0", "step-00000045.g1"):
        (folder / stale_name).mkdir()
    (folder / "step-00000005.g9").mkdir()  # a later start's: this one is a leftover, not that
    (folder / "notes").mkdir()
    saver = Checkpointer(folder, 0, 1, 2, no_fault)
    assert save_all([saver], 40, [make_pieces(40)], 1)
    assert {p.name for p in folder.iterdir()} == {
        "notes", "step-00000005.g9", "step-00000030.g0", "step-00000040.g1", "step-00000045.g1",
    }  # fmt: skip
    finish_all([saver])
    assert save_all([saver], 40, [make_pieces(41)], 1) is None and "complete" in str(saver.failure)
    finish_all([saver])
    assert [p.name for p in list_complete(folder)] == ["step-00000040.g1", "step-00000030.g0"]
    assert (
        list_complete(tmp_path / "none") == []
        and find_newest(tmp_path / "none", fail_on_reject) is None
    )


def check_refused_save(saver: Checkpointer, code: int, step: int = 2) -> None:
    """A save that the disk refuses: FAILED with the reason, no error, and step 1 still there."""
    assert save_all([saver], step, [make_pieces(step)]) is None
    assert saver.status is SaveStatus.FAILED
    assert errno.errorcode[code] in str(saver.failure) and os.strerror(code) in str(saver.failure)
    saver.finish()
    assert saver.status is SaveStatus.IDLE and saver.failure is None


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount_result = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if not mount_result or mount_result.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_and_a_read_only_one(tiny_disk: Path) -> None:
    saver = Checkpointer(tiny_disk / "c", 0, 1, 1, no_fault)
    assert save_all([saver], 1, [make_pieces(1)])
    finish_all([saver])
    check_refused_save(saver, errno.ENOSPC)
    assert nonempty_folders(tiny_disk / "c") == {"step-00000001.g0"}
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    check_refused_save(saver, errno.EROFS)
    checkpoint = find_newest(tiny_disk / "c", fail_on_reject)
    assert checkpoint is not None and checkpoint.step == 1


def test_a_file_size_limit_then_success(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path / "c", 0, 1, 1, no_fault)
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard_limit))
    try:
        check_refused_save(saver, errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft_limit, hard_limit))
    assert save_all([saver], 2, [make_pieces(2)])


@pytest.mark.parametrize("fault_name", FAULT_POINTS[:-1])
def test_the_folder_vanishes_or_the_disk_fails(tmp_path: Path, fault_name: str) -> None:
    def vanish() -> None:
        shutil.rmtree(run_folder)

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    run_folder, actions = tmp_path / "run", [vanish]

    def fault_point(name: str, step: int) -> None:
        if name == fault_name and actions:
            actions.pop()()

    run_folder.mkdir()
    saver = Checkpointer(run_folder / "c", 0, 1, 1, fault_point)
    check_refused_save(saver, errno.ENOENT)
    assert not run_folder.exists()
    run_folder.mkdir()
    actions.append(fail)
    check_refused_save(saver, errno.EIO)
    assert not nonempty_folders(run_folder / "c")
    assert save_all([saver], 2, [make_pieces(2)])


def test_a_failed_rank_costs_the_step_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    savers = [Checkpointer(folder, rank, 3, 1, no_fault) for rank in range(3)]
    assert save_all(savers, 1, [make_pieces(1), [], []])
    finish_all(savers)
    obstacle = folder / "step-00000002.g0" / "rank-00001.safetensors"
    obstacle.mkdir(parents=True)
    assert save_all(savers, 2, [make_pieces(2), [], []]) is None
    assert [s.status.name for s in savers] == ["WRITTEN", "FAILED", "WRITTEN"]
    assert "rank 1" in str(savers[1].failure)
    obstacle.rmdir()
    savers[2].finish()  # ranks 1 and 2 try again before rank 0 has finished
    savers[1].finish()
    for saver in savers[1:]:
        saver.begin(2, 0, [], {})
        assert saver.join(10) is SaveStatus.WRITTEN
    savers[0].finish()
    savers[0].begin(2, 0, make_pieces(2), {})
    assert savers[0].join(10) is SaveStatus.WRITTEN and savers[0].commit()
    finish_all(savers)
    assert nonempty_folders(folder) == {"step-00000002.g0"}


def test_what_a_failed_save_left_is_gone_before_the_next_one_writes(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    failing_points = {("save.manifest", 1)}

    def fault_point(name: str, step: int) -> None:
        if name == "save.write" and step == 2:
            assert nonempty_folders(folder) == {"step-00000002.g0"}
        if (name, step) in failing_points:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    savers = [Checkpointer(folder, 0, 2, 1, fault_point), Checkpointer(folder, 1, 2, 1, no_fault)]
    assert save_all(savers, 1, [[], make_pieces(1)]) is None
    assert "No space" in str(savers[0].failure)
    finish_all(savers)
    assert nonempty_folders(folder) == {"step-00000001.g0"} and not list_complete(folder)
    assert save_all(savers, 2, [[], make_pieces(2)])


def check_survivor(folder: Path, min_step: int) -> Checkpoint:
    """Whatever was killed: the newest verifies, and holds one step's state throughout."""
    checkpoint = find_newest(folder, fail_on_reject)
    assert checkpoint is not None and checkpoint.step >= min_step
    expected_values = {name: {float(checkpoint.step)} for name in ("w", "s")}
    assert {
        n: set(checkpoint.read(n).view(-1).tolist()) for n in checkpoint.names()
    } == expected_values
    # And the next start saves, and cleans up.
    savers = [Checkpointer(folder, rank, 2, 1, no_fault) for rank in range(2)]
    assert save_all(savers, checkpoint.step + 1, [make_pieces(0)[:1], make_pieces(0)[1:]], 1)
    assert len(list(folder.iterdir())) == 1
    return checkpoint


def test_sigkill_at_any_moment_leaves_a_whole_newest_step(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for name in FAULT_POINTS:
        step = check_survivor(tmp_path / name, 1).step
        assert step == (2 if name == "save.delete" else 1), name
    committed_steps = [int(line) for line in result.stdout.split()]
    assert len(committed_steps) == 25
    for number, min_step in enumerate(committed_steps):
        check_survivor(tmp_path / f"random-{number}", min_step)


def save_until_killed(folder: Path, steps: range, fault_name: str, pipe_fd: int = -1) -> None:
    """The child: two writers; at point `fault_name` of step 2 it kills itself."""

    def fault_point(name: str, step: int) -> None:
        if step == 2 and name == fault_name:
            os.kill(os.getpid(), signal.SIGKILL)

    savers = [Checkpointer(folder, rank, 2, 1, fault_point) for rank in range(2)]
    for step in steps:
        assert save_all(savers, step, [make_pieces(step)[:1], make_pieces(step)[1:]]), savers[
            0
        ].failure
        finish_all(savers)
        if pipe_fd >= 0:
            os.write(pipe_fd, bytes([step]))


def kill_children(folder: Path) -> None:
    """Forks a child for each fault point, and 25 that are killed at random moments."""
    for name in FAULT_POINTS:
        child_pid = os.fork()
        if not child_pid:
            save_until_killed(folder / name, range(1, 3), name)
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child_pid, 0)[1]), name
    rng = random.Random(5)
    for number in range(25):
        read_fd, write_fd = os.pipe()
        child_pid = os.fork()
        if not child_pid:
            save_until_killed(folder / f"random-{number}", range(1, 250), "", write_fd)
            os._exit(0)
        os.close(write_fd)
        last_bytes = os.read(read_fd, 1)
        time.sleep(rng.uniform(0, 0.04))
        os.kill(child_pid, signal.SIGKILL)
        os.waitpid(child_pid, 0)
        print(([*last_bytes, *os.read(read_fd, 250)])[-1])
        os.close(read_fd)


if __name__ == "__main__":
    kill_children(Path(sys.argv[1]))
