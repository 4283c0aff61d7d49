"""When a part of a step takes too long: by what steps took, and by what the step before took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cordee.elastic.watchdog import (
    GROUP_TIMEOUT_S,
    MIN_LEAVE_S,
    MIN_STUCK_S,
    RECENT_HEARTBEAT_S,
    STEP_TIME_FACTOR,
    Watchdog,
)


@dataclass(eq=False)
class FakeWorker:
    """What the watch knows of a worker."""

    number: int = 1
    last_generation: int = 1
    current_generation: int = 0
    stepped_generation: int = 0
    step: int = 0
    phase: str = ""
    phase_s: float = 0.0
    phase_start_s: float = 0.0
    ended_generation: int = 0
    overdue_since_s: float = 0.0
    last_heard_s: float = 0.0
    is_ready: bool = True


class FakeClock:
    """Seconds that a test decides."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_steps(
    watchdog: Any, clock: FakeClock, worker: FakeWorker, steps: int, step_s: float
) -> None:
    """So many steps of that length, with a heartbeat at the end of each."""
    for _ in range(steps):
        clock.now_s += step_s
        send_heartbeat(watchdog, worker, worker.step + 1, 0.0)


def send_heartbeat(
    watchdog: Any, worker: FakeWorker, step: int, for_s: float, phase: str = "step.backward"
) -> None:
    heartbeat = {"step": step, "phase": phase, "for_s": for_s, "generation": worker.last_generation}
    watchdog.on_heartbeat(worker, heartbeat)


def test_a_slow_host_that_joins_makes_no_one_stuck() -> None:
    clock, worker = FakeClock(), FakeWorker()
    watchdog: Any = Watchdog(5.0, 300.0, clock)
    send_heartbeat(watchdog, worker, 1, 0.0)
    make_steps(watchdog, clock, worker, 40, 0.1)
    send_heartbeat(watchdog, worker, worker.step, MIN_STUCK_S + 1)
    assert watchdog.find_stuck_worker([worker]) is not None
    # Another generation, in which a step takes 30 s: the first one may, and then the second.
    worker.last_generation = 2
    send_heartbeat(watchdog, worker, worker.step, 0.0)
    send_heartbeat(watchdog, worker, worker.step, 3 * MIN_STUCK_S)
    assert watchdog.find_stuck_worker([worker]) is None
    make_steps(watchdog, clock, worker, 1, 3 * MIN_STUCK_S)
    send_heartbeat(watchdog, worker, worker.step, 3 * MIN_STUCK_S)
    assert watchdog.find_stuck_worker([worker]) is None
    send_heartbeat(watchdog, worker, worker.step, STEP_TIME_FACTOR * 3 * MIN_STUCK_S + 1)
    assert watchdog.find_stuck_worker([worker]) is not None
    # Shares have followed: what was slow once is no excuse for long.
    make_steps(watchdog, clock, worker, 1, 0.1)
    send_heartbeat(watchdog, worker, worker.step, MIN_STUCK_S + 1)
    assert watchdog.find_stuck_worker([worker]) is not None


def death_reasons(
    watchdog: Any,
    clock: FakeClock,
    worker: FakeWorker,
    for_s: float,
    other_worker: FakeWorker | None = None,
) -> list[str]:
    """What the watch says of a worker whose heart beats, over the next so many seconds;
    `other_worker` has left the generation and holds as much (by default; see `running_ranks`)."""
    other_worker = other_worker or FakeWorker(9, step=worker.step, stepped_generation=1)
    reasons = []
    for _ in range(round(for_s / 0.1)):
        clock.now_s += 0.1
        worker.last_heard_s = other_worker.last_heard_s = clock.now_s
        reasons += [reason for _, reason in watchdog.find_dead_workers([worker, other_worker])]
    return reasons


def test_the_last_that_holds_the_newest_state_is_waited_for_while_it_lives() -> None:
    for other_worker in (
        FakeWorker(9, step=0, stepped_generation=0),
        FakeWorker(9, step=4, stepped_generation=1),
    ):  # new; far behind
        watchdog, clock, (worker, _) = running_ranks()
        watchdog.on_generation_end(worker, 1)
        assert not death_reasons(watchdog, clock, worker, 10 * MIN_LEAVE_S, other_worker)
        clock.now_s, other_worker.last_heard_s = (
            clock.now_s + 0.1,
            clock.now_s,
        )  # its heart has stopped
        worker.last_heard_s = clock.now_s - RECENT_HEARTBEAT_S - 0.1
        ((dead_worker, reason),) = watchdog.find_dead_workers([worker, other_worker])
        assert dead_worker is worker and "did not leave generation 1" in reason
    watchdog, clock, (worker, _) = running_ranks()
    watchdog.on_generation_end(worker, 1)
    assert death_reasons(watchdog, clock, worker, 301, FakeWorker(9)), "not for ever"


def test_who_does_not_leave_is_found_however_many_generations_end_meanwhile() -> None:
    watchdog, clock, (worker, _) = running_ranks()
    watchdog.on_generation_end(worker, 1)
    assert not death_reasons(watchdog, clock, worker, MIN_LEAVE_S - 1)
    watchdog.on_generation_end(worker, 2)  # it had a seat there too, and never came to take it
    (*_, reason) = death_reasons(watchdog, clock, worker, 2)
    assert "did not leave generation 1" in reason


def test_who_left_has_its_time_anew() -> None:
    watchdog, clock, (worker, _) = running_ranks()
    watchdog.on_generation_end(worker, 1)
    assert not death_reasons(watchdog, clock, worker, MIN_LEAVE_S - 1)
    worker.last_generation = 2
    send_heartbeat(watchdog, worker, worker.step, 0.0)
    watchdog.on_generation_end(worker, 2)
    assert not death_reasons(watchdog, clock, worker, MIN_LEAVE_S - 1)
    assert death_reasons(watchdog, clock, worker, 2)
    worker.last_generation = 0  # it waits for a seat
    send_heartbeat(watchdog, worker, worker.step, 0.0, "wait")
    assert not death_reasons(watchdog, clock, worker, 3 * MIN_LEAVE_S)


def test_ranks_that_do_not_find_each_other_meet_again() -> None:
    clock, worker = FakeClock(), FakeWorker(last_generation=7)
    watchdog: Any = Watchdog(5.0, 300.0, clock)
    send_heartbeat(watchdog, worker, -1, GROUP_TIMEOUT_S - 1, "group")
    assert watchdog.find_stuck_worker([worker]) is None
    send_heartbeat(watchdog, worker, -1, GROUP_TIMEOUT_S + 1, "group")
    assert watchdog.find_stuck_worker([worker]) is not None
    send_heartbeat(
        watchdog, worker, -1, 3 * GROUP_TIMEOUT_S, "build"
    )  # may take long, and is nobody's fault
    assert watchdog.find_stuck_worker([worker]) is None


def running_ranks() -> tuple[Any, FakeClock, list[FakeWorker]]:
    """Two ranks after ten steps of 0.1 s."""
    clock, ranks = FakeClock(), [FakeWorker(1), FakeWorker(2)]
    watchdog: Any = Watchdog(5.0, 300.0, clock)
    for _ in range(11):
        clock.now_s += 0.1
        for worker in ranks:
            send_heartbeat(watchdog, worker, worker.step + 1, 0.0)
    return watchdog, clock, ranks


def test_who_is_behind_is_the_one_that_is_stuck_not_who_waits_for_it() -> None:
    """A fast rank waits in the message from before the slow one hangs in its own computation."""
    watchdog, _, (hung_worker, waiting_worker) = running_ranks()
    send_heartbeat(watchdog, waiting_worker, 12, MIN_STUCK_S + 3, "step.reduce")
    send_heartbeat(watchdog, hung_worker, 12, MIN_STUCK_S - 1, "step.forward")
    assert watchdog.find_stuck_worker([waiting_worker, hung_worker]) is None
    send_heartbeat(watchdog, hung_worker, 12, MIN_STUCK_S + 1, "step.forward")
    assert watchdog.find_stuck_worker([waiting_worker, hung_worker])[0] is hung_worker


def test_of_two_in_one_part_the_first_there_is_stuck_however_old_its_word() -> None:
    watchdog, clock, (hung_worker, waiting_worker) = running_ranks()
    send_heartbeat(watchdog, hung_worker, 12, MIN_STUCK_S + 0.02, "step.reduce")
    clock.now_s += 0.15
    send_heartbeat(watchdog, waiting_worker, 12, MIN_STUCK_S + 0.1, "step.reduce")
    assert watchdog.find_stuck_worker([waiting_worker, hung_worker])[0] is hung_worker
