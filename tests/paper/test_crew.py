"""A host that has no room for a worker: others go on, and it is tried again."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cordee.errors import RunError
from cordee.fault import supervise
from cordee.fault.course import Post
from cordee.fault.hold import Hold
from cordee.fault.hosts import Meeting
from cordee.fault.members import Member
from cordee.fault.memory import oom_kills
from cordee.fault.pace import Rules
from cordee.fault.supervise import Supervisor


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    """One of a host alone, whose workers are processes that wait."""
    post = Post(
        command=["-c", "import time; time.sleep(60)"], plan="{}",
        plan_for=lambda islands, devices=(): ("{}", islands), inside=1, wants=2, spares=0,
        threads=1, silence_s=60, start_s=60, tries=3, recover=True, hold=Hold(tmp_path / "lock"),
    )  # fmt: skip
    meeting = Meeting(None, lambda me, **given: Member(me, Rules(), **given), lambda: False, "cpu")
    return Supervisor(post, meeting)


def test_a_kill_by_the_kernel_is_named(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, v1 = tmp_path / "own", tmp_path / "memory" / "job"
    own.write_text("4:cpu,memory:/job\n0::/a/b\n")
    assert oom_kills(tmp_path, own, tmp_path / "none") == 0
    v1.mkdir(parents=True)
    (v1 / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert oom_kills(tmp_path, own, tmp_path / "none") == 3
    own.write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "memory.events").write_text("low 0\noom 9\noom_kill 5\n")
    assert oom_kills(tmp_path, own, tmp_path / "none") == 5
    counts = iter((supervisor._ooms, supervisor._ooms + 1, supervisor._ooms + 2))
    monkeypatch.setattr(supervise, "oom_kills", lambda: next(counts))
    assert supervisor._how(-9) == "was killed by signal 9 (SIGKILL)"
    assert supervisor._how(-9).endswith(", as the kernel was out of memory")
    assert supervisor._how(-11) == "was killed by signal 11 (SIGSEGV)"


def refusing(*_: Any, **__: Any) -> subprocess.Popen[bytes]:
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def test_a_worker_that_the_system_refuses_is_tried_again(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start: Callable[[], bool] = supervisor._start
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", refusing)
        with pytest.raises(RunError, match="no worker can be started"):
            start()
    assert len(os.listdir("/proc/self/fd")) == before
    try:
        assert start()
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", refusing)
            assert not start() and not start()
        assert capsys.readouterr().err.count("cannot be started") == 1
        monkeypatch.setattr(supervise, "AGAIN_S", 0.0)
        supervisor._fill_up(now=False)
        assert len(supervisor.crew.workers) == 2
    finally:
        supervisor.crew.end(0.0)
