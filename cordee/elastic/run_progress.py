"""What a supervisor is to keep running, and how the run is going as far as its host knows."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cordee.dist.ipc import Assignment
from cordee.dist.streams import print_to_stderr
from cordee.elastic.assignment import is_training
from cordee.elastic.run_lock import RunLock
from cordee.elastic.views import View

_SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _SIGNAL_NAMES if hasattr(signal, name))
"""What asks a run to save and leave: people, schedulers (some warn with SIGUSR1 or SIGUSR2), and a
terminal that is closed."""
ABORT_SIGNALS = STOP_SIGNALS[:3]
"""Of these a second one ends at once. A closed terminal may send its signal twice, and a scheduler
its own after the warning: neither is a reason not to save."""
STOP_EXIT_CODES = tuple(128 + number for number in STOP_SIGNALS)
"""Exit codes of a worker that left because it was told to."""


def is_signal_handled(signal_number: int) -> bool:
    """Whether a signal is for us: not where its sender was told that it is ignored (nohup)."""
    return signal_number in ABORT_SIGNALS or signal.getsignal(signal_number) is not signal.SIG_IGN


NO_ISLAND_TIMEOUT_S = 5.0
"""Ranks that are no island save together what they hold when it has lasted so long: on one host a
new worker is there before."""


@dataclass(frozen=True, kw_only=True)
class SupervisorConfig:
    """What a supervisor keeps running: `num_ranks` workers with a rank, whole islands of
    `island_size` ranks, and `spares` besides. `worker_config`: what workers read (JSON);
    `preload`: modules that they need, imported once for all of them, or empty and `no_fork_cause`
    says why each imports its own; `replan`: see `assign_ranks`; `max_failures`: how often the same
    step may fail; `drills[i]` is armed in the i-th generation; `interface` is where workers of
    other hosts are met; `run_lock` is the run's folder, shared by all hosts that are in."""

    worker_config: str
    replan: Callable[..., tuple[str, int]]
    island_size: int
    num_ranks: int
    spares: int
    threads: int
    heartbeat_timeout_s: float
    startup_timeout_s: float
    max_failures: int
    recover: bool
    run_lock: RunLock
    drills: Sequence[str] = ()
    interface: str = ""
    preload: Sequence[str] = ()
    no_fork_cause: str = ""

    def drill_for(self, generation_index: int) -> str:
        return self.drills[generation_index] if generation_index < len(self.drills) else ""


@dataclass(frozen=True)
class WorkerFailure:
    """A worker that died: the step it stood at, who, how, its last words, its exit code."""

    step: int
    worker_name: str
    death_text: str
    stderr_tail: str
    exit_code: int

    @property
    def cause(self) -> str:
        """How it died and, when it said so, of what."""
        lines = self.stderr_tail.splitlines()
        return (
            f"{self.death_text}: {lines[-1].strip()[:300]}"
            if self.exit_code > 0 and lines
            else self.death_text
        )

    def report(self, suffix: str = " first") -> None:
        """The sentence and the worker's own words."""
        if self.exit_code in STOP_EXIT_CODES:
            return
        print_to_stderr(f"\n{self.worker_name} {self.death_text}".rstrip() + suffix)
        if self.stderr_tail:
            print_to_stderr(self.stderr_tail)


@dataclass
class RunProgress:
    """How the run is going. `step` is the furthest that any worker here was seen at; `is_ending`: a
    worker has come to the end of the run; `is_finished`: the first rank has; `exit_code`: all is
    said."""

    has_begun: bool = False
    generation_count: int = 0
    view_start_s: float = field(default_factory=time.monotonic)
    generation_end_s: float = 0.0
    step: int = -1
    received_signals: list[int] = field(default_factory=list)
    handled_count: int = 0
    connection_error_s: float = 0.0
    is_ending: bool = False
    is_finished: bool = False
    run_end_s: float = 0.0
    exit_code: int | None = None
    failures: list[WorkerFailure] = field(default_factory=list)
    no_island_since_s: float = 0.0
    """Since when there has been no island; 0: there is one, or `stranded` says that it was long."""
    is_stranded: bool = False
    unrecorded_events: list[Mapping[str, Any]] = field(default_factory=list)
    """Verdicts of views that no first rank has come to write down yet."""
    _last_failed_step: int = -2
    _last_failure_s: float = float("-inf")

    @property
    def must_stop_now(self) -> bool:
        """Whether this host was asked twice to leave: then at once."""
        return sum(signal_number in ABORT_SIGNALS for signal_number in self.received_signals) > 1

    def record_failure(self, failure: WorkerFailure, assigned_s: float) -> int:
        """Notes a failure; how many of the same step there were since the run last came further, or
        a third of all of them, if that is more. Of workers that die together one counts: the others
        had begun (`assigned_s`) before it was noted."""
        self.step = max(self.step, failure.step)
        has_advanced = self.step > self._last_failed_step
        if has_advanced:
            self.failures.clear()
        if has_advanced or assigned_s > self._last_failure_s:
            self._last_failed_step, self._last_failure_s = self.step, time.monotonic()
            self.failures.append(failure)
        same_step_count = sum(past_failure.step == failure.step for past_failure in self.failures)
        return max(same_step_count, len(self.failures) // 3)

    def island_wait_expired(self, now: float) -> bool:
        """True once, when no island has been whole for STRANDED_S."""
        if not self.no_island_since_s or now - self.no_island_since_s < NO_ISLAND_TIMEOUT_S:
            return False
        self.no_island_since_s, self.is_stranded = 0.0, True
        return True

    def give_up(self) -> int:
        """Says the first cause of the failures in a row, last; the exit code."""
        first_failure = self.failures[0]
        if len(self.failures) > 1:
            print_to_stderr(
                f"\nstopped after {len(self.failures)} failures in a row at step"
                f" {first_failure.step}, none of which the run came past; the first was:"
            )
        first_failure.report()
        return first_failure.exit_code if first_failure.exit_code > 0 else 1


def worker_assignment(
    view: View, rank: int, slot: int, progress: RunProgress, drill: str
) -> Assignment:
    """What a worker of this host does in a generation."""
    orders, is_emergency = view.assignment, not is_training(view.assignment)
    members = [{"host": orders["names"][host], "pid": pid} for host, _, pid in orders["ranks"]]
    return Assignment(
        rank=rank, size=len(members), local_rank=slot, generation=view.number,
        plan=orders["plan"], drill=drill, members=members,
        verdicts=() if is_emergency else list(progress.unrecorded_events),
        previous_end_s=progress.generation_end_s, is_emergency=is_emergency,
    )  # fmt: skip
