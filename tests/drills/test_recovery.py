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

from tests.conftest import digest, events, train
from tests.drills.live import Live, same_descent

STEPS = 48
WORDS = (
    "run.exact=true", f"run.steps={STEPS}", "evaluate.sample=0", "checkpoint.every=10",
    "evaluate.every=15",
)  # fmt: skip
TWO = (*WORDS, "launch.processes=2")
PATIENT = "fault.silence_s=100"
"""For drills that stop ranks themselves, and machines that are busy."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the undisturbed run on one process."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    train(folder, *WORDS, "launch.processes=1")
    return digest(folder)


def graded(first: str, *slow: str, nightly: tuple[str, ...] = ()) -> list[object]:
    """Parameters: one that is fast, some that a change has to pass, repetitions of these."""
    return [
        first,
        *(pytest.param(value, marks=pytest.mark.slow) for value in slow),
        *(pytest.param(value, marks=pytest.mark.nightly) for value in nightly),
    ]


# ---- kills at named points -----------------------------------------------------------------------

WARM = graded(
    "step.reduce:12:1,step.update:24:0",
    "step.start:6:0,step.forward:12:0,step.backward:18:0,step.reduce:24:0,step.agree:30:0",
    "step.start:6:1,step.forward:12:1,step.backward:18:1,step.update:24:1,step.agree:30:1",
    "step.commit:7:1,step.commit:13:0,evaluate:15:1,evaluate:30:0,finish:48:1,finish:48:0",
    "save.stage:10:0,save.write:20:1,save.part:30:0,save.manifest:40:0",
    "save.stage:10:1,save.rename:20:0,save.part:30:1,save.delete:40:0",
)


@pytest.mark.parametrize("kills", WARM)
def test_a_warm_spare_takes_the_place_of_the_dead(kills: str, clean: str, run_dir: Path) -> None:
    """A kill in each generation, and a spare for each of them."""
    count = len(kills.split(","))
    words = (f"fault.kill={kills}", f"fault.spares={count}", PATIENT)
    with Live(run_dir, *TWO, *words) as run:
        run.until_spares(count)
        assert run.end() == 0, run.said[-3000:]
        lost = run.told("lost")
        assert len(lost) + (kills.count("finish")) >= count, lost
        assert all("a warm spare takes its place" in str(event["says"]) for event in lost)
    same_descent(run_dir, clean, STEPS)


COLD = graded(
    "step.forward:20:0", "step.update:20:0", "evaluate:15:0", "save.rename:20:0",
    nightly=(
        "step.start:20:1", "step.backward:20:1", "step.reduce:20:0", "step.agree:20:1",
        "step.commit:20:1",
    ),
)  # fmt: skip
"""Every point of a step is one of WARM too."""


@pytest.mark.parametrize("kill", COLD)
def test_without_a_spare_the_others_go_on(kill: str, clean: str, run_dir: Path) -> None:
    with Live(run_dir, *TWO, f"fault.kill={kill}", "fault.spares=0", PATIENT) as run:
        assert run.end() == 0, run.said[-3000:]
        (lost,) = run.told("lost")
        assert "the others go on" in str(lost["says"])
    same_descent(run_dir, clean, STEPS)


DURING = graded(
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


@pytest.mark.parametrize("kills", DURING)
def test_a_kill_during_recovery(kills: str, clean: str, run_dir: Path) -> None:
    """The donor, the receiver, and where nobody is left who knows the state: from disk."""
    with Live(run_dir, *TWO, f"fault.kill={kills}", "fault.spares=2", PATIENT) as run:
        run.until_spares(2)
        assert run.end() == 0, run.said[-3000:]
        assert len(run.told("lost")) == len(kills.split(","))
    same_descent(run_dir, clean, STEPS)


# ---- kills from outside --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_spare_may_die(clean: str, run_dir: Path) -> None:
    with Live(run_dir, *TWO, PATIENT) as run:
        run.until_spares()
        for pid in run.spares():
            os.kill(pid, signal.SIGKILL)
        assert run.end() == 0, run.said[-3000:]
        assert not run.told("lost")
    same_descent(run_dir, clean, STEPS)


@pytest.mark.slow
def test_all_workers_at_once(clean: str, run_dir: Path) -> None:
    """The state is on disk alone, the supervisor goes on from there."""
    with Live(run_dir, *TWO, PATIENT) as run:
        run.until_step(25)
        for pid in run.workers():
            os.kill(pid, signal.SIGKILL)
        assert run.end() == 0, run.said[-3000:]
        assert run.told("resumed")
    same_descent(run_dir, clean, STEPS)


def test_the_supervisor(clean: str, run_dir: Path) -> None:
    """Its workers go with it; the same command goes on from disk."""
    with Live(run_dir, *TWO) as run:
        run.until_step(25)
        run.process.kill()
        run.end()
        run.left_nothing()
    train(run_dir, *TWO)
    same_descent(run_dir, clean, STEPS)


def test_who_dies_before_all_are_ready_is_replaced(clean: str, run_dir: Path) -> None:
    """One that imports, then one that is ready while the other still imports."""
    with Live(run_dir, *TWO, PATIENT) as run:
        first, second = run.until(lambda: w if len(w := sorted(run.workers())) == 2 else None)
        os.kill(first, signal.SIGSTOP)
        os.kill(second, signal.SIGKILL)
        (ready,) = run.until(run.spares)
        os.kill(ready, signal.SIGKILL)
        run.until(lambda: ready not in run.workers())
        os.kill(first, signal.SIGCONT)
        assert run.end() == 0, run.said[-3000:]
    same_descent(run_dir, clean, STEPS)


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.nightly)])
def test_random_kills(kills: int, tmp_path: Path) -> None:
    """Of any worker, ranks, spares and those that import; sometimes two at once or one after
    another while the first is being replaced."""
    seed = int(os.environ.get("DRILL_SEED", random.randrange(1 << 32)))
    print(f"replay: DRILL_SEED={seed} pytest tests/drills/test_recovery.py -k random_kills")
    chance, steps = random.Random(seed), 6 * kills
    words = (*WORDS, f"run.steps={steps}", "evaluate.every=0", "layout.balance=false")
    train(tmp_path / "clean", *words, "launch.processes=1")
    folder = tmp_path / "run"
    # Kills are not failures of a step: however close they come, the run is to go on.
    given = ("launch.processes=2", "fault.spares=2", "fault.tries=1000", PATIENT)
    with Live(folder, *words, *given) as run:
        done = 0
        for step in sorted(chance.sample(range(2, steps - 4), kills)):
            if done >= kills:
                break
            run.until(lambda step=step: run.step >= step)  # type: ignore[misc]
            for _ in range(chance.choice((1, 1, 2))):
                time.sleep(chance.uniform(0, 0.2))
                ranks, others = list(run.ranks().values()), list(run.workers())
                pool = ranks if ranks and chance.random() < 0.7 else others
                if pool:
                    with suppress(ProcessLookupError):
                        os.kill(chance.choice(sorted(pool)), signal.SIGKILL)
                        done += 1
        assert run.end(20 * kills + 120) == 0, run.said[-3000:]
    same_descent(folder, digest(tmp_path / "clean"), steps)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_death_while_the_disk_refuses(rank: int, clean: str, run_dir: Path) -> None:
    """The survivor can write nothing at all; it goes on from memory and makes up for it later."""
    with Live(run_dir, *TWO, PATIENT, "fault.spares=1") as run:
        run.until_spares()
        run.until_step(12)
        ranks = run.ranks()
        for pid in ranks.values():
            os.kill(pid, signal.SIGSTOP)
        for pid in run.workers():
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, hard))
        os.kill(ranks[rank], signal.SIGKILL)
        os.kill(ranks[1 - rank], signal.SIGCONT)
        run.until(lambda: "in generation" in run.said)
        for pid in run.workers():
            with suppress(ProcessLookupError):
                _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert run.end() == 0, run.said[-3000:]
        assert "CANNOT WRITE plan.json" in run.said and not run.told("resumed"), run.said
        assert len(run.told("lost")) == 1
    same_descent(run_dir, clean, STEPS)


# ---- freezes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_frozen_rank_is_named_and_replaced(rank: int, clean: str, run_dir: Path) -> None:
    with Live(run_dir, *TWO, "fault.silence_s=2") as run:
        run.until_step(10)
        pid = run.ranks()[rank]
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        run.until(lambda: run.told("lost"))
        assert time.monotonic() - began > 1.5, "not before it was silent for 2 s"
        with suppress(ProcessLookupError):  # too late: it is gone
            os.kill(pid, signal.SIGCONT)
        assert run.end() == 0, run.said[-3000:]
        (told,) = [event["says"] for event in run.told("lost") if event["pid"] == pid]
        assert told.startswith(f"rank {rank} (pid {pid} on ") and "was silent for" in told
    same_descent(run_dir, clean, STEPS)


@pytest.mark.slow
def test_who_does_not_leave_is_replaced_though_the_next_generation_ends_too(
    tmp_path: Path,
) -> None:
    """A rank is frozen when the other one dies, and who took the place of the dead dies as well."""
    steps, run_dir = 300, tmp_path / "run"
    words = (*WORDS, f"run.steps={steps}", "evaluate.every=0", "batch.microbatches=4")
    train(tmp_path / "clean", *words, "launch.processes=1")
    with Live(run_dir, *words, "launch.processes=2", PATIENT, "fault.spares=2") as run:
        run.until_spares(2)
        run.until_step(150)  # by then it is known how long steps take
        before = run.ranks()
        os.kill(before[1], signal.SIGSTOP)
        os.kill(before[0], signal.SIGKILL)
        run.until(lambda: set(run.ranks().values()) - set(before.values()))
        time.sleep(1)  # less than a rank may take to leave
        for pid in set(run.ranks().values()) - set(before.values()):
            os.kill(pid, signal.SIGKILL)
        assert run.end(60) == 0, run.said[-3000:]
        (told,) = [event["says"] for event in run.told("lost") if event["pid"] == before[1]]
        assert "did not leave generation" in told
    same_descent(run_dir, digest(tmp_path / "clean"), steps)


@pytest.mark.slow
def test_a_short_freeze_changes_nothing(clean: str, run_dir: Path) -> None:
    with Live(run_dir, *TWO, "fault.silence_s=20") as run:
        for step, rank in ((8, 0), (16, 1), (24, 0)):
            run.until_step(step)
            pid = run.ranks()[rank]
            os.kill(pid, signal.SIGSTOP)
            time.sleep(1)
            os.kill(pid, signal.SIGCONT)
        assert run.end() == 0, run.said[-3000:]
        assert {"lost", "broken", "joined"}.isdisjoint(str(e["event"]) for e in events(run_dir))
    same_descent(run_dir, clean, STEPS)


# ---- failures that repeat ------------------------------------------------------------------------


def test_a_failure_that_repeats_stops_with_the_first_cause(run_dir: Path) -> None:
    words = ("fault.crash=step.backward:5:0", "fault.tries=3", PATIENT)
    with Live(run_dir, *TWO, *words) as run:
        assert run.end() == 1, run.said[-3000:]
        assert "stopped after 3 failures in a row at step 5" in run.said
        assert run.step == 4
    last = run.said.rstrip().splitlines()[-1]
    assert last == "[rank0]: RuntimeError: the drill fault.crash at step.backward of step 5"


@pytest.mark.slow
def test_a_verdict_is_not_tried_again(run_dir: Path) -> None:
    words = ("fault.poison=7-40:1", "guard.in_a_row=3", PATIENT)
    with Live(run_dir, *TWO, *words) as run:
        assert run.end() == 1, run.said[-3000:]
        assert len(run.told("stopped")) == 1 and not run.told("lost")
    assert "3 steps in a row were dropped" in run.said
