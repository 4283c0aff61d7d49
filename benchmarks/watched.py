"""A training run as seen from outside: its rows as they come, its processes, and faults by signal.

Used by `recovery.py`, `rivals.py` and `soak.py`. Nothing of the run is asked or changed: what it
writes and what /proc says is all that is known here. Whatever happens, `household` leaves no
process behind.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Self

Row = dict[str, Any]
"""One step: at least `step`, `loss`, `quorum` (the generation) and `islands`."""

POLL_S = 0.001
PR_SET_CHILD_SUBREAPER = 36


class Late(RuntimeError):
    """What was waited for did not come before its deadline."""


@dataclass(frozen=True)
class Trial:
    """One fault: seconds to the next step and to two islands; NaN: it did not come back. `same`:
    whether the run ended with the bits of one without faults; None: its end was not waited for."""

    fault: str
    first_s: float
    full_s: float
    step_s: float
    same: bool | None = None


def judged(found: list[Trial], same: bool) -> list[Trial]:
    """The trials of a run whose end is known."""
    return [replace(trial, same=same) for trial in found]


class Rows:
    """The lines that are new in a file of JSON lines, also when it was cut back meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at, self._file, self._half = 0, 0, b""

    def new(self) -> list[Row]:
        """Whole lines since the last call."""
        try:
            with open(self.path, "rb") as stream:
                known = os.fstat(stream.fileno())
                if known.st_ino != self._file or known.st_size < self._at:
                    self._at, self._file, self._half = 0, known.st_ino, b""
                stream.seek(self._at)
                data = stream.read()
        except FileNotFoundError:
            return []
        self._at += len(data)
        *lines, self._half = (self._half + data).split(b"\n")
        return [json.loads(line) for line in lines if line]


class Watched:
    """A run that was started with `start`; more processes of it (other hosts) may follow.

    `rows` are all rows that were seen, by step, the newest of each; `last` is the newest.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.rows: dict[int, Row] = {}
        self.last: Row = {}
        self.started: list[subprocess.Popen[bytes]] = []
        self._new = Rows(folder / "metrics.jsonl")

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a process of the run in a session of its own; its words go to the log."""
        with open(self.log, "ab") as words:
            process = subprocess.Popen(
                list(command), env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL, stdout=words, stderr=words, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def look(self) -> list[Row]:
        """The rows since the last look."""
        fresh = self._new.new()
        for row in fresh:
            self.rows[row["step"]] = self.last = row
        return fresh

    def until(
        self, happened: Callable[[], bool], deadline_s: float, what: str, poll_s: float = 0.01
    ) -> None:
        """Waits, looking at rows meanwhile. Late: it did not happen; the run's words are told."""
        end = time.monotonic() + deadline_s
        while not happened():
            self.look()
            over = all(process.poll() is not None for process in self.started)
            if (over and not happened()) or time.monotonic() > end:
                raise Late(
                    "the run is over: " * over
                    + f"{what} did not happen in {deadline_s:.0f} s\n{self.words()}"
                )
            time.sleep(poll_s)

    def words(self) -> str:
        """The end of the run's words."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""

    def recovery(
        self, strike: Callable[[], object], full: int, deadline_s: float = 120.0
    ) -> tuple[float, float]:
        """Seconds from `strike` to the next committed step of a new generation, and of one with
        `full` islands. Late: it did not come back."""
        self.look()
        before = self.last.get("quorum", 0)
        began = time.monotonic()
        strike()
        first_s = 0.0
        while time.monotonic() - began < deadline_s:
            for row in self.look():
                if row["quorum"] <= before:
                    continue
                now_s = time.monotonic() - began
                first_s = first_s or now_s
                if row["islands"] >= full:
                    return first_s, now_s
            time.sleep(POLL_S)
        raise Late(f"not back after {deadline_s:.0f} s\n{self.words()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            end_tree(process.pid)
            process.wait()


def step_median_s(run: Watched) -> float:
    """The median of the newest steps' whole time, of those that all ranks took."""
    steps = [run.rows[n] for n in sorted(run.rows)[-60:]]
    pairs = [(a, b) for a, b in itertools.pairwise(steps) if a["quorum"] == b["quorum"]]
    whole = [float(b["elapsed_s"] - a["elapsed_s"]) for a, b in pairs if b["islands"] == 2]
    return median(whole)


def until_rows(run: Watched, count: int) -> None:
    """Waits for so many steps in all."""
    run.until(lambda: len(run.rows) >= count, 120, f"{count} steps")


# ---- processes -----------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """The living children of a process, its threads' included."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            found += [int(word) for word in (task / "children").read_text().split()]
    return [child for child in found if lives(child)]


def tree(pid: int) -> list[int]:
    """A process and everything below it."""
    return [pid, *(one for child in children(pid) for one in tree(child))]


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used so far; 0 when it is gone."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def thread_s(pid: int, name: str) -> float:
    """Seconds of processor time that the threads of that name in a process have used so far."""
    found = 0.0
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            if (task / "comm").read_text().strip() == name:
                found += int((task / "schedstat").read_text().split()[0]) / 1e9
    return found


def send(pid: int, number: int) -> None:
    """A signal to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def end_tree(pid: int) -> None:
    """Kills a process and everything below it."""
    for one in tree(pid):
        send(one, signal.SIGKILL)


@contextmanager
def household() -> Iterator[None]:
    """While this lasts, orphans of our processes become our children; at its end all are killed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        while left := children(os.getpid()):
            for child in left:
                end_tree(child)
            time.sleep(0.01)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        signal.signal(signal.SIGTERM, before)


# ---- Cordée --------------------------------------------------------------------------------------

WORDS = (
    "run.exact=true", "model.layers=2", "model.width=128", "model.heads=4", "data.sequence=128",
    "data.path=builtin:markov", "data.tokens=200000", "batch.microbatch=2",
    "batch.microbatches=6", "optim.name=adamw", "evaluate.sample=0", "evaluate.tokens=2048",
    "checkpoint.every=10", "launch.threads=1", "run.precision=fp32",
)  # fmt: skip
"""A small model: a step of some 50 ms on two processes of a quiet core each. fp32, which every
processor has; so a digest holds for all of one kind."""


def command(folder: Path, *words: str) -> list[str]:
    """The command line of a run in `folder`."""
    return [sys.executable, "-m", "cordee", "train", *WORDS, *words, f"run.dir={folder}"]


def events(folder: Path) -> list[dict[str, Any]]:
    """The run's events so far."""
    return Rows(folder / "events.jsonl").new()


def members(folder: Path) -> list[int]:
    """The pids of the newest generation, by rank; empty before the first."""
    told = [e["members"] for e in events(folder) if e.get("members")]
    return [int(member["pid"]) for member in told[-1]] if told else []


def called(pid: int) -> str:
    """What a worker calls itself: "rank 0", "ready" (a warm spare), or ""."""
    with suppress(OSError):
        head, _, name = Path(f"/proc/{pid}/comm").read_text().strip().partition(" ")
        return name if head == "cordee" else ""
    return ""


def settled(run: Watched, hosts: Sequence[subprocess.Popen[bytes]], full: int, spares: int) -> bool:
    """Whether `full` islands compute and every host's spares have imported everything."""
    run.look()
    names = [[called(child) for child in children(host.pid)] for host in hosts]
    ranks = sum(name.startswith("rank") for each in names for name in each)
    warm = all(each.count("ready") >= spares for each in names)
    return warm and ranks == full == run.last.get("islands")


def address_of(folder: Path, but: str) -> str:
    """Where a living host of the newest view is met that is not the founder. A view names a host
    that has just been killed until the others have voted. Late: nobody answers."""
    known = json.loads((folder / "members.json").read_text())["view"]["hosts"]
    for address in (str(host).partition("#")[0] for host in known):
        if address != but and listens(address):
            return address
    raise Late(f"no host of {known} but {but or 'none'} answers")


def listens(address: str) -> bool:
    """Whether somebody takes connections at host:port."""
    host, _, port = address.rpartition(":")
    with socket.socket() as asking:
        asking.settimeout(5)
        return asking.connect_ex((host, int(port))) == 0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as asking:
        asking.bind(("127.0.0.1", 0))
        return int(asking.getsockname()[1])
