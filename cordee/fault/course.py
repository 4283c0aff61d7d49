"""What a supervisor is to keep running, and how the run is going as far as its host knows.

Values and their bookkeeping; no process is touched here (`supervise.py` does that).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cordee.dist.streams import say
from cordee.fault.hold import Hold
from cordee.fault.orders import is_run
from cordee.fault.views import View

_NAMES = ("SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""What asks a run to save and leave: people, schedulers (some warn with SIGUSR1 or SIGUSR2), and a
terminal that is closed."""
HURRY = SIGNALS[:3]
"""Of these a second one ends at once. A closed terminal may send its signal twice, and a scheduler
its own after the warning: neither is a reason not to save."""
ASKED = tuple(128 + number for number in SIGNALS)
"""Exit codes of a worker that left because it was told to."""


def is_heeded(number: int) -> bool:
    """Whether a signal is for us: not where its sender was told that it is ignored (nohup)."""
    return number in HURRY or signal.getsignal(number) is not signal.SIG_IGN


STRANDED_S = 5.0
"""Ranks that are no island save together what they hold when it has lasted so long: on one host a
new worker is there before."""


@dataclass(frozen=True, kw_only=True)
class Post:
    """What a supervisor keeps running: `wants` workers with a seat, whole islands of `inside`
    ranks, and `spares` besides. `plan_for`: see `orders.assign`; `tries` is how often the same step
    may fail; `drills[i]` is armed in the i-th generation; `interface` is where workers of other
    hosts are met; `hold` is the run's folder, shared by all hosts that are in."""

    command: Sequence[str]
    plan: str
    plan_for: Callable[..., tuple[str, int]]
    inside: int
    wants: int
    spares: int
    threads: int
    silence_s: float
    start_s: float
    tries: int
    recover: bool
    hold: Hold
    drills: Sequence[str] = ()
    interface: str = ""

    def drill(self, number: int) -> str:
        """What is armed in that generation of the run, counted from 0."""
        return self.drills[number] if number < len(self.drills) else ""


@dataclass(frozen=True)
class Failure:
    """A worker that died: the step it stood at, who, how, its last words, its exit code."""

    step: int
    who: str
    how: str
    words: str
    code: int

    @property
    def cause(self) -> str:
        """How it died and, when it said so, of what."""
        lines = self.words.splitlines()
        return f"{self.how}: {lines[-1].strip()[:300]}" if self.code > 0 and lines else self.how

    def tell(self, which: str = " first") -> None:
        """The sentence and the worker's own words."""
        if self.code in ASKED:
            return
        say(f"\n{self.who} {self.how}".rstrip() + which)
        if self.words:
            say(self.words)


@dataclass
class Course:
    """How the run is going. `step` is the furthest that any worker here was seen at; `ending`: a
    worker has come to the end of the run; `over`: the first rank has; `code`: all is said."""

    begun: bool = False
    generations: int = 0
    entered_s: float = field(default_factory=time.monotonic)
    halted_s: float = 0.0
    step: int = -1
    signals: list[int] = field(default_factory=list)
    heeded: int = 0
    stumbled_s: float = 0.0
    ending: bool = False
    over: bool = False
    ended_s: float = 0.0
    code: int | None = None
    failures: list[Failure] = field(default_factory=list)
    waits_s: float = 0.0
    """Since when there has been no island; 0: there is one, or `stranded` says that it was long."""
    stranded: bool = False
    untold: list[Mapping[str, Any]] = field(default_factory=list)
    """Verdicts of views that no first rank has come to write down yet."""
    _failed_step: int = -2
    _failed_s: float = float("-inf")

    @property
    def hurries(self) -> bool:
        """Whether this host was asked twice to leave: then at once."""
        return sum(number in HURRY for number in self.signals) > 1

    def fail(self, failure: Failure, tried_s: float) -> int:
        """Notes a failure; how many of the same step there were since the run last came further, or
        a third of all of them, if that is more. Of workers that die together one counts: the others
        had begun (`tried_s`) before it was noted."""
        self.step = max(self.step, failure.step)
        further = self.step > self._failed_step
        if further:
            self.failures.clear()
        if further or tried_s > self._failed_s:
            self._failed_step, self._failed_s = self.step, time.monotonic()
            self.failures.append(failure)
        alike = sum(one.step == failure.step for one in self.failures)
        return max(alike, len(self.failures) // 3)

    def strands(self, now: float) -> bool:
        """True once, when no island has been whole for STRANDED_S."""
        if not self.waits_s or now - self.waits_s < STRANDED_S:
            return False
        self.waits_s, self.stranded = 0.0, True
        return True

    def give_up(self) -> int:
        """Says the first cause of the failures in a row, last; the exit code."""
        first = self.failures[0]
        if len(self.failures) > 1:
            say(
                f"\nstopped after {len(self.failures)} failures in a row at step {first.step}, none"
                " of which the run came past; the first was:"
            )
        first.tell()
        return first.code if first.code > 0 else 1


def seat_of(view: View, rank: int, slot: int, course: Course, drill: str) -> dict[str, Any]:
    """A worker's seat in a generation (`dist/line.py`)."""
    orders, rescue = view.orders, not is_run(view.orders)
    members = [{"host": orders["names"][host], "pid": pid} for host, _, pid in orders["ranks"]]
    return {
        "generation": view.number, "rank": rank, "size": len(orders["ranks"]), "local_rank": slot,
        "plan": orders["plan"], "why": [] if rescue else list(course.untold), "members": members,
        "drill": drill, "ended_s": course.halted_s, "rescue": rescue,
    }  # fmt: skip
