"""When a part of a step takes too long: by what steps took, and by what the step before took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cordee.fault.watch import ALIVE_S, MEETING_S, RETURN_S, STUCK_S, TIMES, Watch


@dataclass(eq=False)
class Seen:
    """What the watch knows of a worker."""

    number: int = 1
    generation: int = 1
    inside: int = 0
    stepped: int = 0
    step: int = 0
    phase: str = ""
    phase_s: float = 0.0
    since_s: float = 0.0
    halted: int = 0
    halted_s: float = 0.0
    heard_s: float = 0.0
    ready: bool = True


class Clock:
    """Seconds that a test decides."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def walk(watch: Any, clock: Clock, worker: Seen, steps: int, step_s: float) -> None:
    """So many steps of that length, with a heartbeat at the end of each."""
    for _ in range(steps):
        clock.now_s += step_s
        beat(watch, worker, worker.step + 1, 0.0)


def beat(watch: Any, worker: Seen, step: int, for_s: float, phase: str = "step.backward") -> None:
    said = {"step": step, "phase": phase, "for_s": for_s, "generation": worker.generation}
    watch.beat(worker, said)


def test_a_slow_host_that_joins_makes_no_one_stuck() -> None:
    clock, worker = Clock(), Seen()
    watch: Any = Watch(5.0, 300.0, clock)
    beat(watch, worker, 1, 0.0)
    walk(watch, clock, worker, 40, 0.1)
    beat(watch, worker, worker.step, STUCK_S + 1)
    assert watch.stuck([worker]) is not None
    # Another generation, in which a step takes 30 s: the first one may, and then the second.
    worker.generation = 2
    beat(watch, worker, worker.step, 0.0)
    beat(watch, worker, worker.step, 3 * STUCK_S)
    assert watch.stuck([worker]) is None
    walk(watch, clock, worker, 1, 3 * STUCK_S)
    beat(watch, worker, worker.step, 3 * STUCK_S)
    assert watch.stuck([worker]) is None
    beat(watch, worker, worker.step, TIMES * 3 * STUCK_S + 1)
    assert watch.stuck([worker]) is not None
    # Shares have followed: what was slow once is no excuse for long.
    walk(watch, clock, worker, 1, 0.1)
    beat(watch, worker, worker.step, STUCK_S + 1)
    assert watch.stuck([worker]) is not None


def judged(
    watch: Any, clock: Clock, worker: Seen, for_s: float, other: Seen | None = None
) -> list[str]:
    """What the watch says of a worker whose heart beats, over the next so many seconds; `other` has
    left the generation and holds as much (by default; see `under_way`)."""
    other = other or Seen(9, step=worker.step, stepped=1)
    found = []
    for _ in range(round(for_s / 0.1)):
        clock.now_s += 0.1
        worker.heard_s = other.heard_s = clock.now_s
        found += [why for _, why in watch.judge([worker, other])]
    return found


def test_the_last_that_holds_the_newest_state_is_waited_for_while_it_lives() -> None:
    for other in (Seen(9, step=0, stepped=0), Seen(9, step=4, stepped=1)):  # new; far behind
        watch, clock, (worker, _) = under_way()
        watch.halt(worker, 1)
        assert not judged(watch, clock, worker, 10 * RETURN_S, other)
        clock.now_s, other.heard_s = clock.now_s + 0.1, clock.now_s  # its heart has stopped
        worker.heard_s = clock.now_s - ALIVE_S - 0.1
        ((found, why),) = watch.judge([worker, other])
        assert found is worker and "did not leave generation 1" in why
    watch, clock, (worker, _) = under_way()
    watch.halt(worker, 1)
    assert judged(watch, clock, worker, 301, Seen(9)), "not for ever"


def test_who_does_not_leave_is_found_however_many_generations_end_meanwhile() -> None:
    watch, clock, (worker, _) = under_way()
    watch.halt(worker, 1)
    assert not judged(watch, clock, worker, RETURN_S - 1)
    watch.halt(worker, 2)  # it had a seat there too, and never came to take it
    (*_, why) = judged(watch, clock, worker, 2)
    assert "did not leave generation 1" in why


def test_who_left_has_its_time_anew() -> None:
    watch, clock, (worker, _) = under_way()
    watch.halt(worker, 1)
    assert not judged(watch, clock, worker, RETURN_S - 1)
    worker.generation = 2
    beat(watch, worker, worker.step, 0.0)
    watch.halt(worker, 2)
    assert not judged(watch, clock, worker, RETURN_S - 1)
    assert judged(watch, clock, worker, 2)
    worker.generation = 0  # it waits for a seat
    beat(watch, worker, worker.step, 0.0, "wait")
    assert not judged(watch, clock, worker, 3 * RETURN_S)


def test_ranks_that_do_not_find_each_other_meet_again() -> None:
    clock, worker = Clock(), Seen(generation=7)
    watch: Any = Watch(5.0, 300.0, clock)
    beat(watch, worker, -1, MEETING_S - 1, "group")
    assert watch.stuck([worker]) is None
    beat(watch, worker, -1, MEETING_S + 1, "group")
    assert watch.stuck([worker]) is not None
    beat(watch, worker, -1, 3 * MEETING_S, "build")  # may take long, and is nobody's fault
    assert watch.stuck([worker]) is None


def under_way() -> tuple[Any, Clock, list[Seen]]:
    """Two ranks after ten steps of 0.1 s."""
    clock, ranks = Clock(), [Seen(1), Seen(2)]
    watch: Any = Watch(5.0, 300.0, clock)
    for _ in range(11):
        clock.now_s += 0.1
        for worker in ranks:
            beat(watch, worker, worker.step + 1, 0.0)
    return watch, clock, ranks


def test_who_is_behind_is_the_one_that_is_stuck_not_who_waits_for_it() -> None:
    """A fast rank waits in the message from before the slow one hangs in its own computation."""
    watch, _, (hangs, waits) = under_way()
    beat(watch, waits, 12, STUCK_S + 3, "step.reduce")
    beat(watch, hangs, 12, STUCK_S - 1, "step.forward")
    assert watch.stuck([waits, hangs]) is None
    beat(watch, hangs, 12, STUCK_S + 1, "step.forward")
    assert watch.stuck([waits, hangs])[0] is hangs


def test_of_two_in_one_part_the_first_there_is_stuck_however_old_its_word() -> None:
    watch, clock, (hangs, waits) = under_way()
    beat(watch, hangs, 12, STUCK_S + 0.02, "step.reduce")
    clock.now_s += 0.15
    beat(watch, waits, 12, STUCK_S + 0.1, "step.reduce")
    assert watch.stuck([waits, hangs])[0] is hangs
