"""Which workers of this host must be taken for dead, or stuck, though their process lives.

Four signs, each with a deadline: no heartbeat; a generation that ended and is not left; a group
that is not made; a part of a step that takes far longer than steps do (median + k deviations of
those seen here, never less than `STUCK_S`, nor than a few times the step before: a slow host that
joined makes all steps slow). Not here: what is done about it (`supervise.py`). Traded away: a first
step, which may compile for minutes, and whatever is no step (evaluation, saving) has no deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cordee.config.run import POINTS
from cordee.fault.crew import Worker
from cordee.fault.pace import Pace

STUCK_S = 10.0
"""Least time in one part of a step after which a worker may be stuck."""

MEETING_S = 20.0
"""Time in which the ranks of a generation, all of which were ready, make their group."""

TIMES = 3.0
"""How many times as long as the whole step before a part of a step may take."""

RETURN_S = 4.0
"""Least time that a worker may take to leave a generation that has ended: it may be computing."""

ALIVE_S = 2.0
"""A worker that was heard within so long computes; what it holds is worth waiting for."""

ASLEEP_S = 1.0
"""A supervisor that did not look for so long was stopped itself, and judges nobody by it."""


class Watch:
    """Judges the workers of one host by what they say. Every call is cheap."""

    def __init__(
        self, silence_s: float, start_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Deadlines of a heartbeat, and of the first one after a start."""
        self._clock = clock
        self._silence_s, self._start_s = silence_s, start_s
        self._pace = Pace(RETURN_S)
        self._seen: dict[int, tuple[int, int, float]] = {}
        self._step_s: dict[int, float] = {}
        self._looked_s = clock()

    def halt(self, worker: Worker, generation: int) -> None:
        """A generation in which `worker` has a seat ended. If it is still in an older one, which it
        should have left before, its time goes on to run."""
        if not 0 < worker.inside <= worker.halted:
            worker.halted_s = self._clock()
        worker.halted = generation

    def beat(self, worker: Worker, message: Mapping[str, Any]) -> None:
        """Takes in a heartbeat: step, phase, for how long, and the generation it is in."""
        now, step = self._clock(), int(message["step"])
        worker.step, worker.phase = step, str(message["phase"])
        if worker.inside != int(message["generation"]):
            worker.halted_s = now
        worker.phase_s, worker.inside = float(message["for_s"]), int(message["generation"])
        worker.since_s = now - worker.phase_s
        generation, before, since_s = self._seen.get(worker.number, (0, 0, now))
        if generation != worker.inside or step <= 0:
            self._seen[worker.number] = (worker.inside, step, now)
        elif step > before:
            self._step_s[worker.number] = (now - since_s) / (step - before)
            self._pace.feed(self._step_s[worker.number])
            self._seen[worker.number] = (worker.inside, step, now)
            worker.stepped = worker.inside

    def judge(self, workers: Iterable[Worker]) -> list[tuple[Worker, str]]:
        """Workers to be killed, each with the reason in words."""
        now = self._clock()
        asleep, self._looked_s = now - self._looked_s > ASLEEP_S, now
        leave_s = self._pace.deadline_s or self._start_s
        found, here = [], list(workers)
        for worker in here:
            silent_s = now - worker.heard_s
            if asleep:
                worker.heard_s = worker.halted_s = now
            elif silent_s > (self._silence_s if worker.ready else self._start_s):
                found.append((worker, f"was silent for {silent_s:.1f} s and killed"))
            elif _late_s(worker, now) > leave_s:
                alive = silent_s < ALIVE_S and _late_s(worker, now) < self._start_s
                others = (w for w in here if w is not worker and _late_s(w, now) <= leave_s)
                if alive and not any(_holds(other, worker.step) for other in others):
                    continue  # nobody else here has the run's newest state
                late = f"did not leave generation {worker.inside} within {leave_s:.0f} s"
                found.append((worker, f"{late} and was killed"))
        return found

    def stuck(self, seated: Iterable[Worker]) -> tuple[Worker, str] | None:
        """The worker that is furthest behind in its step, if it is there for too long, and in
        words: the others wait for it."""
        inside = [w for w in seated if w.inside == w.generation]
        for worker in inside:
            if worker.phase == "group" and worker.phase_s > MEETING_S:
                return worker, f"has waited for the others for {worker.phase_s:.0f} s"
        usual_s = self._pace.deadline_s
        running = [w for w in inside if w.phase.startswith("step.") and w.stepped == w.inside]
        if usual_s is None or not running:
            return None
        # Of several in one part, who came there first: who waits for others came later.
        worst = min(running, key=lambda w: (w.step, POINTS.index(w.phase), w.since_s))
        limit_s = max(STUCK_S, usual_s, TIMES * self._step_s.get(worst.number, 0.0))
        if worst.phase_s <= limit_s:
            return None
        return worst, f"has been there for {worst.phase_s:.1f} s, the limit is {limit_s:.1f} s"


def _late_s(worker: Worker, now: float) -> float:
    """For how long a worker has been in a generation that has ended; 0: it is in none."""
    return now - worker.halted_s if 0 < worker.inside <= worker.halted else 0.0


def _holds(worker: Worker, step: int) -> bool:
    """Whether a worker has committed a step, and none less than one that stands at `step` has."""
    return worker.stepped > 0 and worker.step >= step - 1
