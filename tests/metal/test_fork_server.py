"""The server that forks workers: what forks are given, whose children they are; where none is."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cordee.config.load import override
from cordee.config.run import Run
from cordee.elastic import fork_server as fork_server_module
from cordee.elastic.fork_server import ForkServer, ForkServerError
from cordee.elastic.worker_pool import MAX_SERVER_STARTS, WorkerPool
from cordee.hardware.system import AdoptedChild, memory_file
from cordee.launcher.prepare import no_fork_cause
from tests.conftest import clean_environment

ENVIRONMENT = {**clean_environment(), "CORDEE_PARENT": str(os.getpid()), "OMP_NUM_THREADS": "3"}
IMPORT_DEADLINE_S = 60.0


def start_server(*modules: str) -> ForkServer:
    """A server that has said whether it may fork."""
    # Without prctl a process would follow its parent by this pipe.
    lifeline, write_end = os.pipe()
    server = ForkServer(modules, {**ENVIRONMENT, "CORDEE_LIFELINE": str(lifeline)}, [lifeline])
    os.close(lifeline)
    os.close(write_end)
    assert select.select([server], [], [], IMPORT_DEADLINE_S)[0]
    return server


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """A server that has this file imported."""
    fork_server = start_server("tests.metal.test_fork_server")
    fork_server.check()
    yield fork_server
    fork_server.close()


def fork(server: ForkServer, function: str, *words: str) -> tuple[AdoptedChild, int]:
    """A fork that calls a function of this file; its standard error."""
    stderr = memory_file("cordee-test")
    entry = f"tests.metal.test_fork_server:{function}"
    return server.fork(entry, words, {"CORDEE_LINE": "1,2"}, stderr, [stderr]), stderr


def read_all(descriptor: int) -> str:
    return os.pread(descriptor, 1 << 20, 0).decode()


# ---- what forks call -----------------------------------------------------------------------------


def describe_fork() -> None:
    """What a fork sees, to the descriptor that its first word names."""
    import sys

    comm = Path("/proc/self/comm").read_text().strip()
    facts = {
        "words": sys.argv, "parent": os.getppid(), "group": os.getpgid(0), "pid": os.getpid(),
        "line": os.environ["CORDEE_LINE"], "threads": os.environ["OMP_NUM_THREADS"], "comm": comm,
        "term": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "files": [int(path.name) for path in Path("/proc/self/fd").iterdir() if path.exists()],
    }  # fmt: skip
    os.write(int(sys.argv[1]), json.dumps(facts).encode())


def fail() -> None:
    """Leaves as a program does that nobody expected to fail."""
    raise ValueError("the fork fails")


def leave_with_seven() -> None:
    raise SystemExit(7)


def wait_to_be_killed() -> None:
    threading.Event().wait(IMPORT_DEADLINE_S)


# ---- forks ---------------------------------------------------------------------------------------


def test_a_fork_is_our_child_and_has_what_it_was_given(server: ForkServer) -> None:
    descriptor = memory_file("cordee-test")
    stderr = memory_file("cordee-test")
    child = server.fork(
        "tests.metal.test_fork_server:describe_fork", [str(descriptor)],
        {"CORDEE_LINE": "7,8"}, stderr, [descriptor],
    )  # fmt: skip
    assert child.wait(IMPORT_DEADLINE_S) == 0, read_all(stderr)
    facts = json.loads(read_all(descriptor))
    assert facts["words"] == ["cordee", str(descriptor)]
    assert facts["parent"] == os.getpid() and facts["group"] == facts["pid"] == child.pid
    assert (facts["line"], facts["threads"], facts["comm"]) == ("7,8", "3", "cordee worker")
    assert facts["term"], "the server ignores what a scheduler sends to all; its forks do not"
    files = {number for number in facts["files"] if number > 2}
    assert descriptor in files and len(files - {descriptor}) <= 1, "at most the lifeline besides"
    os.close(descriptor)
    os.close(stderr)


def test_how_a_fork_ends_is_known(server: ForkServer) -> None:
    child, stderr = fork(server, "fail")
    assert child.wait(IMPORT_DEADLINE_S) == 1
    assert read_all(stderr).splitlines()[-1] == "ValueError: the fork fails"
    child, _ = fork(server, "leave_with_seven")
    assert child.wait(IMPORT_DEADLINE_S) == 7 and child.poll() == 7
    child, _ = fork(server, "wait_to_be_killed")
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)
    child.kill()
    assert child.wait(IMPORT_DEADLINE_S) == -signal.SIGKILL


def test_a_server_that_ends_takes_no_fork_along() -> None:
    server = start_server("tests.metal.test_fork_server")
    server.check()
    child, _ = fork(server, "wait_to_be_killed")
    server._process.kill()
    server._process.wait()
    with pytest.raises(ForkServerError, match="it ended"):
        fork(server, "fail")
    server.close()
    assert child.poll() is None
    child.kill()
    assert child.wait(IMPORT_DEADLINE_S) == -signal.SIGKILL


def test_a_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server_module, "FORK_TIMEOUT_S", 0.2)
    server = start_server("json")
    server.check()
    os.kill(server._process.pid, signal.SIGSTOP)
    with pytest.raises(ForkServerError, match="did not answer"):
        fork(server, "fail")
    server.close()


# ---- where there is none -------------------------------------------------------------------------


def test_imports_after_which_a_fork_is_not_safe(tmp_path: Path) -> None:
    """A thread, an open file, and a module that cannot be imported at all."""
    sources = {
        "with_thread": "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "with_file": "import os\nFILE = os.open('/dev/null', 0)",
        "broken": "raise ImportError('no such library')",
    }
    causes = ("started 1 threads", "left 1 files open", "ImportError: no such library")
    for (name, source), cause in zip(sources.items(), causes, strict=True):
        (tmp_path / f"{name}.py").write_text(source)
        lifeline = os.open(os.devnull, os.O_RDONLY)
        path = os.pathsep.join((ENVIRONMENT["PYTHONPATH"], str(tmp_path)))
        variables = {**ENVIRONMENT, "PYTHONPATH": path, "CORDEE_LIFELINE": str(lifeline)}
        server = ForkServer([name], variables, [lifeline])
        assert select.select([server], [], [], IMPORT_DEADLINE_S)[0]
        with pytest.raises(ForkServerError, match=cause):
            server.check()
        assert not server.is_ready
        server.close()
        os.close(lifeline)


def test_a_system_without_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    with pytest.raises(ForkServerError, match="no pidfd_open"):
        ForkServer(["json"], ENVIRONMENT, [])


def test_runs_whose_workers_are_no_forks() -> None:
    assert no_fork_cause(Run(), "cpu") == ""
    for device in ("cuda", "xpu", "mps"):
        assert device in no_fork_cause(Run(), device)
    without = override(Run(), {"launch.fork_server": False})
    assert no_fork_cause(without, "cpu") == "launch.fork_server=false"


def test_a_worker_with_other_variables_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries read theirs when they are loaded, and in the server they have been."""
    pool = WorkerPool("{}", 1, "lo", ["json"])
    server = pool.start_fork_server()
    assert pool.is_importing and select.select([server], [], [], IMPORT_DEADLINE_S)[0]
    server.check()
    try:
        assert isinstance(pool.start().process, AdoptedChild)
        with monkeypatch.context() as patch:
            patch.setenv("MKL_CBWR", "COMPATIBLE")
            assert isinstance(pool.start().process, subprocess.Popen)
        assert isinstance(pool.start().process, AdoptedChild)
        for _ in range(MAX_SERVER_STARTS - 1):
            pool.start_fork_server()
        with pytest.raises(ForkServerError, match=f"ended {MAX_SERVER_STARTS} times"):
            pool.start_fork_server()
    finally:
        pool.shutdown(0.0)
    assert pool.fork_server is None and not pool.workers
