"""Kills and freezes: others go on, the dead are replaced, and the descent stays bit for bit.

Real processes; the oracle is an undisturbed run of one process, and what the run noted itself.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import read_events, train_small, weights_digest
from tests.drills.background_run import BackgroundRun, check_same_descent

STEPS = 48
OVERRIDES = (
    "run.exact=true", f"run.steps={STEPS}", "evaluate.sample=0", "checkpoint.every=10",
    "evaluate.every=15",
)  # fmt: skip
TWO_PROCESSES = (*OVERRIDES, "launch.processes=2")
LONG_SILENCE = "fault.silence_s=100"
"""For drills that stop ranks themselves, and machines that are busy."""


@pytest.fixture(scope="module")
def reference_digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the undisturbed run on one process."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    train_small(folder, *OVERRIDES, "launch.processes=1")
    return weights_digest(folder)


def graded_params(
    fast_value: str, *slow_values: str, nightly: tuple[str, ...] = ()
) -> list[object]:
    """Parameters: one that is fast, some that a change has to pass, repetitions of these."""
    return [
        fast_value,
        *(pytest.param(value, marks=pytest.mark.slow) for value in slow_values),
        *(pytest.param(value, marks=pytest.mark.nightly) for value in nightly),
    ]


# ---- kills at named points -----------------------------------------------------------------------

KILLS_WITH_SPARES = graded_params(
    "step.reduce:12:1,step.update:24:0",
    "step.start:6:0,step.forward:12:0,step.backward:18:0,step.reduce:24:0,step.agree:30:0",
    "step.start:6:1,step.forward:12:1,step.backward:18:1,step.update:24:1,step.agree:30:1",
    "step.commit:7:1,step.commit:13:0,evaluate:15:1,evaluate:30:0,finish:48:1,finish:48:0",
    "save.stage:10:0,save.write:20:1,save.part:30:0,save.manifest:40:0",
    "save.stage:10:1,save.rename:20:0,save.part:30:1,save.delete:40:0",
)


@pytest.mark.parametrize("kills", KILLS_WITH_SPARES)
def test_a_warm_spare_takes_the_place_of_the_dead(
    kills: str, reference_digest: str, run_dir: Path
) -> None:
    """A kill in each generation, and a spare for each of them."""
    count = len(kills.split(","))
    overrides = (f"fault.kill={kills}", f"fault.spares={count}", LONG_SILENCE)
    with BackgroundRun(run_dir, *TWO_PROCESSES, *overrides) as run:
        run.wait_for_spares(count)
        assert run.wait_exit() == 0, run.output[-3000:]
        loss_events = run.events_named("lost")
        assert len(loss_events) + (kills.count("finish")) >= count, loss_events
        assert all("a warm spare takes its place" in str(event["says"]) for event in loss_events)
    check_same_descent(run_dir, reference_digest, STEPS)


KILLS_WITHOUT_SPARES = graded_params(
    "step.forward:20:0", "step.update:20:0", "evaluate:15:0", "save.rename:20:0",
    nightly=(
        "step.start:20:1", "step.backward:20:1", "step.reduce:20:0", "step.agree:20:1",
        "step.commit:20:1",
    ),
)  # fmt: skip
"""Every point of a step is one of WARM too."""


@pytest.mark.parametrize("kill", KILLS_WITHOUT_SPARES)
def test_without_a_spare_the_others_go_on(kill: str, reference_digest: str, run_dir: Path) -> None:
    with BackgroundRun(
        run_dir, *TWO_PROCESSES, f"fault.kill={kill}", "fault.spares=0", LONG_SILENCE
    ) as run:
        assert run.wait_exit() == 0, run.output[-3000:]
        (loss_event,) = run.events_named("lost")
        assert "the others go on" in str(loss_event["says"])
    check_same_descent(run_dir, reference_digest, STEPS)


KILLS_IN_RECOVERY = graded_params(
    "step.agree:20:1,fill:19:0",
    "step.agree:20:1,group:0:1",
    "step.agree:20:1,fill.round:19:0",
    "step.agree:20:1,fill.end:19:1,fill:19:0",
    nightly=(
        "step.agree:20:1,fill:0:1",
        "step.agree:20:1,group:19:0",
        "step.agree:20:1,fill.round:19:1",
        "step.agree:20:0,fill.end:19:0",
    ),
)


@pytest.mark.parametrize("kills", KILLS_IN_RECOVERY)
def test_a_kill_during_recovery(kills: str, reference_digest: str, run_dir: Path) -> None:
    """The donor, the receiver, and where nobody is left who knows the state: from disk."""
    with BackgroundRun(
        run_dir, *TWO_PROCESSES, f"fault.kill={kills}", "fault.spares=2", LONG_SILENCE
    ) as run:
        run.wait_for_spares(2)
        assert run.wait_exit() == 0, run.output[-3000:]
        assert len(run.events_named("lost")) == len(kills.split(","))
    check_same_descent(run_dir, reference_digest, STEPS)


# ---- kills from outside --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_spare_may_die(reference_digest: str, run_dir: Path) -> None:
    with BackgroundRun(run_dir, *TWO_PROCESSES, LONG_SILENCE) as run:
        run.wait_for_spares()
        for pid in run.spare_pids():
            os.kill(pid, signal.SIGKILL)
        assert run.wait_exit() == 0, run.output[-3000:]
        assert not run.events_named("lost")
    check_same_descent(run_dir, reference_digest, STEPS)


@pytest.mark.slow
def test_all_workers_at_once(reference_digest: str, run_dir: Path) -> None:
    """The state is on disk alone, the supervisor goes on from there."""
    with BackgroundRun(run_dir, *TWO_PROCESSES, LONG_SILENCE) as run:
        run.wait_for_step(25)
        for pid in run.worker_names():
            os.kill(pid, signal.SIGKILL)
        assert run.wait_exit() == 0, run.output[-3000:]
        assert run.events_named("resumed")
    check_same_descent(run_dir, reference_digest, STEPS)


def test_the_supervisor(reference_digest: str, run_dir: Path) -> None:
    """Its workers go with it; the same command goes on from disk."""
    with BackgroundRun(run_dir, *TWO_PROCESSES) as run:
        run.wait_for_step(25)
        run.process.kill()
        run.wait_exit()
        run.check_nothing_left()
    train_small(run_dir, *TWO_PROCESSES)
    check_same_descent(run_dir, reference_digest, STEPS)


def test_who_dies_before_all_are_ready_is_replaced(reference_digest: str, run_dir: Path) -> None:
    """One that imports, then one that is ready while the other still imports."""
    overrides = (LONG_SILENCE, "launch.fork_server=false")  # a fork does not import
    with BackgroundRun(run_dir, *TWO_PROCESSES, *overrides) as run:
        first_pid, second_pid = run.wait_until(
            lambda: worker_pids if len(worker_pids := sorted(run.worker_names())) == 2 else None
        )
        os.kill(first_pid, signal.SIGSTOP)
        os.kill(second_pid, signal.SIGKILL)
        (spare_pid,) = run.wait_until(run.spare_pids)
        os.kill(spare_pid, signal.SIGKILL)
        run.wait_until(lambda: spare_pid not in run.worker_names())
        os.kill(first_pid, signal.SIGCONT)
        assert run.wait_exit() == 0, run.output[-3000:]
    check_same_descent(run_dir, reference_digest, STEPS)


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.nightly)])
def test_random_kills(kills: int, tmp_path: Path) -> None:
    """Of any process but the supervisor: ranks, spares, the one they are forks of; sometimes two at
    once or one after another while the first is being replaced."""
    seed = int(os.environ.get("DRILL_SEED", random.randrange(1 << 32)))
    print(f"replay: DRILL_SEED={seed} pytest tests/drills/test_recovery.py -k random_kills")
    rng, steps = random.Random(seed), 6 * kills
    overrides = (*OVERRIDES, f"run.steps={steps}", "evaluate.every=0", "layout.balance=false")
    train_small(tmp_path / "clean", *overrides, "launch.processes=1")
    folder = tmp_path / "run"
    # Kills are not failures of a step: however close they come, the run is to go on.
    fault_overrides = ("launch.processes=2", "fault.spares=2", "fault.tries=1000", LONG_SILENCE)
    with BackgroundRun(folder, *overrides, *fault_overrides) as run:
        kill_count = 0
        for step in sorted(rng.sample(range(2, steps - 4), kills)):
            if kill_count >= kills:
                break
            run.wait_until(lambda step=step: run.step_count >= step)  # type: ignore[misc]
            for _ in range(rng.choice((1, 1, 2))):
                time.sleep(rng.uniform(0, 0.2))
                rank_pids, workers = list(run.pids_by_rank().values()), list(run.process_names())
                candidates = rank_pids if rank_pids and rng.random() < 0.7 else workers
                if candidates:
                    with suppress(ProcessLookupError):
                        os.kill(rng.choice(sorted(candidates)), signal.SIGKILL)
                        kill_count += 1
        assert run.wait_exit(20 * kills + 120) == 0, run.output[-3000:]
    check_same_descent(folder, weights_digest(tmp_path / "clean"), steps)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_death_while_the_disk_refuses(rank: int, reference_digest: str, run_dir: Path) -> None:
    """The survivor can write nothing at all; it goes on from memory and makes up for it later."""
    with BackgroundRun(run_dir, *TWO_PROCESSES, LONG_SILENCE, "fault.spares=1") as run:
        run.wait_for_spares()
        run.wait_for_step(12)
        ranks = run.pids_by_rank()
        for pid in ranks.values():
            os.kill(pid, signal.SIGSTOP)
        for pid in run.worker_names():
            _, hard_limit = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, hard_limit))
        os.kill(ranks[rank], signal.SIGKILL)
        os.kill(ranks[1 - rank], signal.SIGCONT)
        run.wait_until(lambda: "in generation" in run.output)
        for pid in run.worker_names():
            with suppress(ProcessLookupError):
                _, hard_limit = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard_limit, hard_limit))
        assert run.wait_exit() == 0, run.output[-3000:]
        assert "CANNOT WRITE plan.json" in run.output and not run.events_named("resumed"), (
            run.output
        )
        assert len(run.events_named("lost")) == 1
    check_same_descent(run_dir, reference_digest, STEPS)


# ---- freezes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_frozen_rank_is_named_and_replaced(
    rank: int, reference_digest: str, run_dir: Path
) -> None:
    with BackgroundRun(run_dir, *TWO_PROCESSES, "fault.silence_s=2") as run:
        run.wait_for_step(10)
        pid = run.pids_by_rank()[rank]
        os.kill(pid, signal.SIGSTOP)
        start_s = time.monotonic()
        run.wait_until(lambda: run.events_named("lost"))
        assert time.monotonic() - start_s > 1.5, "not before it was silent for 2 s"
        with suppress(ProcessLookupError):  # too late: it is gone
            os.kill(pid, signal.SIGCONT)
        assert run.wait_exit() == 0, run.output[-3000:]
        (sentence,) = [event["says"] for event in run.events_named("lost") if event["pid"] == pid]
        assert sentence.startswith(f"rank {rank} (pid {pid} on ") and "was silent for" in sentence
    check_same_descent(run_dir, reference_digest, STEPS)


@pytest.mark.slow
def test_who_does_not_leave_is_replaced_though_the_next_generation_ends_too(tmp_path: Path) -> None:
    """A rank is frozen when the other one dies, and who took the place of the dead dies as well."""
    steps, run_dir = 300, tmp_path / "run"
    overrides = (*OVERRIDES, f"run.steps={steps}", "evaluate.every=0", "batch.microbatches=4")
    train_small(tmp_path / "clean", *overrides, "launch.processes=1")
    with BackgroundRun(
        run_dir, *overrides, "launch.processes=2", LONG_SILENCE, "fault.spares=2"
    ) as run:
        run.wait_for_spares(2)
        run.wait_for_step(150)  # by then it is known how long steps take
        old_ranks = run.pids_by_rank()
        os.kill(old_ranks[1], signal.SIGSTOP)
        os.kill(old_ranks[0], signal.SIGKILL)
        run.wait_until(lambda: set(run.pids_by_rank().values()) - set(old_ranks.values()))
        time.sleep(1)  # less than a rank may take to leave
        for pid in set(run.pids_by_rank().values()) - set(old_ranks.values()):
            os.kill(pid, signal.SIGKILL)
        assert run.wait_exit(60) == 0, run.output[-3000:]
        (sentence,) = [
            event["says"] for event in run.events_named("lost") if event["pid"] == old_ranks[1]
        ]
        assert "did not leave generation" in sentence
    check_same_descent(run_dir, weights_digest(tmp_path / "clean"), steps)


@pytest.mark.slow
def test_a_short_freeze_changes_nothing(reference_digest: str, run_dir: Path) -> None:
    with BackgroundRun(run_dir, *TWO_PROCESSES, "fault.silence_s=20") as run:
        for step, rank in ((8, 0), (16, 1), (24, 0)):
            run.wait_for_step(step)
            pid = run.pids_by_rank()[rank]
            os.kill(pid, signal.SIGSTOP)
            time.sleep(1)
            os.kill(pid, signal.SIGCONT)
        assert run.wait_exit() == 0, run.output[-3000:]
        assert {"lost", "broken", "joined"}.isdisjoint(
            str(e["event"]) for e in read_events(run_dir)
        )
    check_same_descent(run_dir, reference_digest, STEPS)


# ---- failures that repeat ------------------------------------------------------------------------


def test_a_failure_that_repeats_stops_with_the_first_cause(run_dir: Path) -> None:
    overrides = ("fault.crash=step.backward:5:0", "fault.tries=3", LONG_SILENCE)
    with BackgroundRun(run_dir, *TWO_PROCESSES, *overrides) as run:
        assert run.wait_exit() == 1, run.output[-3000:]
        assert "stopped after 3 failures in a row at step 5" in run.output
        assert run.step_count == 4
    last_line = run.output.rstrip().splitlines()[-1]
    assert last_line == "[rank0]: RuntimeError: the drill fault.crash at step.backward of step 5"


@pytest.mark.slow
def test_a_verdict_is_not_tried_again(run_dir: Path) -> None:
    overrides = ("fault.poison=7-40:1", "guard.in_a_row=3", LONG_SILENCE)
    with BackgroundRun(run_dir, *TWO_PROCESSES, *overrides) as run:
        assert run.wait_exit() == 1, run.output[-3000:]
        assert len(run.events_named("stopped")) == 1 and not run.events_named("lost")
    assert "3 steps in a row were dropped" in run.output
