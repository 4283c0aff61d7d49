"""Runs on a system without Linux's own calls, imitated by taking them away: the same descent."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import clean_environment, read_events, run_cordee, train_small, weights_digest
from tests.drills.background_run import BackgroundRun, check_same_descent

SITE_CUSTOMIZE = """
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

from cordee.hardware import system

system.PROC, system.DESCRIPTORS = Path("/nothing/there"), (Path("/dev/fd"),)
"""
"""What Python runs before anything else in every process of such a run."""

OVERRIDES = ("run.exact=true", "run.steps=90", "evaluate.sample=0", "checkpoint.every=10")


@pytest.fixture
def python_path(tmp_path: Path) -> str:
    """Where Python finds `SITE_CUSTOMIZE`, and the package."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
    return f"{site}:{clean_environment()['PYTHONPATH']}"


@pytest.mark.slow
def test_a_kill_a_ctrl_c_and_the_supervisors_death_without_linux_calls(
    python_path: str, run_dir: Path, tmp_path: Path
) -> None:
    train_small(tmp_path / "clean", *OVERRIDES, "launch.processes=1")
    overrides = (*OVERRIDES, "launch.processes=2", "fault.spares=0")
    with BackgroundRun(run_dir, *overrides, PYTHONPATH=python_path) as run:
        run.wait_for_step(12)
        assert not run.pids_by_rank(), "names come from /proc, which was taken away"
        os.kill(_rank_pid(run_dir, rank=1), signal.SIGKILL)
        run.wait_until(lambda: run.events_named("lost"))
        run.wait_for_step(run.step_count + 12)
        run.process.send_signal(signal.SIGINT)
        assert run.wait_exit() == 128 + signal.SIGINT, run.output
        assert "Traceback" not in run.output
    with BackgroundRun(run_dir, *overrides, PYTHONPATH=python_path) as run:
        run.wait_for_step(run.step_count + 5)
        assert len(run.worker_names()) == 2
        run.process.kill()  # at its end nothing of it may be left: the workers see it
    result = run_cordee("train", *run.arguments[1:], PYTHONPATH=python_path)
    assert result.returncode == 0, result.stderr
    check_same_descent(run_dir, weights_digest(tmp_path / "clean"), 90)


def _rank_pid(folder: Path, rank: int) -> int:
    """Of the rank's process in the newest generation."""
    members = [event["members"] for event in read_events(folder) if event.get("members")][-1]
    return int(members[rank]["pid"])  # type: ignore[index]
