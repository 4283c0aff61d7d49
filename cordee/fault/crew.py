"""A host's worker processes: started, seen to die at once, ended, and their last words kept.

A worker is the same command again with a line to this process (`dist/line.py`); which rank it is,
if any, it learns later. No torch, no port, no file: plan and words live in memory files, so a kill
of everything leaves nothing behind. Not here: who computes what (`orders.py`), when to replace
(`supervise.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cordee.dist.start import python_command, worker_environment
from cordee.dist.talk import MARK, Talk, pair
from cordee.fault.orders import Ready
from cordee.system import ChildWatch, memory_file

WORDS_BYTES = 1 << 16
"""How much of a worker's last words is shown."""


@dataclass(eq=False)
class Worker:
    """One process. `rank` is that of the generation at hand, None while it has no seat; `last_rank`
    and `generation` are its last seat's; `slot` says which local device is its own. `inside`,
    `stepped` and `halted` are generations: the one that it is in, the last in which it committed a
    step, the last of its seats that ended. `phase_s` is for how long it said to be in its phase,
    `since_s` since when by this host's clock. `judged`: why it was killed, if it was."""

    number: int
    process: subprocess.Popen[bytes]
    talk: Talk
    words: int
    mark: int
    watch: ChildWatch
    ready: bool = False
    rank: int | None = None
    last_rank: int | None = None
    generation: int = 0
    slot: int | None = None
    leaving: int | None = None
    done: int | None = None
    verdict: str = ""
    step: int = -1
    phase: str = "import"
    phase_s: float = 0.0
    since_s: float = 0.0
    inside: int = 0
    stepped: int = 0
    halted: int = 0
    halted_s: float = 0.0
    judged: str = ""
    heard_s: float = field(default_factory=time.monotonic)
    tried_s: float = field(default_factory=time.monotonic)
    """When it was started, or was given its last seat."""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def look(self) -> None:
        """Reads from its memory where it stands, also when it is dead."""
        step, phase = MARK.unpack(os.pread(self.mark, MARK.size, 0))
        if phase.strip(b"\0"):
            self.step, self.phase = step, phase.rstrip(b"\0").decode()

    def last_words(self) -> str:
        """The end of what it said on standard error while it was not the first rank."""
        size = os.fstat(self.words).st_size
        start = max(0, size - WORDS_BYTES)
        return os.pread(self.words, size - start, start).decode(errors="replace").strip()


class Crew:
    """The workers of this host, by number in the order of their start."""

    def __init__(self, command: Sequence[str], threads: int, plan: str, interface: str) -> None:
        """`command`: the words after `cordee`; `plan`: JSON, what workers check with."""
        self.command, self.threads, self.interface = list(command), threads, interface
        self.workers: dict[int, Worker] = {}
        self._plan = memory_file("cordee-plan")
        os.write(self._plan, plan.encode())
        self._terminal = (os.dup(1), os.dup(2))
        self._lifeline, self._alive = os.pipe()  # its other end ends with this process
        self._started = 0

    def start(self) -> Worker:
        """Starts a worker, which will say that it is ready. OSError: the system has no room."""
        talk, theirs = pair()
        words, mark = memory_file("cordee-words"), memory_file("cordee-mark")
        os.ftruncate(mark, MARK.size)
        descriptors = (theirs.fileno(), self._plan, mark, *self._terminal)
        try:
            process = subprocess.Popen(
                [*python_command(), *self.command],
                env=worker_environment(descriptors, self._lifeline, self.threads, self.interface),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=words,
                pass_fds=(*descriptors, self._lifeline),
                # Its own group: the terminal's Ctrl-C reaches us alone, and we pass it on once.
                process_group=0,
            )
        except OSError:
            talk.close()
            os.close(words)
            os.close(mark)
            raise
        finally:
            theirs.close()
        self._started += 1
        worker = Worker(self._started, process, talk, words, mark, ChildWatch(process))
        self.workers[worker.number] = worker
        return worker

    def seated(self) -> list[Worker]:
        """Workers that have a rank now, in its order."""
        found = [w for w in self.workers.values() if w.rank is not None]
        return sorted(found, key=lambda w: w.rank or 0)

    def free_slot(self) -> int:
        """The lowest local device that no living worker holds."""
        taken = {w.slot for w in self.workers.values()}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def bury(self, worker: Worker) -> int:
        """Takes a dead worker from the crew; its exit code, negative for a signal."""
        code = worker.process.wait()
        worker.talk.close()
        worker.watch.close()
        os.close(worker.words)
        os.close(worker.mark)
        self.workers.pop(worker.number, None)
        return code

    def ready(self, host: str) -> list[list[Any]]:
        """Who may be given a seat, for this host's report (`orders.assign`)."""
        return [
            Ready(host, w.number, w.pid, w.last_rank, w.generation).to_list()
            for w in self.workers.values()
            if w.ready and w.leaving is None and w.done is None
        ]

    def stranded(self, inside: int) -> str:
        """What a host says whose ranks wait because no island is whole."""
        ready = sum(w.ready for w in self.workers.values())
        return (
            f"no island is whole: {ready} of {inside} ranks are ready here; the run waits for"
            " others, and those keep their state"
        )

    def kill(self, worker: Worker, judged: str = "") -> None:
        """Ends a worker that does not answer; a stopped process hears no other signal. Its death,
        `judged` its cause, is dealt with like any."""
        worker.judged, worker.heard_s = judged, time.monotonic()
        worker.watch.kill()

    def end(self, grace_s: float) -> None:
        """Lets workers go for up to `grace_s`, then kills what is left."""
        deadline = time.monotonic() + grace_s
        for worker in list(self.workers.values()):
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
        for worker in list(self.workers.values()):
            if worker.process.poll() is None:
                self.kill(worker)
            self.bury(worker)


def how_it_died(code: int) -> str:
    """An exit code in words: 'was killed by signal 9 (SIGKILL)', 'left with exit code 1'."""
    if code >= 0:
        return f"left with exit code {code}"
    with suppress(ValueError):
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    return f"was killed by signal {-code}"


def verdict(worker: Worker, event: str, host: str, what: str, done: str) -> dict[str, Any]:
    """What was found of a worker and done about it: who, where, which phase, and one sentence."""
    rank = worker.rank if worker.rank is not None else worker.last_rank
    who = host if rank is None else f"rank {rank} (pid {worker.pid} on {host})"
    stood = f" in {worker.phase} of step {worker.step}" if worker.step >= 0 else ""
    return {
        "pid": worker.pid, "rank": rank, "phase": worker.phase, "step": worker.step,
        "event": event, "host": host, "cause": what, "done": done,
        "says": f"{who}: {what}{stood}; {done}",
    }  # fmt: skip
