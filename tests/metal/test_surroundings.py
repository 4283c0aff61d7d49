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
from cordee.dist.process_group import python_command
from tests.conftest import SMALL, clean_environment, read_events

MODULE_NAMES = (
    "torch",
    "numpy",
    "random",
    "json",
    "argparse",
    "difflib",
    "signal",
    "socket",
    "logging",
)
"""Modules that the command imports, the server of `launch` and workers too."""

SCRIPT = """
import cordee
import beside

def rank(world):
    return beside.TEN * world.rank

if __name__ == "__main__":
    print(cordee.launch(rank, ranks=2))
"""


def write_module_files(folder: Path, *extra_names: str) -> None:
    for name in (*MODULE_NAMES, *extra_names):
        (folder / f"{name}.py").write_text(f"raise SystemExit('the user\\'s {name}.py ran')\n")


def run_command(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=300
    )


def test_workers_import_nothing_of_the_current_folder(tmp_path: Path) -> None:
    write_module_files(tmp_path, "cordee", "typing")
    arguments = ("train", *SMALL, "run.dir=run", "run.steps=1", "launch.processes=2")
    result = run_command(tmp_path, *python_command(), *arguments, "evaluate.sample=0")
    assert result.returncode == 0, result.stderr[-2000:]
    assert read_events(tmp_path / "run")[-1]["event"] == "finished"


def test_module_form_imports_nothing_of_the_current_folder(tmp_path: Path) -> None:
    # But for a cordee.py there, which Python itself takes for the module that -m names.
    write_module_files(tmp_path)
    result = run_command(tmp_path, sys.executable, "-m", "cordee", "config", "explain", "optim.lr")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("optim.lr")


def test_ranks_of_launch_import_what_the_script_does(tmp_path: Path) -> None:
    script_folder, current_folder = tmp_path / "scripts", tmp_path / "current"
    script_folder.mkdir()
    current_folder.mkdir()
    write_module_files(current_folder, "cordee")
    (script_folder / "script.py").write_text(SCRIPT)
    (script_folder / "beside.py").write_text("TEN = 10\n")
    result = run_command(current_folder, sys.executable, str(script_folder / "script.py"))
    assert (result.returncode, result.stdout) == (0, "[0, 10]\n"), result.stderr[-2000:]


def open_broken_pipe() -> int:
    """The writing end of a pipe that nobody reads."""
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    return write_fd


@pytest.mark.parametrize("descriptor", [1, 2])
def test_lines_for_a_reader_that_has_left_are_dropped(descriptor: int) -> None:
    saved_fd, broken_fd = os.dup(descriptor), open_broken_pipe()
    try:
        os.dup2(broken_fd, descriptor)
        stream = streams._wrap_stream(descriptor, None)
        for _ in range(3):
            print("x" * 100_000, file=stream, flush=True)
    finally:
        os.dup2(saved_fd, descriptor)
        os.close(saved_fd)
        os.close(broken_fd)


@pytest.mark.parametrize(("descriptor", "code"), [(1, 1), (2, 0)])
def test_full_disk_under_a_stream(descriptor: int, code: int, tmp_path: Path) -> None:
    """A result that could not be written is a failure, a line for the person is none."""
    redirect = {1: "> /dev/full", 2: "2> /dev/full"}[descriptor]
    command = f'"$@" config explain optim {redirect}'
    result = run_command(tmp_path, "bash", "-c", command, "-", *python_command())
    assert result.returncode == code
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
    assert ("cannot be written" in result.stderr) == (code == 1)


@pytest.mark.parametrize("end", ["| true", ">&-", "<&- >&- 2>&-"])
def test_verb_whose_output_nobody_reads(end: str, tmp_path: Path) -> None:
    command = f'set -o pipefail; "$@" plan launch.processes=2 --save plan.json {end}'
    result = run_command(tmp_path, "bash", "-c", command, "-", *python_command())
    assert (result.returncode, result.stdout, "Traceback" in result.stderr) == (0, "", False), (
        result.stderr
    )


def test_run_goes_on_when_its_lines_are_not_read(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with os.fdopen(open_broken_pipe(), "wb", buffering=0, closefd=True) as broken_file:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(broken_file, write_through=True))
        overrides = ("run.steps=2", "launch.processes=1", "evaluate.sample=0", f"run.dir={run_dir}")
        assert main(["train", *SMALL, *overrides]) == 0
        monkeypatch.undo()
    assert read_events(run_dir)[-1]["event"] == "finished"
