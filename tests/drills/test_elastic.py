"""Islands that leave when they are told to, sharded islands that lose a rank, and orderly ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cordee.fault.course import HURRY
from tests.conftest import digest, events, rows, train
from tests.drills.live import Live, same_descent

STEPS = 40
WORDS = ("run.exact=true", f"run.steps={STEPS}", "evaluate.sample=0", "checkpoint.every=10",
         "fault.silence_s=100")  # fmt: skip


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the undisturbed run on one process."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    train(folder, *WORDS, "launch.processes=1")
    return digest(folder)


def islands(folder: Path) -> list[int]:
    """How many islands computed, each number once for as long as it stayed."""
    given = [int(str(row["islands"])) for row in rows(folder)]
    return [now for before, now in zip([0, *given], given, strict=False) if now != before]


@pytest.mark.parametrize("start", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_who_is_told_to_leave_leaves_and_nobody_takes_its_place(
    start: int, clean: str, run_dir: Path
) -> None:
    with Live(run_dir, *WORDS, f"launch.processes={start}") as run:
        for index, rank in enumerate([1, 0][: start - 2]):
            run.until_step(8 * (index + 1))
            pid = run.ranks()[rank]
            os.kill(pid, signal.SIGTERM)
            run.until(lambda pid=pid: pid not in run.workers())  # type: ignore[misc]
            assert "it was told to leave by SIGTERM" in str(run.until(lambda: run.told("left")))
        assert run.end() == 0, run.said[-3000:]
        assert not run.told("lost") and not run.told("joined")
    assert islands(run_dir) == list(range(start, 1, -1))
    same_descent(run_dir, clean, STEPS)


@pytest.mark.slow
def test_islands_leave_die_and_are_replaced_in_one_run(clean: str, run_dir: Path) -> None:
    """3, told: 2, killed: 1 until another worker is ready, 2."""
    with Live(run_dir, *WORDS, "launch.processes=3", "fault.spares=0") as run:
        run.until_step(5)
        os.kill(run.ranks()[2], signal.SIGTERM)
        run.until(lambda: run.told("left"))
        run.until_step(12)
        os.kill(run.ranks()[0], signal.SIGKILL)
        assert run.end() == 0, run.said[-3000:]
    assert islands(run_dir)[:3] == [3, 2, 1]
    same_descent(run_dir, clean, STEPS)


def slowly(number: signal.Signals, processes: int) -> object:
    return pytest.param(number, processes, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("told", "processes"),
    [
        (signal.SIGHUP, 2), slowly(signal.SIGHUP, 1), slowly(signal.SIGUSR1, 1),
        slowly(signal.SIGUSR2, 2), slowly(signal.SIGQUIT, 2),
        *(slowly(told, count) for told in (signal.SIGTERM, signal.SIGINT) for count in (1, 2)),
    ],
)  # fmt: skip
def test_all_leave_in_good_order_and_come_back(
    told: signal.Signals, processes: int, clean: str, run_dir: Path
) -> None:
    words = (*WORDS, f"launch.processes={processes}")
    with Live(run_dir, *words) as run:
        run.until_step(12)
        run.process.send_signal(told)
        if told not in HURRY:  # as a terminal does that is closed
            run.process.send_signal(told)
        assert run.end() == 128 + told, run.said[-3000:]
        assert events(run_dir)[-1]["event"] == "interrupted" and events(run_dir)[-1]["saved"]
    made = len(rows(run_dir))
    train(run_dir, *words)
    (resumed,) = [event for event in events(run_dir) if event["event"] == "resumed"]
    assert resumed["step"] == made
    same_descent(run_dir, clean, STEPS)


@pytest.mark.slow
def test_the_last_worker_that_is_told_to_leave_takes_all_along(clean: str, run_dir: Path) -> None:
    words = (*WORDS, "launch.processes=2", "layout.shard=2", "fault.spares=0")
    with Live(run_dir, *words) as run:
        run.until_step(12)
        os.kill(run.ranks()[1], signal.SIGTERM)
        assert run.end() == 143, run.said[-3000:]
    train(run_dir, *words)
    same_descent(run_dir, clean, STEPS)


@pytest.mark.parametrize(
    ("processes", "kill", "spares"),
    [
        pytest.param(2, "step.agree:17:1", 0, marks=pytest.mark.slow),
        pytest.param(2, "step.update:17:0", 1, marks=pytest.mark.slow),
        (4, "step.agree:17:3", 0),
        pytest.param(4, "step.reduce:17:0", 0, marks=pytest.mark.slow),
    ],
)
def test_a_cut_island_that_loses_a_rank(
    processes: int, kill: str, spares: int, clean: str, run_dir: Path
) -> None:
    """Alone it waits until it is whole again; else the other island goes on."""
    words = (f"launch.processes={processes}", "layout.shard=2", f"fault.kill={kill}")
    with Live(run_dir, *WORDS, *words, f"fault.spares={spares}", "fault.copy_every=5") as run:
        if spares:
            run.until_spares(spares)
        assert run.end() == 0, run.said[-3000:]
        assert len(run.told("lost")) == 1
        if processes == 4:
            assert islands(run_dir)[:2] == [2, 1]
    same_descent(run_dir, clean, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis",
    ["layout.tensor=2", "layout.pipeline=2 model.layers=2", "layout.context=2",
     "layout.expert=2 model.moe.experts=4"],
)  # fmt: skip
def test_an_island_of_any_axis_that_loses_a_rank_is_made_whole_by_a_spare(
    axis: str, tmp_path: Path
) -> None:
    """What the dead rank alone held comes from its neighbour's memory. The same layout adds in the
    same order, so that even here, where bits are not promised over layouts, they are the same."""
    words = [*WORDS[1:], *axis.split(), "launch.processes=2", "fault.copy_every=5", "run.steps=24"]
    train(tmp_path / "clean", *words)
    with Live(tmp_path / "run", *words, "fault.kill=step.agree:17:1") as run:
        run.until_spares(1)
        assert run.end() == 0, run.said[-3000:]
        (quorum,) = run.told("quorum")
        # Of context, both ranks have all parameters: nothing is older than the interrupted step.
        assert quorum["step"] == (16 if "context" in axis else 15), quorum
        assert not run.told("resumed")
    same_descent(tmp_path / "run", digest(tmp_path / "clean"), 24)
