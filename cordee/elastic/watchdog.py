"""Which workers of this host must be taken for dead, or stuck, though their process lives.

Four signs, each with a deadline: no heartbeat; an ended generation that is not left; a group that
does not form; a part of a step that takes far longer than others did (median + k deviations, at
least `MIN_STUCK_S` and a few times the step before, since a slow host makes all steps slow). First
steps may compile for minutes, so they have no deadline, nor have evaluation and saving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cordee.config.run import FAULT_POINTS
from cordee.elastic.failure_detector import AdaptiveTimeout
from cordee.elastic.worker_pool import Worker

MIN_STUCK_S = 10.0
"""Least time in one part of a step after which a worker may be stuck."""

GROUP_TIMEOUT_S = 20.0
"""Time in which the ranks of a generation, all of which were ready, make their group."""

STEP_TIME_FACTOR = 3.0
"""How many times as long as the whole step before a part of a step may take."""

MIN_LEAVE_S = 4.0
"""Least time that a worker may take to leave a generation that has ended: it may be computing."""

RECENT_HEARTBEAT_S = 2.0
"""A worker that was heard within so long computes; what it holds is worth waiting for."""

SUSPENDED_S = 1.0
"""A supervisor that did not look for so long was stopped itself, and judges nobody by it."""


class Watchdog:
    """Judges the workers of one host by what they say. Every call is cheap."""

    def __init__(
        self,
        heartbeat_timeout_s: float,
        startup_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Deadlines of a heartbeat, and of the first one after a start."""
        self._clock = clock
        self._heartbeat_timeout_s, self._startup_timeout_s = heartbeat_timeout_s, startup_timeout_s
        self._step_timeout = AdaptiveTimeout(MIN_LEAVE_S)
        self._last_steps: dict[int, tuple[int, int, float]] = {}
        self._step_times_s: dict[int, float] = {}
        self._last_check_s = clock()

    def on_generation_end(self, worker: Worker, generation: int) -> None:
        """A generation in which `worker` has a seat ended. If it is still in an older one, which it
        should have left before, its time goes on to run."""
        if not 0 < worker.current_generation <= worker.ended_generation:
            worker.overdue_since_s = self._clock()
        worker.ended_generation = generation

    def on_heartbeat(self, worker: Worker, message: Mapping[str, Any]) -> None:
        """Takes in a heartbeat: step, phase, for how long, and the generation it is in."""
        now, step = self._clock(), int(message["step"])
        worker.step, worker.phase = step, str(message["phase"])
        if worker.current_generation != int(message["generation"]):
            worker.overdue_since_s = now
        worker.phase_s, worker.current_generation = (
            float(message["for_s"]),
            int(message["generation"]),
        )
        worker.phase_start_s = now - worker.phase_s
        generation, previous_step, last_change_s = self._last_steps.get(worker.number, (0, 0, now))
        if generation != worker.current_generation or step <= 0:
            self._last_steps[worker.number] = (worker.current_generation, step, now)
        elif step > previous_step:
            self._step_times_s[worker.number] = (now - last_change_s) / (step - previous_step)
            self._step_timeout.add_sample(self._step_times_s[worker.number])
            self._last_steps[worker.number] = (worker.current_generation, step, now)
            worker.stepped_generation = worker.current_generation

    def find_dead_workers(self, workers: Iterable[Worker]) -> list[tuple[Worker, str]]:
        """Workers to be killed, each with the reason in words."""
        now = self._clock()
        was_suspended, self._last_check_s = now - self._last_check_s > SUSPENDED_S, now
        leave_timeout_s = self._step_timeout.deadline_s or self._startup_timeout_s
        dead_workers, local_workers = [], list(workers)
        for worker in local_workers:
            silent_s = now - worker.last_heard_s
            if was_suspended:
                worker.last_heard_s = worker.overdue_since_s = now
            elif silent_s > (
                self._heartbeat_timeout_s if worker.is_ready else self._startup_timeout_s
            ):
                dead_workers.append((worker, f"was silent for {silent_s:.1f} s and killed"))
            elif _overdue_s(worker, now) > leave_timeout_s:
                is_alive = (
                    silent_s < RECENT_HEARTBEAT_S
                    and _overdue_s(worker, now) < self._startup_timeout_s
                )
                other_workers = (
                    w
                    for w in local_workers
                    if w is not worker and _overdue_s(w, now) <= leave_timeout_s
                )
                if is_alive and not any(
                    _has_newest_state(other, worker.step) for other in other_workers
                ):
                    continue  # nobody else here has the run's newest state
                reason = (
                    f"did not leave generation {worker.current_generation} within"
                    f" {leave_timeout_s:.0f} s"
                )
                dead_workers.append((worker, f"{reason} and was killed"))
        return dead_workers

    def find_stuck_worker(self, ranked_workers: Iterable[Worker]) -> tuple[Worker, str] | None:
        """The worker that is furthest behind in its step, if it is there for too long, and in
        words: the others wait for it."""
        current_workers = [w for w in ranked_workers if w.current_generation == w.last_generation]
        for worker in current_workers:
            if worker.phase == "group" and worker.phase_s > GROUP_TIMEOUT_S:
                return worker, f"has waited for the others for {worker.phase_s:.0f} s"
        step_timeout_s = self._step_timeout.deadline_s
        stepping_workers = [
            w
            for w in current_workers
            if w.phase.startswith("step.") and w.stepped_generation == w.current_generation
        ]
        if step_timeout_s is None or not stepping_workers:
            return None
        # Of several in one part, who came there first: who waits for others came later.
        slowest_worker = min(
            stepping_workers, key=lambda w: (w.step, FAULT_POINTS.index(w.phase), w.phase_start_s)
        )
        limit_s = max(
            MIN_STUCK_S,
            step_timeout_s,
            STEP_TIME_FACTOR * self._step_times_s.get(slowest_worker.number, 0.0),
        )
        if slowest_worker.phase_s <= limit_s:
            return None
        return (
            slowest_worker,
            f"has been there for {slowest_worker.phase_s:.1f} s, the limit is {limit_s:.1f} s",
        )


def _overdue_s(worker: Worker, now: float) -> float:
    """For how long a worker has been in a generation that has ended; 0: it is in none."""
    return (
        now - worker.overdue_since_s
        if 0 < worker.current_generation <= worker.ended_generation
        else 0.0
    )


def _has_newest_state(worker: Worker, step: int) -> bool:
    """Whether a worker has committed a step, and none less than one that stands at `step` has."""
    return worker.stepped_generation > 0 and worker.step >= step - 1
