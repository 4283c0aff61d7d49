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

from tests.conftest import SMALL, clean_environment, cordee, digest, events, rows, train

STEPS = 150
LONG = (
    "run.exact=true", f"run.steps={STEPS}", "evaluate.sample=0", "evaluate.tokens=0",
    "checkpoint.every=10",
)  # fmt: skip


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the long run, undisturbed."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    train(folder, *LONG, "launch.processes=1")
    return digest(folder)


class Running:
    """A run in the background, what it says, and how far it is."""

    def __init__(self, folder: Path, *words: str, prefix: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "cordee", "train", *SMALL, *LONG, *words,
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
    def said(self) -> str:
        """Everything so far."""
        return "".join(self.lines)

    def until(self, step: int, deadline_s: float = 90.0) -> None:
        """Waits until that many rows are written."""
        path = self.folder / "metrics.jsonl"
        self._wait(lambda: path.exists() and path.read_bytes().count(b"\n") >= step, deadline_s)

    def until_it_says(self, text: str, deadline_s: float = 60.0) -> None:
        """Waits for words on the screen."""
        self._wait(lambda: text in self.said, deadline_s)

    def _wait(self, happened: object, deadline_s: float) -> None:
        assert callable(happened)
        end = time.monotonic() + deadline_s
        while not happened():
            assert time.monotonic() < end, self.said[-3000:]
            assert self.process.poll() is None, self.said[-3000:]
            time.sleep(0.01)

    def end(self, deadline_s: float = 120.0) -> int:
        """The exit code."""
        code = self.process.wait(deadline_s)
        self._reader.join(5)
        return code


def test_a_full_disk_is_said_survived_and_made_good(clean: str, run_dir: Path) -> None:
    """The kernel refuses every write beyond 2 KiB of a file for a while, as a full disk would."""
    run = Running(run_dir, "launch.processes=1")
    run.until(12)
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
    run.until_it_says("CANNOT WRITE")
    run.until_it_says("CHECKPOINT FAILED")
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, unlimited)
    assert run.end() == 0, run.said[-3000:]
    assert digest(run_dir) == clean
    assert [row["step"] for row in rows(run_dir)] == list(range(1, STEPS + 1))
    assert [e["event"] for e in events(run_dir)].count("checkpoint_failed") >= 1


@pytest.mark.slow
def test_no_room_at_the_end_fails_loudly_and_the_same_command_ends_it(
    clean: str, run_dir: Path
) -> None:
    run = Running(run_dir, "launch.processes=1")
    run.until(35)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
    assert run.end() == 1
    assert "last checkpoint could not be written" in run.said
    train(run_dir, *LONG, "launch.processes=2")
    assert digest(run_dir) == clean
    assert [row["step"] for row in rows(run_dir)] == list(range(1, STEPS + 1))


MOUNT = """
set -e
mount -t tmpfs -o size=64m none "$1"
shift
"$@"
"""

STORM = """
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
    kind: str, reason: str, clean: str, tmp_path: Path
) -> None:
    """Real errors of a file system of our own, where the machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    prefix = ("unshare", "-rm", "sh", "-c", MOUNT, "sh", str(disk))
    try:
        may = subprocess.run([*prefix, "true"], capture_output=True, timeout=20).returncode == 0
    except OSError:
        may = False
    if not may:
        pytest.skip("this machine lets no one mount a file system (unshare -rm)")
    words = [
        sys.executable, "-m", "cordee", "train", *SMALL, *LONG, "launch.processes=2",
        f"run.dir={disk}/run",
    ]  # fmt: skip
    done = subprocess.run(
        [*prefix, sys.executable, "-c", STORM, kind, str(disk), *words],
        env=clean_environment(), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert reason in done.stdout
    *_, rows_written, last = done.stdout.splitlines()
    assert int(rows_written) == STEPS
    assert clean in last


@pytest.mark.slow
def test_ctrl_c_twice_leaves_at_once_and_the_run_goes_on_later(clean: str, run_dir: Path) -> None:
    run = Running(run_dir, "launch.processes=2")
    run.until(25)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.005)
    run.process.send_signal(signal.SIGINT)
    assert run.end(20) == 130, run.said[-2000:]
    assert "Traceback" not in run.said
    train(run_dir, *LONG, "launch.processes=3")
    assert digest(run_dir) == clean
    assert [row["step"] for row in rows(run_dir)] == list(range(1, STEPS + 1))


def test_a_second_process_is_refused_and_the_first_is_unharmed(clean: str, run_dir: Path) -> None:
    run = Running(run_dir, "launch.processes=1")
    run.until(5)
    second = cordee("train", *SMALL, *LONG, f"run.dir={run_dir}", "launch.processes=1")
    assert second.returncode == 2
    assert "another process trains in this folder" in second.stderr
    assert run.end() == 0
    assert digest(run_dir) == clean


def test_no_rank_outlives_its_launcher(run_dir: Path) -> None:
    run = Running(run_dir, "launch.processes=3", "run.steps=100000")
    run.until(5)
    listed = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    assert len(listed) >= 3  # a slow machine has a warm spare by now
    run.process.kill()
    run.end(10)
    end = time.monotonic() + 5
    while any(_lives(int(pid)) for pid in listed):
        assert time.monotonic() < end, f"orphans among {listed}"
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_torchrun_starts_the_same_run(clean: str, run_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "cordee", "train", *SMALL, *LONG, f"run.dir={run_dir}"],
        env=clean_environment(), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert digest(run_dir) == clean


def test_a_launcher_of_another_size_is_refused(run_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cordee", "train", *SMALL, f"run.dir={run_dir}",
         "launch.processes=4"],
        env={**clean_environment(), "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "launch.processes" in done.stderr
    assert not run_dir.exists()


def test_a_source_file_that_changes_during_the_run(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the same words again and again, and some of them differ: \n" * 2000)
    folder = tmp_path / "run"
    words = ("data.path=" + str(text), "data.tokens=0", "launch.processes=1")
    run = Running(folder, *words)
    run.until(5)
    text.write_text("something else entirely\n" * 10)
    assert run.end() == 0, run.said[-2000:]
    assert "data changed on disk" in run.said
    changed = [e for e in events(folder) if e["event"] == "data_changed"]
    assert len(changed) == 1
    assert str(text) in str(changed[0]["files"])


def test_a_run_that_was_killed_before_its_last_word_says_it_later(
    clean: str, run_dir: Path
) -> None:
    """All steps are done and saved, only the end is missing: there is no step left to measure."""
    words = ("launch.processes=2",)
    train(run_dir, *LONG, *words)
    events_file = run_dir / "events.jsonl"
    events_file.write_text("".join(events_file.read_text().splitlines(keepends=True)[:-1]))
    done = train(run_dir, *LONG, *words)
    assert digest(run_dir) == clean and "plan against run" in done.stderr
    assert [row["step"] for row in rows(run_dir)] == list(range(1, STEPS + 1))
