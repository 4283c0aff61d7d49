"""What goes wrong around a run: the disk, the terminal, a second process, another launcher."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import (
    SMALL,
    clean_environment,
    read_events,
    read_rows,
    run_cordee,
    train_small,
    weights_digest,
)

STEPS = 150
LONG_OVERRIDES = (
    "run.exact=true", f"run.steps={STEPS}", "evaluate.sample=0", "evaluate.tokens=0",
    "checkpoint.every=10",
)  # fmt: skip


@pytest.fixture(scope="module")
def reference_digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the long run, undisturbed."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    train_small(folder, *LONG_OVERRIDES, "launch.processes=1")
    return weights_digest(folder)


class TrainProcess:
    """A run in the background, what it says, and how far it is."""

    def __init__(self, folder: Path, *overrides: str, prefix: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "cordee", "train", *SMALL, *LONG_OVERRIDES, *overrides,
             f"run.dir={folder}"],
            env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def stderr_text(self) -> str:
        """Everything so far."""
        return "".join(self.lines)

    def wait_for_rows(self, row_count: int, deadline_s: float = 90.0) -> None:
        """Waits until that many rows are written."""
        path = self.folder / "metrics.jsonl"
        self._wait(
            lambda: path.exists() and path.read_bytes().count(b"\n") >= row_count, deadline_s
        )

    def wait_for_text(self, text: str, deadline_s: float = 60.0) -> None:
        """Waits for words on the screen."""
        self._wait(lambda: text in self.stderr_text, deadline_s)

    def _wait(self, condition: object, deadline_s: float) -> None:
        assert callable(condition)
        end_s = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end_s, self.stderr_text[-3000:]
            assert self.process.poll() is None, self.stderr_text[-3000:]
            time.sleep(0.01)

    def wait_for_exit(self, deadline_s: float = 120.0) -> int:
        """The exit code."""
        exit_code = self.process.wait(deadline_s)
        self._reader.join(5)
        return exit_code


def test_a_full_disk_is_said_survived_and_made_good(reference_digest: str, run_dir: Path) -> None:
    """The kernel refuses every write beyond 2 KiB of a file for a while, as a full disk would."""
    run = TrainProcess(run_dir, "launch.processes=1")
    run.wait_for_rows(12)
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
    run.wait_for_text("CANNOT WRITE")
    run.wait_for_text("CHECKPOINT FAILED")
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, unlimited)
    assert run.wait_for_exit() == 0, run.stderr_text[-3000:]
    assert weights_digest(run_dir) == reference_digest
    assert [row["step"] for row in read_rows(run_dir)] == list(range(1, STEPS + 1))
    assert [e["event"] for e in read_events(run_dir)].count("checkpoint_failed") >= 1


@pytest.mark.slow
def test_no_room_at_the_end_fails_loudly_and_the_same_command_ends_it(
    reference_digest: str, run_dir: Path
) -> None:
    run = TrainProcess(run_dir, "launch.processes=1")
    run.wait_for_rows(35)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
    assert run.wait_for_exit() == 1
    assert "last checkpoint could not be written" in run.stderr_text
    train_small(run_dir, *LONG_OVERRIDES, "launch.processes=2")
    assert weights_digest(run_dir) == reference_digest
    assert [row["step"] for row in read_rows(run_dir)] == list(range(1, STEPS + 1))


MOUNT_SCRIPT = """
set -e
mount -t tmpfs -o size=64m none "$1"
shift
"$@"
"""

DISK_FAULT_SCRIPT = """
import os, subprocess, sys, time

kind, disk, words = sys.argv[1], sys.argv[2], sys.argv[3:]
run = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
folder = disk + "/run"
rows = folder + "/metrics.jsonl"
while not (os.path.exists(rows) and open(rows).read().count(chr(10)) >= 12):
    assert run.poll() is None
    time.sleep(0.01)
if kind == "full":
    filler = open(disk + "/filler", "wb", buffering=0)
    try:
        while True:
            filler.write(bytes(4096))
    except OSError as error:
        assert error.errno == 28
else:  # read-only for everyone who opens a file from now on
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
said, mended = "", False
for line in run.stderr:
    said += line
    if not mended and "CANNOT WRITE" in said and "CHECKPOINT FAILED" in said:
        mended = True
        if kind == "full":
            filler.close()
            os.remove(disk + "/filler")
        else:
            subprocess.run(["umount", folder], check=True)
print(said)
print(open(folder + "/metrics.jsonl").read().count(chr(10)))
print(open(folder + "/events.jsonl").read().splitlines()[-1])
sys.exit(run.wait())
"""


@pytest.mark.parametrize(
    ("kind", "reason"), [("full", "No space left"), ("read-only", "Read-only file system")]
)
def test_a_disk_that_is_full_or_read_only_for_a_while(
    kind: str, reason: str, reference_digest: str, tmp_path: Path
) -> None:
    """Real errors of a file system of our own, where the machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    prefix = ("unshare", "-rm", "sh", "-c", MOUNT_SCRIPT, "sh", str(disk))
    try:
        can_mount = (
            subprocess.run([*prefix, "true"], capture_output=True, timeout=20).returncode == 0
        )
    except OSError:
        can_mount = False
    if not can_mount:
        pytest.skip("this machine lets no one mount a file system (unshare -rm)")
    command = [
        sys.executable, "-m", "cordee", "train", *SMALL, *LONG_OVERRIDES, "launch.processes=2",
        f"run.dir={disk}/run",
    ]  # fmt: skip
    result = subprocess.run(
        [*prefix, sys.executable, "-c", DISK_FAULT_SCRIPT, kind, str(disk), *command],
        env=clean_environment(), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert reason in result.stdout
    *_, row_count, last_event = result.stdout.splitlines()
    assert int(row_count) == STEPS
    assert reference_digest in last_event


@pytest.mark.slow
def test_ctrl_c_twice_leaves_at_once_and_the_run_goes_on_later(
    reference_digest: str, run_dir: Path
) -> None:
    run = TrainProcess(run_dir, "launch.processes=2")
    run.wait_for_rows(25)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.005)
    run.process.send_signal(signal.SIGINT)
    assert run.wait_for_exit(20) == 130, run.stderr_text[-2000:]
    assert "Traceback" not in run.stderr_text
    train_small(run_dir, *LONG_OVERRIDES, "launch.processes=3")
    assert weights_digest(run_dir) == reference_digest
    assert [row["step"] for row in read_rows(run_dir)] == list(range(1, STEPS + 1))


def test_a_second_process_is_refused_and_the_first_is_unharmed(
    reference_digest: str, run_dir: Path
) -> None:
    run = TrainProcess(run_dir, "launch.processes=1")
    run.wait_for_rows(5)
    second_result = run_cordee(
        "train", *SMALL, *LONG_OVERRIDES, f"run.dir={run_dir}", "launch.processes=1"
    )
    assert second_result.returncode == 2
    assert "another process trains in this folder" in second_result.stderr
    assert run.wait_for_exit() == 0
    assert weights_digest(run_dir) == reference_digest


def test_no_rank_outlives_its_launcher(run_dir: Path) -> None:
    run = TrainProcess(run_dir, "launch.processes=3", "run.steps=100000")
    run.wait_for_rows(5)
    child_pids = (
        Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    )
    assert len(child_pids) >= 3  # a slow machine has a warm spare by now
    run.process.kill()
    run.wait_for_exit(10)
    end_s = time.monotonic() + 5
    while any(_is_alive(int(pid)) for pid in child_pids):
        assert time.monotonic() < end_s, f"orphans among {child_pids}"
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_torchrun_starts_the_same_run(reference_digest: str, run_dir: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "cordee", "train", *SMALL, *LONG_OVERRIDES, f"run.dir={run_dir}"],
        env=clean_environment(), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert weights_digest(run_dir) == reference_digest


def test_a_launcher_of_another_size_is_refused(run_dir: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cordee", "train", *SMALL, f"run.dir={run_dir}",
         "launch.processes=4"],
        env={**clean_environment(), "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2
    assert "launch.processes" in result.stderr
    assert not run_dir.exists()


def test_a_source_file_that_changes_during_the_run(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the same words again and again, and some of them differ: \n" * 2000)
    folder = tmp_path / "run"
    overrides = ("data.path=" + str(text), "data.tokens=0", "launch.processes=1")
    run = TrainProcess(folder, *overrides)
    run.wait_for_rows(5)
    text.write_text("something else entirely\n" * 10)
    assert run.wait_for_exit() == 0, run.stderr_text[-2000:]
    assert "data changed on disk" in run.stderr_text
    change_events = [e for e in read_events(folder) if e["event"] == "data_changed"]
    assert len(change_events) == 1
    assert str(text) in str(change_events[0]["files"])


def test_a_run_that_was_killed_before_its_last_word_says_it_later(
    reference_digest: str, run_dir: Path
) -> None:
    """All steps are done and saved, only the end is missing: there is no step left to measure."""
    overrides = ("launch.processes=2",)
    train_small(run_dir, *LONG_OVERRIDES, *overrides)
    events_file = run_dir / "events.jsonl"
    events_file.write_text("".join(events_file.read_text().splitlines(keepends=True)[:-1]))
    result = train_small(run_dir, *LONG_OVERRIDES, *overrides)
    assert weights_digest(run_dir) == reference_digest and "plan against run" in result.stderr
    assert [row["step"] for row in read_rows(run_dir)] == list(range(1, STEPS + 1))
