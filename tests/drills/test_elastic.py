"""Islands that leave when they are told to, sharded islands that lose a rank, and orderly ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cordee.elastic.run_progress import ABORT_SIGNALS
from tests.conftest import read_events, read_rows, train_small, weights_digest
from tests.drills.background_run import BackgroundRun, check_same_descent

STEPS = 40
OVERRIDES = ("run.exact=true", f"run.steps={STEPS}", "evaluate.sample=0", "checkpoint.every=10",
         "fault.silence_s=100")  # fmt: skip
SLOW_STARTS = "launch.fork_server=false"
"""A fork is there before a step is made without it: for drills in which the others go on."""


@pytest.fixture(scope="module")
def reference_digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the undisturbed run on one process."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    train_small(folder, *OVERRIDES, "launch.processes=1")
    return weights_digest(folder)


def island_counts(folder: Path) -> list[int]:
    """How many islands computed, each number once for as long as it stayed."""
    counts = [int(str(row["islands"])) for row in read_rows(folder)]
    return [
        count for previous, count in zip([0, *counts], counts, strict=False) if count != previous
    ]


@pytest.mark.parametrize("start", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_who_is_told_to_leave_leaves_and_nobody_takes_its_place(
    start: int, reference_digest: str, run_dir: Path
) -> None:
    with BackgroundRun(run_dir, *OVERRIDES, f"launch.processes={start}") as run:
        for index, rank in enumerate([1, 0][: start - 2]):
            run.wait_for_step(8 * (index + 1))
            pid = run.pids_by_rank()[rank]
            os.kill(pid, signal.SIGTERM)
            run.wait_until(lambda pid=pid: pid not in run.worker_names())  # type: ignore[misc]
            assert "it was told to leave by SIGTERM" in str(
                run.wait_until(lambda: run.events_named("left"))
            )
        assert run.wait_exit() == 0, run.output[-3000:]
        assert not run.events_named("lost") and not run.events_named("joined")
    assert island_counts(run_dir) == list(range(start, 1, -1))
    check_same_descent(run_dir, reference_digest, STEPS)


@pytest.mark.slow
def test_islands_leave_die_and_are_replaced_in_one_run(
    reference_digest: str, run_dir: Path
) -> None:
    """3, told: 2, killed: 1 until another worker is ready, 2."""
    overrides = (*OVERRIDES, "launch.processes=3", "fault.spares=0", SLOW_STARTS)
    with BackgroundRun(run_dir, *overrides) as run:
        run.wait_for_step(5)
        os.kill(run.pids_by_rank()[2], signal.SIGTERM)
        run.wait_until(lambda: run.events_named("left"))
        run.wait_for_step(12)
        os.kill(run.pids_by_rank()[0], signal.SIGKILL)
        assert run.wait_exit() == 0, run.output[-3000:]
    assert island_counts(run_dir)[:3] == [3, 2, 1]
    check_same_descent(run_dir, reference_digest, STEPS)


def slow_case(signal_number: signal.Signals, processes: int) -> object:
    return pytest.param(signal_number, processes, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("told", "processes"),
    [
        (signal.SIGHUP, 2), slow_case(signal.SIGHUP, 1), slow_case(signal.SIGUSR1, 1),
        slow_case(signal.SIGUSR2, 2), slow_case(signal.SIGQUIT, 2),
        *(slow_case(told, count) for told in (signal.SIGTERM, signal.SIGINT) for count in (1, 2)),
    ],
)  # fmt: skip
def test_all_leave_in_good_order_and_come_back(
    told: signal.Signals, processes: int, reference_digest: str, run_dir: Path
) -> None:
    overrides = (*OVERRIDES, f"launch.processes={processes}")
    with BackgroundRun(run_dir, *overrides) as run:
        run.wait_for_step(12)
        run.process.send_signal(told)
        if told not in ABORT_SIGNALS:  # as a terminal does that is closed
            run.process.send_signal(told)
        assert run.wait_exit() == 128 + told, run.output[-3000:]
        assert (
            read_events(run_dir)[-1]["event"] == "interrupted" and read_events(run_dir)[-1]["saved"]
        )
    step_count = len(read_rows(run_dir))
    train_small(run_dir, *overrides)
    (resume_event,) = [event for event in read_events(run_dir) if event["event"] == "resumed"]
    assert resume_event["step"] == step_count
    check_same_descent(run_dir, reference_digest, STEPS)


@pytest.mark.slow
def test_the_last_worker_that_is_told_to_leave_takes_all_along(
    reference_digest: str, run_dir: Path
) -> None:
    overrides = (*OVERRIDES, "launch.processes=2", "layout.shard=2", "fault.spares=0")
    with BackgroundRun(run_dir, *overrides) as run:
        run.wait_for_step(12)
        os.kill(run.pids_by_rank()[1], signal.SIGTERM)
        assert run.wait_exit() == 143, run.output[-3000:]
    train_small(run_dir, *overrides)
    check_same_descent(run_dir, reference_digest, STEPS)


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
    processes: int, kill: str, spares: int, reference_digest: str, run_dir: Path
) -> None:
    """Alone it waits until it is whole again; else the other island goes on."""
    overrides = (
        f"launch.processes={processes}", "layout.shard=2", f"fault.kill={kill}", SLOW_STARTS
    )  # fmt: skip
    with BackgroundRun(
        run_dir, *OVERRIDES, *overrides, f"fault.spares={spares}", "fault.copy_every=5"
    ) as run:
        if spares:
            run.wait_for_spares(spares)
        assert run.wait_exit() == 0, run.output[-3000:]
        assert len(run.events_named("lost")) == 1
        if processes == 4:
            assert island_counts(run_dir)[:2] == [2, 1]
    check_same_descent(run_dir, reference_digest, STEPS)


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
    overrides = [
        *OVERRIDES[1:],
        *axis.split(),
        "launch.processes=2",
        "fault.copy_every=5",
        "run.steps=24",
    ]
    train_small(tmp_path / "clean", *overrides)
    with BackgroundRun(tmp_path / "run", *overrides, "fault.kill=step.agree:17:1") as run:
        run.wait_for_spares(1)
        assert run.wait_exit() == 0, run.output[-3000:]
        (quorum_event,) = run.events_named("quorum")
        # Of context, both ranks have all parameters: nothing is older than the interrupted step.
        assert quorum_event["step"] == (16 if "context" in axis else 15), quorum_event
        assert not run.events_named("resumed")
    check_same_descent(tmp_path / "run", weights_digest(tmp_path / "clean"), 24)
