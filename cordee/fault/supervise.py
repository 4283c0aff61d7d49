"""A host's supervisor: keeps its workers running and, with other hosts', decides who computes what.

One thread, one selector, no torch. A worker that dies is seen at once, one that falls
silent is killed; either way the hosts agree on a new generation (`members.py`) in which the others,
a warm spare among them, go on. Not here: what a worker does (`train.py`); messages between hosts
(`hosts.py`). Traded away: a watcher of the watcher; workers die with their supervisor, and the same
command goes on from the newest checkpoint.
"""

from __future__ import annotations

import selectors
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

from cordee.dist.streams import say
from cordee.errors import RunError
from cordee.fault.course import ASKED, SIGNALS, Course, Failure, Post, is_heeded, seat_of
from cordee.fault.crew import Crew, Worker, how_it_died, verdict
from cordee.fault.hosts import Hosts, Meeting
from cordee.fault.memory import oom_kills
from cordee.fault.orders import assign, is_run
from cordee.fault.views import Change, Entered, Fenced, Halted, Left, View
from cordee.fault.watch import Watch

GRACE_S = 10.0
"""How long ranks may take to leave after the run has failed."""

SPARE_AFTER_S = 3.0
"""Spares are started once a generation has run for so long: starts come first."""

BROKEN_AFTER_S = 1.0
"""A connection that broke although nobody died is acted upon after so long."""

TICK_S = 0.1

AGAIN_S = 1.0
"""Between two tries to start a worker that the system refuses."""

UNDER_WAY = ("step.", "evaluate", "finish")
"""Phases of a worker whose generation has its state, and has written what led to it."""


class Supervisor:
    """See the file's header. `run` returns the exit code."""

    def __init__(self, post: Post, meeting: Meeting) -> None:
        self.post = post
        self.wants = post.wants
        self.name = socket.gethostname()
        self.course = Course()
        self.watch = Watch(post.silence_s, post.start_s)
        self.crew = Crew(post.command, post.threads, post.plan, post.interface)
        self.hosts = Hosts(
            meeting, lambda reports: assign(reports, post.inside, post.plan_for), self.report
        )
        self.founds = not meeting.through
        self.view: View | None = None
        self._selector = selectors.DefaultSelector()
        self._ooms = oom_kills()
        self._short_s = 0.0
        """When the system last refused a worker; 0: it gave the last one."""

    def run(self) -> int:
        """Until the run is over: 0 done, 1 failed, 128 + signal when asked to leave."""
        wake, woken = socket.socketpair()
        woken.setblocking(False)
        before = {s: signal.signal(s, self._on_signal) for s in SIGNALS if is_heeded(s)}
        former = signal.set_wakeup_fd(woken.fileno())
        self._selector.register(wake, selectors.EVENT_READ, lambda: wake.recv(4096))
        self._listen()
        try:
            for _ in range(self.wants):
                self._start()
            # While they import: what a first death would have to wait for.
            self.post.plan_for(max(1, self.wants // self.post.inside - 1))
            while self.course.code is None:
                for key, _ in self._selector.select(TICK_S):
                    if self.course.code is None:  # else all workers are buried
                        key.data()
                self._tick()
            if self.view is not None and self.course.code not in ASKED:
                self.hosts.tell_over(self.course.code)
            return self.course.code
        finally:
            signal.set_wakeup_fd(former)
            self.crew.end(0.0)
            self.hosts.close()
            self._selector.close()
            wake.close()
            woken.close()
            for number, action in before.items():
                signal.signal(number, action)

    def report(self) -> dict[str, Any]:
        """What this host has, for the orders of a view."""
        return {
            "name": self.name, "wants": self.wants, "ready": self.crew.ready(self.name),
            "begun": self.course.begun, "stranded": self.course.stranded,
        }  # fmt: skip

    @property
    def _several(self) -> bool:
        """Whether other hosts are in the run now."""
        return self.view is not None and len(self.view.hosts) > 1

    # ---- what happens ----

    def _listen(self) -> None:
        if self.hosts.link is not None:
            self._selector.register(self.hosts.link, selectors.EVENT_READ, self._follow)

    def _start(self) -> bool:
        """Starts a worker; False when the system has no room for it now: others may go on."""
        try:
            worker = self.crew.start()
        except OSError as error:
            if not (self.crew.workers or self.course.begun):
                raise RunError(
                    "no worker can be started",
                    values={"host": self.name, "cause": error.strerror or str(error)},
                    fix="more processes (ulimit -u) or memory, then the same command",
                ) from error
            if not self._short_s:
                self._print(f"a worker cannot be started: {error.strerror}; it is tried again")
            self._short_s = time.monotonic()
            return False
        self._short_s = 0.0
        self._selector.register(worker.watch, selectors.EVENT_READ, lambda: self._on_death(worker))
        self._selector.register(worker.talk, selectors.EVENT_READ, lambda: self._on_words(worker))
        return True

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.course.signals.append(number)

    def _heed(self) -> None:
        """Acts on signals: leave in good order, at the second one at once."""
        course = self.course
        if len(course.signals) == course.heeded:
            return
        new_s = time.monotonic() - course.entered_s
        if self._several and course.untold and not course.hurries and new_s < GRACE_S:
            return  # this host may be the only one that holds the run's state
        course.heeded = len(course.signals)
        number = course.signals[-1 if course.hurries else 0]
        waits = self.view is not None and course.begun and not is_run(self.view.orders)
        if course.hurries or waits or not self.crew.seated():
            course.code = 128 + number
        elif self._several:
            self.hosts.member.leave(time.monotonic())
        else:
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
        course = self.course
        match message:
            case {"say": "beat", "step": step, "phase": phase, "generation": generation}:
                self.watch.beat(worker, message)
                course.step = max(course.step, step)
                here = self.view is not None and generation == self.view.number
                if here and phase.startswith(UNDER_WAY):
                    course.untold.clear()
            case {"say": "ready"}:
                worker.ready = True
                self._on_ready(worker)
            case {"say": "stumbled", "generation": generation, "step": step}:
                worker.step, course.step = step, max(course.step, step)
                if self.view is not None and generation == self.view.number:
                    course.stumbled_s = course.stumbled_s or time.monotonic()
            case {"say": "set", "generation": generation, "key": key, "value": value}:
                self.hosts.set(generation, key, value)
            case {"say": "get", "generation": generation, "key": key, "number": number}:
                self.hosts.get(
                    generation,
                    key,
                    lambda v: worker.talk.say({"do": "answer", "number": number, "value": v}),
                )
            case {"say": "leaving", "signal": number}:
                self._on_leaving(worker, number)
            case {"say": "done", "code": code, "verdict": verdict}:
                course.ending = True
                course.over = course.over or (worker.rank == 0 and code == 0)
                worker.done, worker.verdict = code, verdict

    def _on_ready(self, worker: Worker) -> None:
        """A worker that fills a gap is a reason for a new generation; a spare is none."""
        ready = [w for w in self.crew.workers.values() if w.ready]
        if self.course.ending:
            return
        if self.course.begun:
            inside, seated = self.post.inside, len(self.crew.seated())
            islands = min(len(ready), self.wants) // inside
            # With other hosts' ranks this one may make an island whole that this host cannot.
            if islands * inside > seated or (self._several and seated < self.wants):
                self._call("joined", worker, f"pid {worker.pid} is ready", "it gets a seat")
        elif len(ready) >= self.wants and not self.founds and self.view is None:
            self.hosts.join()
        elif len(ready) >= self.wants:
            self._call("begun", worker, f"{len(ready)} ranks are ready", "they get seats")

    def _on_leaving(self, worker: Worker, number: int) -> None:
        """A worker that alone was told to go: the others go on; the last one makes all leave."""
        others = [w for w in self.crew.workers.values() if w.ready and w is not worker]
        if not self._several and len(others) < self.post.inside:
            self.course.signals.append(number)
            return
        worker.leaving = number
        self.wants = max(self.wants - 1, 0)
        name = signal.Signals(number).name
        self._call("left", worker, f"it was told to leave by {name}", "the others go on")

    def _on_death(self, worker: Worker) -> None:
        self._on_words(worker)
        self._selector.unregister(worker.watch)
        with suppress(KeyError, ValueError):
            self._selector.unregister(worker.talk)
        words = worker.last_words()
        worker.look()
        code = self.crew.bury(worker)
        if worker.done is not None:
            self._on_end(worker, words)
        elif worker.leaving is None:
            self._on_failure(worker, code, words)

    def _on_end(self, worker: Worker, words: str) -> None:
        """A worker that said its end before it went."""
        course = self.course
        assert worker.done is not None
        if worker.done and worker.verdict:
            self.crew.end(GRACE_S)
            Failure(worker.step, worker.verdict, "", words, worker.done).tell()
            course.code = worker.done
        elif not [w for w in self.crew.seated() if w.done is None]:
            course.code = worker.done

    def _on_failure(self, worker: Worker, code: int, words: str) -> None:
        course, seat = self.course, worker.rank
        if -code in course.signals or course.over:  # it did what it was told, or was not needed
            course.code = 0 if course.over else 128 - code
            return
        if seat is None and worker.ready and course.begun:  # a spare: nobody waits for it
            return
        course.ending = False
        who = f"rank {seat} (pid {worker.pid})" if seat is not None else f"pid {worker.pid}"
        failure = Failure(worker.step, who, worker.judged or self._how(code), words, code)
        in_a_row = course.fail(failure, worker.tried_s)
        last = course.signals and not self._several and not self.crew.workers
        if code == 2 or not self.post.recover or in_a_row >= self.post.tries or last:
            self.crew.end(GRACE_S if in_a_row == 1 else 0.0)
            course.code = course.give_up()
            return
        if words:
            failure.tell("")
        if seat is not None:
            spare = any(w.ready and w.rank is None for w in self.crew.workers.values())
            done = "a warm spare takes its place" if spare else "the others go on"
            self._call("lost", worker, failure.cause, done)
        self._fill_up(now=True)

    def _how(self, code: int) -> str:
        """How a worker died that nobody here has killed."""
        before, self._ooms = self._ooms, oom_kills()
        short = code == -signal.SIGKILL and self._ooms > before
        return how_it_died(code) + (", as the kernel was out of memory" if short else "")

    # ---- generations ----

    def _call(self, event: str, worker: Worker, what: str, done: str) -> None:
        """Asks for a new generation, and says why in one sentence."""
        known = verdict(worker, event, self.name, what, done)
        self.hosts.member.call(known, time.monotonic())
        self._follow()

    def _follow(self) -> None:
        """Carries messages between hosts, and acts on what the membership decided."""
        self.hosts.carry()
        for change in self.hosts.member.take_changes():
            self._on_change(change)
        self.hosts.carry()

    def _on_change(self, change: Change) -> None:
        match change:
            case Halted(number):
                self.course.halted_s = time.monotonic()
                for worker in self.crew.workers.values():
                    if worker.rank is not None:
                        worker.talk.say({"do": "halt", "generation": number})
                        self.watch.halt(worker, number)
                    worker.rank = None
            case Entered(view):
                self.post.hold.share()
                self._enter(view)
                if self.course.signals and not self._several and not self.crew.seated():
                    self.course.code = 128 + self.course.signals[0]
            case Fenced(sentence):
                self._print(f"{sentence}; it asks to be let in again")
                self.view = None
                self._ask_again()
            case Left():
                self.course.code = 128 + (self.course.signals or [signal.SIGTERM])[0]

    def _enter(self, view: View) -> None:
        """Gives this host's workers their seats in a new generation."""
        course, orders = self.course, view.orders
        self.view, course.stumbled_s, course.entered_s = view, 0.0, time.monotonic()
        course.stranded, course.waits_s = False, 0.0
        self.hosts.keys.begin(view.number)
        for worker in self.crew.workers.values():
            if worker.leaving is not None:
                worker.talk.say({"do": "end"})
        course.untold += view.why
        if not orders:
            if course.begun:
                course.waits_s = course.entered_s
                self._print(self.crew.stranded(self.post.inside))
            return
        armed = ""
        if is_run(orders):
            armed = self.post.drill(course.generations)
            course.begun, course.generations = True, course.generations + 1
            if words := self.hosts.shown(orders):
                self._print(words)
        for rank, (host, number, pid) in enumerate(orders["ranks"]):
            if host != self.hosts.member.me:
                continue
            if number not in self.crew.workers:  # it died meanwhile: nobody may wait for it
                says = f"pid {pid} on {self.name} died before it had its seat; all meet again"
                known = {"event": "lost", "host": self.name, "pid": pid, "rank": rank, "says": says}
                self.hosts.member.call(known, time.monotonic())
                continue
            worker = self.crew.workers[number]
            worker.slot = self.crew.free_slot() if worker.slot is None else worker.slot
            worker.rank, worker.tried_s = rank, course.entered_s
            if is_run(orders):
                worker.last_rank, worker.generation = rank, view.number
            worker.talk.say({"do": "sit", "seat": seat_of(view, rank, worker.slot, course, armed)})
            if course.signals and not self._several:
                worker.talk.say({"do": "leave", "signal": course.signals[0]})

    # ---- from time to time ----

    def _tick(self) -> None:
        now = time.monotonic()
        self._heed()
        if self.hosts.over is None:
            self.hosts.member.tick(now)
        self._follow()
        self._heed_others(now)
        for worker in self.crew.workers.values():
            worker.talk.flush()
        for worker, judged in self.watch.judge(self.crew.workers.values()):
            self.crew.kill(worker, judged)
        if stuck := self.watch.stuck(self.crew.seated()):
            self._call("stuck", *stuck, "all meet again, and who does not come is replaced")
        if self.course.strands(now) and self.view and self.view.leader == self.hosts.member.me:
            says = "no island has been whole for long; what is left of the run is saved"
            self.hosts.member.call({"event": "stranded", "host": self.name, "says": says}, now)
        if self.course.stumbled_s and now - self.course.stumbled_s > BROKEN_AFTER_S:
            self.course.stumbled_s = 0.0
            if seated := self.crew.seated():
                self._call("broken", seated[0], "a connection broke", "all meet again")
        self._fill_up(now=False)

    def _heed_others(self, now: float) -> None:
        """Acts on the news of the end, on refusals, and on a wish that is not heard."""
        course, hosts = self.course, self.hosts
        # A rank that was given a seat while the first one came to the end would wait for it.
        code = 0 if course.over else hosts.over
        if code is not None:
            course.over = code == 0
            course.ended_s = course.ended_s or now
            if not self.crew.seated() or now - course.ended_s > GRACE_S:
                course.code = code
            return
        if others := hosts.refused_others():
            self._print(f"refused {others}")
        if ending := hosts.shut_out(self.post.hold.is_alone):
            course.code, words = ending
            say(words)
        elif hosts.unheard:
            self._ask_again()

    def _ask_again(self) -> None:
        if self.hosts.link is not None:
            self._selector.unregister(self.hosts.link)
        self.hosts.again()
        self._listen()

    def _print(self, sentence: str) -> None:
        say(f"{self.name}: {sentence}")

    def _fill_up(self, now: bool) -> None:
        """Starts what is missing: at once what computes, spares when the run is under way."""
        course = self.course
        if course.signals or course.ending or course.code is not None:
            return
        living = [w for w in self.crew.workers.values() if w.leaving is None]
        under_way = course.begun and time.monotonic() - course.entered_s > SPARE_AFTER_S
        missing = self.wants + (self.post.spares if under_way else 0) - len(living)
        if self._short_s and time.monotonic() - self._short_s < AGAIN_S:
            return
        for _ in range(missing if now or under_way or self._short_s else 0):
            if not self._start():
                return


def supervise(post: Post, meeting: Meeting) -> int:
    """Runs a post to its end; the exit code. The founder holds the run's folder already."""
    return Supervisor(post, meeting).run()
