"""Runs on a system without Linux's own calls, imitated by taking them away: the same descent."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import clean_environment, cordee, digest, events, train
from tests.drills.live import Live, same_descent

WITHOUT = """
import ctypes, os, signal, socket
from pathlib import Path

for module, names in (
    (os, ("memfd_create", "pidfd_open", "pipe2", "sched_getaffinity", "waitid")),
    (signal, ("pidfd_send_signal",)),
    (socket, ("SOCK_SEQPACKET", "TCP_USER_TIMEOUT", "SO_ACCEPTCONN")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name == "prctl":
            raise AttributeError(name)
        return super().__getattr__(name)

ctypes.CDLL = Library

from cordee import system

system.PROC, system.DESCRIPTORS = Path("/nothing/there"), (Path("/dev/fd"),)
"""
"""What Python runs before anything else in every process of such a run."""

WORDS = ("run.exact=true", "run.steps=90", "evaluate.sample=0", "checkpoint.every=10")


@pytest.fixture
def python_path(tmp_path: Path) -> str:
    """Where Python finds `WITHOUT`, and the package."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WITHOUT)
    return f"{site}:{clean_environment()['PYTHONPATH']}"


@pytest.mark.slow
def test_a_kill_a_ctrl_c_and_the_supervisors_death_without_linux_calls(
    python_path: str, run_dir: Path, tmp_path: Path
) -> None:
    train(tmp_path / "clean", *WORDS, "launch.processes=1")
    words = (*WORDS, "launch.processes=2", "fault.spares=0")
    with Live(run_dir, *words, PYTHONPATH=python_path) as run:
        run.until_step(12)
        assert not run.ranks(), "names come from /proc, which was taken away"
        os.kill(_pid(run_dir, rank=1), signal.SIGKILL)
        run.until(lambda: run.told("lost"))
        run.until_step(run.step + 12)
        run.process.send_signal(signal.SIGINT)
        assert run.end() == 128 + signal.SIGINT, run.said
        assert "Traceback" not in run.said
    with Live(run_dir, *words, PYTHONPATH=python_path) as run:
        run.until_step(run.step + 5)
        assert len(run.workers()) == 2
        run.process.kill()  # at its end nothing of it may be left: the workers see it
    done = cordee("train", *run.words[1:], PYTHONPATH=python_path)
    assert done.returncode == 0, done.stderr
    same_descent(run_dir, digest(tmp_path / "clean"), 90)


def _pid(folder: Path, rank: int) -> int:
    """Of the rank's process in the newest generation."""
    members = [event["members"] for event in events(folder) if event.get("members")][-1]
    return int(members[rank]["pid"])  # type: ignore[index]
