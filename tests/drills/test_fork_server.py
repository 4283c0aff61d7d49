"""Kills of workers, of the process that they are forks of, and of the supervisor of both."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import train_small, weights_digest
from tests.drills.background_run import BackgroundRun, check_same_descent

STEPS = 60
OVERRIDES = (
    "run.exact=true", f"run.steps={STEPS}", "evaluate.sample=0", "checkpoint.every=20",
    "fault.silence_s=100", "fault.spares=0",
)  # fmt: skip
TWO_PROCESSES = (*OVERRIDES, "launch.processes=2")
LONG = "run.steps=100000"
"""For runs that are ended, not waited for; `test_recovery.py` looks at the bits."""


@pytest.fixture(scope="module")
def reference_digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the undisturbed run on one process."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    train_small(folder, *OVERRIDES, "launch.processes=1")
    return weights_digest(folder)


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def wait_for_template(run: BackgroundRun, old_pid: int = 0) -> int:
    """The pid of a template that is another one than before. A fork of it has its name at first."""

    def new_pids() -> list[int]:
        pids = [pid for pid in run.template_pids() if pid != old_pid]
        return pids if len(pids) == 1 else []

    return int(run.wait_until(new_pids)[0])


def wait_for_replacement(run: BackgroundRun, dead_pid: int) -> int:
    """Until both ranks compute again; the pid of the new one of the rank that died."""

    def new_pids() -> set[int]:
        pids = set(run.pids_by_rank().values())
        return pids if len(pids) == 2 and dead_pid not in pids else set()

    return max(run.wait_until(new_pids))


def test_kills_of_a_worker_and_of_its_template(run_dir: Path) -> None:
    """Ranks outlive the template, which is started again and forks the next replacement."""
    with BackgroundRun(run_dir, *TWO_PROCESSES, LONG) as run:
        run.wait_for_step(5)
        template_pid = wait_for_template(run)
        ranks = run.pids_by_rank()
        assert {command_line(pid) for pid in ranks.values()} == {command_line(template_pid)}
        os.kill(ranks[1], signal.SIGKILL)
        first_pid = wait_for_replacement(run, ranks[1])
        assert command_line(first_pid) == command_line(template_pid)

        ranks = run.pids_by_rank()
        os.kill(template_pid, signal.SIGKILL)
        new_template_pid = wait_for_template(run, template_pid)
        assert run.pids_by_rank() == ranks and "the fork server is started again" in run.output

        run.process.send_signal(signal.SIGSTOP)  # so that it sees both deaths at once
        os.kill(new_template_pid, signal.SIGKILL)
        os.kill(ranks[0], signal.SIGKILL)
        run.process.send_signal(signal.SIGCONT)
        second_pid = wait_for_replacement(run, ranks[0])
        assert command_line(second_pid) == command_line(wait_for_template(run, new_template_pid))
        assert [e["rank"] for e in run.events_named("lost")] == [1, 0], run.output[-3000:]


def test_a_template_that_is_killed_while_it_imports_is_started_again(run_dir: Path) -> None:
    with BackgroundRun(run_dir, *TWO_PROCESSES, "run.steps=20") as run:

        def importing_pids() -> list[int]:
            return [pid for pid, name in run.process_names().items() if name == "import"]

        (pid,) = run.wait_until(importing_pids)
        os.kill(pid, signal.SIGKILL)
        new_pid = wait_for_template(run)
        ranks = run.wait_until(lambda: len(run.pids_by_rank()) == 2 and run.pids_by_rank())
        assert {command_line(rank_pid) for rank_pid in ranks.values()} == {command_line(new_pid)}
        assert run.wait_exit() == 0, run.output[-3000:]
        assert "each worker imports" not in run.output


def test_a_template_that_hangs_is_replaced(run_dir: Path) -> None:
    with BackgroundRun(run_dir, *TWO_PROCESSES, LONG) as run:
        run.wait_for_step(5)
        template_pid, rank_pid = wait_for_template(run), run.pids_by_rank()[1]
        os.kill(template_pid, signal.SIGSTOP)
        os.kill(rank_pid, signal.SIGKILL)
        new_pid = wait_for_template(run, template_pid)
        assert "it did not answer within 2 s" in run.output
        assert command_line(wait_for_replacement(run, rank_pid)) == command_line(new_pid)


@pytest.mark.parametrize("moment", ["import", "step"])
def test_nothing_outlives_the_supervisor(moment: str, run_dir: Path) -> None:
    with BackgroundRun(run_dir, *TWO_PROCESSES) as run:
        if moment == "import":
            run.wait_until(lambda: "import" in run.process_names().values())
        else:
            run.wait_for_step(3)
            assert wait_for_template(run) and len(run.pids_by_rank()) == 2
        run.process.kill()
        run.wait_exit()
        run.check_nothing_left()


def test_without_a_fork_server_it_is_said_and_bits_are_the_same(
    reference_digest: str, run_dir: Path
) -> None:
    with BackgroundRun(run_dir, *TWO_PROCESSES, "launch.fork_server=false") as run:
        run.wait_for_step(3)
        assert not run.template_pids()
        assert run.wait_exit() == 0, run.output[-3000:]
        assert run.output.count("each worker imports torch for itself") == 1
        assert "launch.fork_server=false" in run.output
    check_same_descent(run_dir, reference_digest, STEPS)


def test_a_template_that_cannot_import_leaves_it_to_workers(
    reference_digest: str, run_dir: Path, tmp_path: Path
) -> None:
    """A library that starts a thread when it is imported: here, by a file that Python runs."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, threading, time\n"
        "if 'cordee.elastic.fork_server' in sys.orig_argv:\n"
        "    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    path = os.pathsep.join((str(tmp_path), str(Path(__file__).resolve().parents[2])))
    with BackgroundRun(run_dir, *TWO_PROCESSES, PYTHONPATH=path) as run:
        assert run.wait_exit() == 0, run.output[-3000:]
        assert "the fork server failed: its imports started 1 threads" in run.output
    check_same_descent(run_dir, reference_digest, STEPS)
