"""What surrounds a command: files beside it that are called like modules, readers that go away."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cordee.cli.main import main
from cordee.dist import streams
from cordee.dist.start import python_command
from tests.conftest import SMALL, clean_environment, events

NAMES = ("torch", "numpy", "random", "json", "argparse", "difflib", "signal", "socket", "logging")
"""Modules that the command imports, the server of `launch` and workers too."""

SCRIPT = """
import cordee
import beside

def rank(world):
    return beside.TEN * world.rank

if __name__ == "__main__":
    print(cordee.launch(rank, ranks=2))
"""


def files_of_modules(folder: Path, *more: str) -> None:
    for name in (*NAMES, *more):
        (folder / f"{name}.py").write_text(f"raise SystemExit('the user\\'s {name}.py ran')\n")


def start(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=300
    )


def test_workers_import_nothing_of_the_current_folder(tmp_path: Path) -> None:
    files_of_modules(tmp_path, "cordee", "typing")
    words = ("train", *SMALL, "run.dir=run", "run.steps=1", "launch.processes=2")
    done = start(tmp_path, *python_command(), *words, "evaluate.sample=0")
    assert done.returncode == 0, done.stderr[-2000:]
    assert events(tmp_path / "run")[-1]["event"] == "finished"


def test_module_form_imports_nothing_of_the_current_folder(tmp_path: Path) -> None:
    # But for a cordee.py there, which Python itself takes for the module that -m names.
    files_of_modules(tmp_path)
    done = start(tmp_path, sys.executable, "-m", "cordee", "config", "explain", "optim.lr")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("optim.lr")


def test_ranks_of_launch_import_what_the_script_does(tmp_path: Path) -> None:
    scripts, current = tmp_path / "scripts", tmp_path / "current"
    scripts.mkdir()
    current.mkdir()
    files_of_modules(current, "cordee")
    (scripts / "script.py").write_text(SCRIPT)
    (scripts / "beside.py").write_text("TEN = 10\n")
    done = start(current, sys.executable, str(scripts / "script.py"))
    assert (done.returncode, done.stdout) == (0, "[0, 10]\n"), done.stderr[-2000:]


def broken_pipe() -> int:
    """The writing end of a pipe that nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    return writes


@pytest.mark.parametrize("descriptor", [1, 2])
def test_lines_for_a_reader_that_has_left_are_dropped(descriptor: int) -> None:
    held, gone = os.dup(descriptor), broken_pipe()
    try:
        os.dup2(gone, descriptor)
        stream = streams._stream(descriptor, None)
        for _ in range(3):
            print("x" * 100_000, file=stream, flush=True)
    finally:
        os.dup2(held, descriptor)
        os.close(held)
        os.close(gone)


@pytest.mark.parametrize(("descriptor", "code"), [(1, 1), (2, 0)])
def test_full_disk_under_a_stream(descriptor: int, code: int, tmp_path: Path) -> None:
    """A result that could not be written is a failure, a line for the person is none."""
    redirect = {1: "> /dev/full", 2: "2> /dev/full"}[descriptor]
    command = f'"$@" config explain optim {redirect}'
    done = start(tmp_path, "bash", "-c", command, "-", *python_command())
    assert done.returncode == code
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert ("cannot be written" in done.stderr) == (code == 1)


@pytest.mark.parametrize("end", ["| true", ">&-", "<&- >&- 2>&-"])
def test_verb_whose_output_nobody_reads(end: str, tmp_path: Path) -> None:
    command = f'set -o pipefail; "$@" plan launch.processes=2 --save plan.json {end}'
    done = start(tmp_path, "bash", "-c", command, "-", *python_command())
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (0, "", False), done.stderr


def test_run_goes_on_when_its_lines_are_not_read(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with os.fdopen(broken_pipe(), "wb", buffering=0, closefd=True) as gone:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(gone, write_through=True))
        words = ("run.steps=2", "launch.processes=1", "evaluate.sample=0", f"run.dir={run_dir}")
        assert main(["train", *SMALL, *words]) == 0
        monkeypatch.undo()
    assert events(run_dir)[-1]["event"] == "finished"
