"""A host's supervisor: keeps its workers running and, with other hosts', decides who computes what.

One thread, one selector, no torch. A worker that dies is seen at once (pidfd), one that falls
silent is killed; either way the hosts agree on a new generation (`members.py`) in which the others,
a warm spare among them, go on. Not here: what a worker does (`train.py`); messages between hosts
(`link.py`). Traded away: a watcher of the watcher; workers die with their supervisor, and the same
command goes on from the newest checkpoint.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from cordee.fault.crew import Crew, Worker, how_it_died, record_of
from cordee.fault.keys import Keys
from cordee.fault.members import Change, Entered, Fenced, Halted, Left, Member, View
from cordee.fault.orders import assign

GRACE_S = 10.0
"""How long ranks may take to leave after the run has failed."""

SPARE_AFTER_S = 3.0
"""Spares are started once a generation has run for so long: starts come first."""

BROKEN_AFTER_S = 1.0
"""A connection that broke although nobody died is acted upon after so long."""

TICK_S = 0.1


@dataclass(frozen=True)
class Post:
    """What a supervisor is to keep running: `wants` workers with a seat, whole islands of `inside`
    ranks, and `spares` besides. `plan_for`: see `orders.assign`; `tries` is how
    often the same step may fail; `drills[i]` is armed in the i-th generation; `last` is the newest
    generation that the run's folder knows."""

    command: Sequence[str]
    plan: str
    plan_for: Callable[[int], tuple[str, int]]
    inside: int
    wants: int
    spares: int
    threads: int
    silence_s: float
    start_s: float
    tries: int
    recover: bool
    drills: Sequence[str] = ()
    last: int = 0
    interface: str = ""


@dataclass(frozen=True)
class Failure:
    """A worker that died: the step it stood at, who and how in one line, its last words."""

    step: int
    sentence: str
    words: str
    code: int


@dataclass
class _Course:
    """How the run is going, as far as this host knows."""

    begun: bool = False
    generations: int = 0
    entered_s: float = field(default_factory=time.monotonic)
    halted_s: float = 0.0
    best_step: int = -1
    failed_step: int = -2
    failures: list[Failure] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)
    stumbled_s: float = 0.0
    ending: bool = False
    over: bool = False
    code: int | None = None


class Supervisor:
    """See the file's header. `run` returns the exit code."""

    def __init__(self, post: Post, make_member: Callable[..., Member]) -> None:
        """`make_member(assign=, report=)`: this host's member of the membership protocol."""
        self.post = post
        self.wants = post.wants
        self.crew = Crew(post.command, post.threads, post.plan, post.interface)
        self.keys = Keys()
        self.course = _Course()
        self.member = make_member(
            assign=lambda reports: assign(reports, post.inside, post.plan_for), report=self.report
        )
        self.view: View | None = None
        self._selector = selectors.DefaultSelector()
        self._ticked_s = time.monotonic()

    def run(self) -> int:
        """Until the run is over: 0 done, 1 failed, 128 + signal when asked to leave."""
        wake, woken = socket.socketpair()
        woken.setblocking(False)
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        former = signal.set_wakeup_fd(woken.fileno())
        self._selector.register(wake, selectors.EVENT_READ, lambda: wake.recv(4096))
        try:
            self.member.found(time.monotonic())
            for _ in range(self.wants):
                self._start()
            while self.course.code is None:
                for key, _ in self._selector.select(TICK_S):
                    key.data()
                self._tick()
            return self.course.code
        finally:
            signal.set_wakeup_fd(former)
            self.crew.end(0.0)
            self._selector.close()
            wake.close()
            woken.close()
            for number, action in before.items():
                signal.signal(number, action)

    def report(self) -> dict[str, Any]:
        """What this host has, for the orders of a view."""
        ready = [
            [w.number, w.pid, w.last_rank]
            for w in self.crew.workers.values()
            if w.ready and w.leaving is None and w.done is None
        ]
        return {"name": socket.gethostname(), "wants": self.wants, "ready": ready,
                "begun": self.course.begun}  # fmt: skip

    # ---- what happens ----

    def _start(self) -> None:
        worker = self.crew.start()
        self._selector.register(worker.pidfd, selectors.EVENT_READ, lambda: self._on_death(worker))
        self._selector.register(worker.talk, selectors.EVENT_READ, lambda: self._on_words(worker))

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.course.signals.append(number)
        if len(self.course.signals) > 1 or not self.crew.seated():
            self.course.code = 128 + number
            return
        for worker in self.crew.seated():
            worker.talk.say({"do": "leave", "signal": number})

    def _on_words(self, worker: Worker) -> None:
        for message in worker.talk.hear():
            worker.heard_s = time.monotonic()
            self._on_message(worker, message)
        if worker.talk.closed:
            with suppress(KeyError, ValueError):
                self._selector.unregister(worker.talk)

    def _on_message(self, worker: Worker, message: Mapping[str, Any]) -> None:
        match message["say"]:
            case "beat":
                worker.step, worker.phase = int(message["step"]), str(message["phase"])
                worker.phase_s = float(message["for_s"])
                self.course.best_step = max(self.course.best_step, worker.step)
            case "ready":
                worker.ready = True
                self._on_ready(worker)
            case "stumbled":
                worker.step = int(message["step"])
                self.course.best_step = max(self.course.best_step, worker.step)
                if self.view is not None and message["generation"] == self.view.number:
                    self.course.stumbled_s = self.course.stumbled_s or time.monotonic()
            case "set":
                self.keys.set(message["generation"], message["key"], message["value"])
            case "get":
                number = message["number"]
                self.keys.get(
                    message["generation"],
                    message["key"],
                    lambda v: worker.talk.say({"do": "answer", "number": number, "value": v}),
                )
            case "leaving":
                self._on_leaving(worker, int(message["signal"]))
            case "done":
                self.course.ending = True
                self.course.over = self.course.over or (worker.rank == 0 and not message["code"])
                worker.done, worker.verdict = int(message["code"]), str(message["verdict"])

    def _on_ready(self, worker: Worker) -> None:
        """A worker that fills a gap is a reason for a new generation; a spare is none."""
        course, ready = self.course, [w for w in self.crew.workers.values() if w.ready]
        if course.begun:
            if len(self.crew.seated()) < self.wants and not self._ending():
                self._call("joined", worker, f"pid {worker.pid} is ready", "it gets a seat")
        elif len(ready) >= self.wants:
            self._call("begun", worker, f"{len(ready)} ranks are ready", "the run begins")

    def _on_leaving(self, worker: Worker, number: int) -> None:
        """A worker that alone was told to go: the others go on, or all leave when it is the last."""
        others = [w for w in self.crew.workers.values() if w.ready and w is not worker]
        if len(others) < self.post.inside:
            self._on_signal(number, None)
            return
        worker.leaving = number
        self.wants = max(self.wants - 1, 1)
        name = signal.Signals(number).name
        self._call("left", worker, f"it was told to leave by {name}", "the others go on")

    def _on_death(self, worker: Worker) -> None:
        self._on_words(worker)
        seat = worker.rank
        self._selector.unregister(worker.pidfd)
        with suppress(KeyError, ValueError):
            self._selector.unregister(worker.talk)
        words = worker.last_words()
        code = self.crew.bury(worker)
        if worker.done is not None:
            self._on_end(worker, words)
        elif worker.leaving is None:
            self._on_failure(worker, seat, code, words)

    def _on_end(self, worker: Worker, words: str) -> None:
        """A worker that said its end before it went."""
        course = self.course
        assert worker.done is not None
        if worker.done and worker.verdict:
            self.crew.end(GRACE_S)
            self._tell(Failure(worker.step, worker.verdict, words, worker.done))
            course.code = worker.done
        elif not [w for w in self.crew.seated() if w.done is None]:
            course.code = worker.done

    def _on_failure(self, worker: Worker, seat: int | None, code: int, words: str) -> None:
        course = self.course
        if -code in course.signals:  # it did what it was told
            course.code = course.code or 128 - code
            return
        if course.over:
            course.code = 0
            return
        course.ending = False
        who = f"rank {seat} (pid {worker.pid})" if seat is not None else f"pid {worker.pid}"
        failure = Failure(worker.step, f"{who} {how_it_died(code)}", words, code)
        if seat is None and worker.ready:  # a spare: nobody waits for it
            return
        if course.best_step > course.failed_step:
            course.failures.clear()
        course.failed_step = course.best_step
        course.failures.append(failure)
        if code == 2 or not self.post.recover or len(course.failures) >= self.post.tries:
            self._stop()
            return
        if seat is not None:
            spare = any(w.ready and w.rank is None for w in self.crew.workers.values())
            done = "a warm spare takes its place" if spare else "the others go on"
            self._call("lost", worker, how_it_died(code), done)
        self._fill_up(now=True)

    def _stop(self) -> None:
        """Gives up, with the first cause last on the screen."""
        failures = self.course.failures
        first = failures[0]
        self.crew.end(GRACE_S if len(failures) == 1 else 0.0)
        self._tell(first)
        if len(failures) > 1:
            print(
                f"stopped: no step was committed between {len(failures)} failures in a row,"
                f" at step {self.course.best_step}; the first cause is above",
                file=sys.stderr,
            )
        self.course.code = first.code if first.code > 0 else 1

    def _tell(self, failure: Failure) -> None:
        if failure.code in (130, 143):
            return
        print(f"\n{failure.sentence} first", file=sys.stderr)
        if failure.words:
            print(failure.words, file=sys.stderr)

    # ---- generations ----

    def _call(self, event: str, worker: Worker, what: str, done: str) -> None:
        """Asks for a new generation, and says why in one sentence."""
        host = socket.gethostname()
        rank = worker.rank if worker.rank is not None else worker.last_rank
        who = f"rank {rank} (pid {worker.pid} on {host})" if rank is not None else f"{host}"
        stood = f" in {worker.phase} of step {worker.step}" if worker.step >= 0 else ""
        says = f"{who}: {what}{stood}; {done}"
        self.member.call(
            record_of(worker, event=event, host=host, cause=what, done=done, says=says),
            time.monotonic(),
        )
        self._follow()

    def _follow(self) -> None:
        """Acts on what the membership decided."""
        for change in self.member.take_changes():
            self._on_change(change)

    def _on_change(self, change: Change) -> None:
        match change:
            case Halted(number):
                self.course.halted_s = time.monotonic()
                for worker in self.crew.seated():
                    worker.talk.say({"do": "halt", "generation": number})
                    worker.last_rank, worker.rank = worker.rank, None
            case Entered(view):
                self._enter(view)
            case Fenced(sentence):
                print(sentence, file=sys.stderr)
                self.course.code = 1
            case Left():
                self.course.code = 128 + (self.course.signals or [signal.SIGTERM])[0]

    def _enter(self, view: View) -> None:
        """Gives this host's workers their seats in a new generation."""
        course, orders = self.course, view.orders
        self.view, course.stumbled_s, course.entered_s = view, 0.0, time.monotonic()
        self.keys.begin(view.number)
        if not orders:
            return
        ranks: Sequence[Sequence[Any]] = orders["ranks"]
        drills = self.post.drills
        armed = drills[course.generations] if course.generations < len(drills) else ""
        course.begun, course.generations = True, course.generations + 1
        members = [{"host": orders["names"][host], "pid": pid} for host, _, pid in ranks]
        for rank, (host, number, _) in enumerate(ranks):
            worker = self.crew.workers.get(number) if host == self.member.me else None
            if worker is None:
                continue
            worker.slot = self.crew.free_slot() if worker.slot is None else worker.slot
            worker.rank = rank
            seat = {
                "generation": view.number, "rank": rank, "size": len(ranks),
                "local_rank": worker.slot, "plan": orders["plan"], "why": list(view.why),
                "members": members, "drill": armed, "ended_s": course.halted_s,
            }  # fmt: skip
            worker.talk.say({"do": "sit", "seat": seat})
            if course.signals:
                worker.talk.say({"do": "leave", "signal": course.signals[0]})

    # ---- from time to time ----

    def _tick(self) -> None:
        now = time.monotonic()
        asleep, self._ticked_s = now - self._ticked_s > 1.0, now
        self.member.tick(now)
        self._follow()
        for worker in list(self.crew.workers.values()):
            worker.talk.flush()
            if asleep:  # this process was stopped: others were not heard because it did not listen
                worker.heard_s = now
            elif now - worker.heard_s > (
                self.post.silence_s if worker.ready else self.post.start_s
            ):
                self._on_silence(worker, now - worker.heard_s)
        if self.course.stumbled_s and now - self.course.stumbled_s > BROKEN_AFTER_S:
            self.course.stumbled_s = 0.0
            if seated := self.crew.seated():
                self._call("broken", seated[0], "a connection broke", "all meet again")
        self._fill_up(now=False)

    def _on_silence(self, worker: Worker, silent_s: float) -> None:
        """A worker that does not answer: killed, then replaced like any that died."""
        worker.heard_s = time.monotonic()
        print(
            f"rank {worker.rank} (pid {worker.pid}) was silent for {silent_s:.1f} s in"
            f" {worker.phase} of step {worker.step}: killed",
            file=sys.stderr,
        )
        self.crew.kill(worker)

    def _ending(self) -> bool:
        """Whether a worker has come to the run's end: nobody is needed any more."""
        return self.course.ending or any(w.done is not None for w in self.crew.workers.values())

    def _fill_up(self, now: bool) -> None:
        """Starts what is missing: at once what computes, spares when the run is under way."""
        course = self.course
        if course.signals or course.code is not None:
            return
        living = [w for w in self.crew.workers.values() if w.leaving is None and w.done is None]
        under_way = course.begun and time.monotonic() - course.entered_s > SPARE_AFTER_S
        missing = self.wants + (self.post.spares if under_way else 0) - len(living)
        if self._ending() or (not now and not under_way):
            return
        for _ in range(missing):
            self._start()


def supervise(post: Post, make_member: Callable[..., Member]) -> int:
    """Runs a post to its end; the exit code."""
    return Supervisor(post, make_member).run()


__all__ = ["Failure", "Post", "Supervisor", "os", "replace", "supervise"]
