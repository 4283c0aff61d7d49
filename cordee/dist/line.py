"""A worker's line to its host's supervisor: seats, halts, heartbeats, and the rendezvous store.

A worker takes part in one generation after another. For each it is given a seat: rank, size, plan.
When a generation ends (a peer died, froze or left, or somebody joined), the line shuts this
process's TCP connections, so that a collective that waits for a peer raises at once, whatever the
peer's state; gloo's own `abort` does not wake it. The store that process groups are made through
belongs to one generation, so no key of the dead is ever read. Not here: what is done with the
state (`train.py`, `resume.py`), and who gets a seat (`fault/supervise.py`).
"""

from __future__ import annotations

import base64
import math
import mmap
import os
import queue
import select
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from cordee.dist.start import Launched
from cordee.dist.talk import MARK, Talk
from cordee.system import connections, set_name

BEAT_S = 0.2
"""Seconds between heartbeats."""

GRACE_S = 0.25
"""From the end of a generation to the cut: a rank that hears of it by itself, or at its next step,
leaves its island where it stands; one that waits for the frozen or unreachable needs the cut."""

BROKEN = ("gloo", "Connection closed", "Connection reset", "timed out", "Timed out", "Broken pipe")
"""What the library's words say when a peer is gone; it has no class for it."""


SAFE = ("step.start", "group", "fill", "evaluate", "finish")
"""Points at which a worker may turn back."""


class Halted(RuntimeError):
    """The generation ended while something of it was waited for."""


@dataclass(frozen=True)
class Seat:
    """This worker's place in a generation. `plan` is JSON; `why` are the verdicts that led to it;
    `members` name every rank's process (host, pid); `drill` is the fault that is armed in it."""

    generation: int
    rank: int
    size: int
    local_rank: int
    plan: str
    why: Sequence[Mapping[str, Any]] = ()
    members: Sequence[Mapping[str, Any]] = ()
    drill: str = ""
    ended_s: float = 0.0
    """Monotonic time of this host at which the generation before ended; 0: there was none."""
    rescue: bool = False
    """Not to train: to save, with the others, what is left of the run, and to wait."""


@dataclass
class _Question:
    answer: bytes = b""
    done: threading.Event = field(default_factory=threading.Event)


class Line:
    """See the file's header. One thread reads, answers and beats; the main thread trains."""

    def __init__(self, descriptor: int, mark: int, terminal: tuple[int, int]) -> None:
        """`descriptor`: the inherited end; `mark`: memory in which this worker notes where it is,
        to be read when it is dead; `terminal`: where the first rank's words go."""
        self._talk = Talk(socket.socket(fileno=descriptor))
        self._noted = mmap.mmap(mark, MARK.size)
        self._lock = threading.Lock()
        self._seats: queue.SimpleQueue[Seat | None] = queue.SimpleQueue()
        self._questions: dict[int, _Question] = {}
        self._terminal = terminal
        self._own = (os.dup(1), os.dup(2))
        self._halted = 0
        self._cut_s = math.inf
        self._seat: Seat | None = None
        self._ended = threading.Condition()
        self._cutting = threading.Lock()
        """Held while connections are cut: none of the next generation is made meanwhile."""
        self.asked: int | None = None
        """The signal by which the supervisor asks all ranks to leave; None while it does not."""
        self.step = -1
        self.phase = "import"
        self._marked_s = time.monotonic()
        threading.Thread(target=self._serve, name="cordee-line", daemon=True).start()

    # ---- the main thread ----

    def ready(self) -> None:
        """Says that this worker has imported everything and may be given a seat."""
        set_name("cordee ready")
        self._say({"say": "ready"})

    def take(self) -> Seat | None:
        """Waits for the next seat; None: nothing is left to do, or the supervisor is gone."""
        with self._cutting:
            self._seat = None
        self.mark("wait", self.step)
        while True:
            seat = self._seats.get()
            if seat is None or seat.generation > self._halted:
                self._cut_s, self._seat = math.inf, seat
                set_name("cordee ending" if seat is None else f"cordee rank {seat.rank}")
                self._show(seat is not None and seat.rank == 0)
                return seat

    def mark(self, phase: str, step: int) -> None:
        """Notes where in a step this worker is. Halted: its generation ended, and nothing of a step
        has begun (a rank that is alone would not hear of it by a broken connection)."""
        if phase.startswith("save."):
            return
        self.phase, self.step, self._marked_s = phase, step, time.monotonic()
        MARK.pack_into(self._noted, 0, step, phase.encode())
        if self._seat is not None and self._halted >= self._seat.generation and phase in SAFE:
            raise Halted(f"generation {self._seat.generation} ended")

    def interrupted(self, error: RuntimeError, patience_s: float) -> bool:
        """Whether `error` comes from the end of this generation, not from this worker.

        A broken connection is reported; the supervisors then agree on what to do, and this waits
        for their word, at most `patience_s`.
        """
        seat = self._seat
        if seat is None:
            return False
        if self._halted < seat.generation:
            text = str(error) or type(error).__name__
            known = isinstance(error, Halted | dist.DistError)
            if not known and not any(word in text for word in BROKEN):
                return False
            self._say({"say": "stumbled", "generation": seat.generation, "step": self.step,
                       "cause": text.splitlines()[0][:300]})  # fmt: skip
            with self._ended:
                self._ended.wait_for(lambda: self._halted >= seat.generation, patience_s)
        return self._halted >= seat.generation

    def leave(self, signal_number: int) -> None:
        """Says that this worker alone was told to go (a preemption notice)."""
        self._say({"say": "leaving", "signal": signal_number})

    def finish(self, code: int, verdict: str = "") -> None:
        """Says that this worker is at its end: `code` is what it will exit with."""
        self._say({"say": "done", "code": code, "verdict": verdict})
        self._show(False)

    def hush(self) -> None:
        """Says where this worker stands at its end, and gives the terminal back: a failure's words
        are the supervisor's to tell."""
        self._beat()
        self._show(False)

    def store(self, seat: Seat) -> Store:
        """The store through which the groups of `seat`'s generation are made."""
        return _Store(self, seat.generation)

    # ---- store ----

    def put(self, generation: int, key: str, value: bytes) -> None:
        """Writes a key of a generation."""
        word = base64.b64encode(value).decode()
        self._say({"say": "set", "generation": generation, "key": key, "value": word})

    def get(self, generation: int, key: str, patience_s: float) -> bytes:
        """Waits for a key of a generation. Halted: the generation ended, or nobody wrote it."""
        asked = _Question()
        with self._lock:
            number = len(self._questions)
            self._questions[number] = asked
        self._say({"say": "get", "generation": generation, "key": key, "number": number})
        deadline = time.monotonic() + patience_s
        while not asked.done.wait(0.05):
            if self._halted >= generation or time.monotonic() > deadline:
                raise Halted(f"generation {generation} ended while {key} was waited for")
        return asked.answer

    # ---- the line's thread ----

    def _serve(self) -> None:
        set_name("cordee line", thread=True)
        due = 0.0
        while not self._talk.closed:
            now, seat = time.monotonic(), self._seat
            if now >= due:
                due = now + BEAT_S
                self._beat()
            cut_s = math.inf if seat is None else self._cut_s
            select.select([self._talk], [], [], max(0.0, min(due, cut_s) - time.monotonic()))
            for message in self._talk.hear():
                self._obey(message)
            self._cut_if_due()
        self._seats.put(None)

    def _cut_if_due(self) -> None:
        """Shuts this process's connections once its generation has ended and the grace is over."""
        with self._cutting:
            seat, now = self._seat, time.monotonic()
            if seat is not None and self._halted >= seat.generation and now >= self._cut_s:
                cut_connections()
                self._cut_s = now + GRACE_S  # again: what was about to connect has by then

    def _obey(self, message: Mapping[str, Any]) -> None:
        match message["do"]:
            case "sit":
                self._seats.put(Seat(**message["seat"]))
            case "halt":
                with self._ended:
                    self._halted = max(self._halted, int(message["generation"]))
                    self._cut_s = time.monotonic() + GRACE_S
                    self._ended.notify_all()
            case "answer":
                asked = self._questions[message["number"]]
                asked.answer = base64.b64decode(message["value"])
                asked.done.set()
            case "leave":
                self.asked = int(message["signal"])
            case "end":
                self._seats.put(None)

    def _beat(self) -> None:
        for_s, seat = round(time.monotonic() - self._marked_s, 3), self._seat
        self._say({
            "say": "beat", "step": self.step, "phase": self.phase, "for_s": for_s,
            "generation": 0 if seat is None else seat.generation,
        })  # fmt: skip

    def _say(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            self._talk.say(message)

    def _show(self, first: bool) -> None:
        """The first rank writes to the terminal, the others to where the supervisor keeps it."""
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        for number, there in enumerate(self._terminal if first else self._own, 1):
            os.dup2(there, number)


class _Store(Store):
    """A generation's keys, kept by the supervisors.

    The library begins the default group's keys with how many groups this process has tried to make,
    and ranks that have seen other faults count differently: that number is left out.
    """

    def __init__(self, line: Line, generation: int) -> None:
        super().__init__()
        self._line, self._generation = line, generation
        self._patience_s = 20.0

    def set(self, key: str, value: str | bytes) -> None:
        """Writes a key."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._line.put(self._generation, _uncounted(key), data)

    def get(self, key: str) -> bytes:
        """Waits for a key."""
        return self._line.get(self._generation, _uncounted(key), self._patience_s)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Waits for keys."""
        patience_s = timeout.total_seconds() if timeout else self._patience_s
        for key in keys:
            self._line.get(self._generation, _uncounted(key), patience_s)

    def set_timeout(self, timeout: timedelta) -> None:
        """How long a key is waited for."""
        self._patience_s = timeout.total_seconds()


def _uncounted(key: str) -> str:
    head, mark, rest = key.partition("//")
    return rest if mark and head.isdigit() and len(head) < 10 else key


def open_line(told: Launched) -> Line | None:
    """The line of a worker that a supervisor started; None for any other process."""
    return Line(told.line, told.mark, told.terminal) if told.line >= 0 else None


def cut_connections() -> None:
    """Shuts every TCP connection of this process: the process groups', which then raise."""
    # A listening socket must stay as it is: gloo takes its end for a fault of its own.
    for end in connections():
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
