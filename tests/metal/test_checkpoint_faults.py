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

from cordee.checkpoint.format import Piece, SaveStatus
from cordee.checkpoint.load import Checkpoint, complete, newest
from cordee.checkpoint.save import CommitReport, Saver

torch.set_num_threads(1)
POINTS = ("save.stage", "save.write", "save.part", "save.manifest", "save.rename", "save.delete")


def quiet(name: str, step: int) -> None:
    """No fault."""


def no_rejects(path: Path, reason: str) -> None:
    raise AssertionError(f"{path}: {reason}")


def full(value: float) -> list[Piece]:
    """600 kB that tell which step they are of."""
    weights = torch.full((150, 1000), float(value))
    return [
        Piece("w", weights, (150, 1000), (0, 0)),
        Piece("s", torch.tensor(float(value)), (), ()),
    ]


def save(
    team: Sequence[Saver], step: int, own: Sequence[Sequence[Piece]], generation: int = 0
) -> CommitReport | None:
    """What the caller of a real run does, in one process; `finish` is left to the test."""
    for saver, pieces in zip(team, own, strict=True):
        saver.begin(step, generation, pieces, {})
    statuses = [saver.join(20) for saver in team]
    return team[0].commit() if set(statuses) == {SaveStatus.WRITTEN} else None


def finish(team: Sequence[Saver]) -> None:
    for saver in team:
        saver.finish()


def files(folder: Path) -> set[str]:
    """The folders that hold any file."""
    return {path.parent.name for path in folder.glob("step-*/*")}


def test_prune_keeps_the_newest_and_what_is_not_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    first = Saver(folder, 0, 1, 2, quiet)
    for step in (10, 20, 30):
        assert save([first], step, [full(step)])
        finish([first])
    assert files(folder) == {"step-00000020.g0", "step-00000030.g0"}
    for dead in ("step-00000015.g0", "step-00000050.g0", "step-00000045.g1"):
        (folder / dead).mkdir()
    (folder / "step-00000005.g9").mkdir()  # a later start's: this one is a leftover, not that
    (folder / "notes").mkdir()
    saver = Saver(folder, 0, 1, 2, quiet)
    assert save([saver], 40, [full(40)], 1)
    assert {p.name for p in folder.iterdir()} == {
        "notes", "step-00000005.g9", "step-00000030.g0", "step-00000040.g1", "step-00000045.g1",
    }  # fmt: skip
    finish([saver])
    assert save([saver], 40, [full(41)], 1) is None and "complete" in str(saver.failure)
    finish([saver])
    assert [p.name for p in complete(folder)] == ["step-00000040.g1", "step-00000030.g0"]
    assert complete(tmp_path / "none") == [] and newest(tmp_path / "none", no_rejects) is None


def refused(saver: Saver, code: int, step: int = 2) -> None:
    """A save that the disk refuses: FAILED with the reason, no error, and step 1 still there."""
    assert save([saver], step, [full(step)]) is None
    assert saver.poll() is SaveStatus.FAILED
    assert errno.errorcode[code] in str(saver.failure) and os.strerror(code) in str(saver.failure)
    saver.finish()
    assert saver.poll() is SaveStatus.IDLE and saver.failure is None


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if not made or made.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_and_a_read_only_one(tiny_disk: Path) -> None:
    saver = Saver(tiny_disk / "c", 0, 1, 1, quiet)
    assert save([saver], 1, [full(1)])
    finish([saver])
    refused(saver, errno.ENOSPC)
    assert files(tiny_disk / "c") == {"step-00000001.g0"}
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    refused(saver, errno.EROFS)
    checkpoint = newest(tiny_disk / "c", no_rejects)
    assert checkpoint is not None and checkpoint.step == 1


def test_a_file_size_limit_then_success(tmp_path: Path) -> None:
    saver = Saver(tmp_path / "c", 0, 1, 1, quiet)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refused(saver, errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert save([saver], 2, [full(2)])


@pytest.mark.parametrize("when", POINTS[:-1])
def test_the_folder_vanishes_or_the_disk_fails(tmp_path: Path, when: str) -> None:
    def vanish() -> None:
        shutil.rmtree(run)

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    run, act = tmp_path / "run", [vanish]

    def point(name: str, step: int) -> None:
        if name == when and act:
            act.pop()()

    run.mkdir()
    saver = Saver(run / "c", 0, 1, 1, point)
    refused(saver, errno.ENOENT)
    assert not run.exists()
    run.mkdir()
    act.append(fail)
    refused(saver, errno.EIO)
    assert not files(run / "c")
    assert save([saver], 2, [full(2)])


def test_a_failed_rank_costs_the_step_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    team = [Saver(folder, rank, 3, 1, quiet) for rank in range(3)]
    assert save(team, 1, [full(1), [], []])
    finish(team)
    obstacle = folder / "step-00000002.g0" / "rank-00001.safetensors"
    obstacle.mkdir(parents=True)
    assert save(team, 2, [full(2), [], []]) is None
    assert [s.poll().name for s in team] == ["WRITTEN", "FAILED", "WRITTEN"]
    assert "rank 1" in str(team[1].failure)
    obstacle.rmdir()
    team[2].finish()  # ranks 1 and 2 try again before rank 0 has finished
    team[1].finish()
    for saver in team[1:]:
        saver.begin(2, 0, [], {})
        assert saver.join(10) is SaveStatus.WRITTEN
    team[0].finish()
    team[0].begin(2, 0, full(2), {})
    assert team[0].join(10) is SaveStatus.WRITTEN and team[0].commit()
    finish(team)
    assert files(folder) == {"step-00000002.g0"}


def test_what_a_failed_save_left_is_gone_before_the_next_one_writes(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    fail = {("save.manifest", 1)}

    def point(name: str, step: int) -> None:
        if name == "save.write" and step == 2:
            assert files(folder) == {"step-00000002.g0"}
        if (name, step) in fail:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    team = [Saver(folder, 0, 2, 1, point), Saver(folder, 1, 2, 1, quiet)]
    assert save(team, 1, [[], full(1)]) is None
    assert "No space" in str(team[0].failure)
    finish(team)
    assert files(folder) == {"step-00000001.g0"} and not complete(folder)
    assert save(team, 2, [[], full(2)])


def check_survivor(folder: Path, least: int) -> Checkpoint:
    """Whatever was killed: the newest verifies, and holds one step's state throughout."""
    checkpoint = newest(folder, no_rejects)
    assert checkpoint is not None and checkpoint.step >= least
    expect = {name: {float(checkpoint.step)} for name in ("w", "s")}
    assert {n: set(checkpoint.read(n).view(-1).tolist()) for n in checkpoint.names()} == expect
    # And the next start saves, and cleans up.
    team = [Saver(folder, rank, 2, 1, quiet) for rank in range(2)]
    assert save(team, checkpoint.step + 1, [full(0)[:1], full(0)[1:]], 1)
    assert len(list(folder.iterdir())) == 1
    return checkpoint


def test_sigkill_at_any_moment_leaves_a_whole_newest_step(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in POINTS:
        step = check_survivor(tmp_path / name, 1).step
        assert step == (2 if name == "save.delete" else 1), name
    committed = [int(line) for line in done.stdout.split()]
    assert len(committed) == 25
    for number, least in enumerate(committed):
        check_survivor(tmp_path / f"random-{number}", least)


def save_until_killed(folder: Path, steps: range, die: str, pipe: int = -1) -> None:
    """The child: two writers; at point `die` of step 2 it kills itself."""

    def point(name: str, step: int) -> None:
        if step == 2 and name == die:
            os.kill(os.getpid(), signal.SIGKILL)

    team = [Saver(folder, rank, 2, 1, point) for rank in range(2)]
    for step in steps:
        assert save(team, step, [full(step)[:1], full(step)[1:]]), team[0].failure
        finish(team)
        if pipe >= 0:
            os.write(pipe, bytes([step]))


def kill_children(folder: Path) -> None:
    """Forks a child for each fault point, and 25 that are killed at random moments."""
    for name in POINTS:
        child = os.fork()
        if not child:
            save_until_killed(folder / name, range(1, 3), name)
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), name
    rng = random.Random(5)
    for number in range(25):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            save_until_killed(folder / f"random-{number}", range(1, 250), "", writer)
            os._exit(0)
        os.close(writer)
        last = os.read(reader, 1)
        time.sleep(rng.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(([*last, *os.read(reader, 250)])[-1])
        os.close(reader)


if __name__ == "__main__":
    kill_children(Path(sys.argv[1]))
