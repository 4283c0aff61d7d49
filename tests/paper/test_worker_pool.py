"""A host that has no room for a worker: others go on, and it is tried again."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cordee.elastic import supervisor as supervisor_module
from cordee.elastic.failure_detector import Timeouts
from cordee.elastic.hosts import RendezvousConfig
from cordee.elastic.oom import oom_kills
from cordee.elastic.run_lock import RunLock
from cordee.elastic.run_progress import SupervisorConfig
from cordee.elastic.supervisor import Supervisor
from cordee.errors import RunError


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    """One of a host alone, whose workers are processes that wait."""
    supervisor_config = SupervisorConfig(
        worker_config="{}", no_fork_cause="as this test says",
        replan=lambda islands, devices=(): ("{}", islands), island_size=1, num_ranks=2, spares=0,
        threads=1, heartbeat_timeout_s=60, startup_timeout_s=60, max_failures=3, recover=True,
        run_lock=RunLock(tmp_path / "lock"),
    )  # fmt: skip
    rendezvous_config = RendezvousConfig(
        timeouts=Timeouts(), device_kind="cpu", is_finished=lambda: False
    )
    return Supervisor(supervisor_config, rendezvous_config)


def test_a_kill_by_the_kernel_is_named(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cgroup_file, v1_dir = tmp_path / "own", tmp_path / "memory" / "job"
    cgroup_file.write_text("4:cpu,memory:/job\n0::/a/b\n")
    assert oom_kills(tmp_path, cgroup_file, tmp_path / "none") == 0
    v1_dir.mkdir(parents=True)
    (v1_dir / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert oom_kills(tmp_path, cgroup_file, tmp_path / "none") == 3
    cgroup_file.write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "memory.events").write_text("low 0\noom 9\noom_kill 5\n")
    assert oom_kills(tmp_path, cgroup_file, tmp_path / "none") == 5
    kill_counts = iter(
        (supervisor._oom_count, supervisor._oom_count + 1, supervisor._oom_count + 2)
    )
    monkeypatch.setattr(supervisor_module, "oom_kills", lambda: next(kill_counts))
    assert supervisor._describe_death(-9) == "was killed by signal 9 (SIGKILL)"
    assert supervisor._describe_death(-9).endswith(", as the kernel was out of memory")
    assert supervisor._describe_death(-11) == "was killed by signal 11 (SIGSEGV)"


def refuse_start(*_: Any, **__: Any) -> subprocess.Popen[bytes]:
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def test_a_worker_that_the_system_refuses_is_tried_again(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start_worker: Callable[[], bool] = supervisor._start_worker
    descriptor_count = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuse_start)
        with pytest.raises(RunError, match="no worker can be started"):
            start_worker()
    assert len(os.listdir("/proc/self/fd")) == descriptor_count
    try:
        assert start_worker()
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", refuse_start)
            assert not start_worker() and not start_worker()
        assert capsys.readouterr().err.count("cannot be started") == 1
        monkeypatch.setattr(supervisor_module, "START_RETRY_S", 0.0)
        supervisor._start_missing(is_urgent=False)
        assert len(supervisor.pool.workers) == 2
    finally:
        supervisor.pool.shutdown(0.0)
