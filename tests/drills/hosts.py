"""Hosts of one run, as processes of this machine: started, killed, frozen, told to leave, watched.

Not a test. Signals go only to processes that a test has started, found by the parent's id.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.conftest import SMALL, clean_environment, cordee, digest, events, rows, train

STEPS = 160
LONG = (
    "run.exact=true", f"run.steps={STEPS}", "evaluate.sample=0", "evaluate.tokens=0",
    "checkpoint.every=50", "batch.microbatches=12", "fault.spares=0",
    "model.layers=2",
)  # fmt: skip
"""A run that lasts long enough for hosts to come and go: some ten seconds alone."""

STEP_OF_ROW = re.compile(rb'"step": ?(\d+)')


def free_port(ip: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket() as asked:
        asked.bind((ip, 0))
        return int(asked.getsockname()[1])


def children_of(pid: int) -> list[int]:
    """Processes that `pid` has started and that live."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(stat[1]) == pid and stat[0] not in "ZX":
                found.append(int(entry.name))
    return found


class Host:
    """One host: the command that a user would give there, its workers, and what it says."""

    def __init__(
        self, folder: Path, *words: str, prefix: Sequence[str] = (), path: str = ""
    ) -> None:
        """`path`: where Python looks first, before the package."""
        self.folder = folder
        environment = clean_environment()
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (path, environment["PYTHONPATH"])))
        self.began_s = time.monotonic()
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "cordee", "train", *SMALL, *LONG, *words,
             f"run.dir={folder}"],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._crew: list[int] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def said(self) -> str:
        """Everything so far."""
        return "".join(self.lines)

    @property
    def workers(self) -> list[int]:
        """Its workers' process ids."""
        return children_of(self.process.pid)

    def kill(self) -> list[int]:
        """Kills the supervisor; its workers, which must go by themselves."""
        workers = self.workers
        self.process.kill()
        self.process.wait()
        return workers

    def freeze(self) -> None:
        """Stops every process of this host; the supervisor first, it would kill a silent worker."""
        os.kill(self.process.pid, signal.SIGSTOP)
        self._crew = self.workers
        for pid in self._crew:
            os.kill(pid, signal.SIGSTOP)

    def thaw(self, workers_first: bool = False) -> None:
        """Lets them go on."""
        order = [self.process.pid, *self._crew]
        for pid in order[::-1] if workers_first else order:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue

    def ask(self, number: int = signal.SIGTERM) -> None:
        """Tells it to leave."""
        self.process.send_signal(number)

    def end(self, deadline_s: float = 120.0) -> int:
        """The exit code."""
        code = self.process.wait(deadline_s)
        self._reader.join(5)
        return code

    def put_away(self) -> None:
        """Kills what is left of it, frozen or not."""
        workers = self.workers
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in {*workers, *self._crew}:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Rope:
    """All hosts of one run, as a context: nothing is left behind."""

    def __init__(self, folder: Path, *words: str, address: str = "") -> None:
        self.folder, self.words = folder, words
        self.address = address or f"127.0.0.1:{free_port()}"
        self.hosts: list[Host] = []

    def __enter__(self) -> Rope:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        for host in self.hosts:
            host.put_away()

    def found(self, *words: str, ranks: int = 1, prefix: Sequence[str] = ()) -> Host:
        """The first host."""
        return self._add(ranks, prefix, f"launch.listen={self.address}", *words)

    def join(
        self, *words: str, through: str = "", ranks: int = 1, prefix: Sequence[str] = (), **own: Any
    ) -> Host:
        """One more host, as soon as there is a run to join; `own`: another folder, another path."""
        self.wait(lambda: (self.folder / "members.id").exists(), 60)
        return self._add(ranks, prefix, f"launch.join={through or self.address}", *words, **own)

    def _add(self, ranks: int, prefix: Sequence[str], *words: str, **own: Any) -> Host:
        folder = own.pop("folder", self.folder)
        words = (f"launch.processes={ranks}", *self.words, *words)
        host = Host(folder, *words, prefix=prefix, **own)
        self.hosts.append(host)
        return host

    def address_of(self, host: Host) -> str:
        """Where a host's supervisor listens; a joined one has a port of its own."""
        table = subprocess.run(["ss", "-Hltnp"], check=True, capture_output=True, text=True).stdout
        lines = [line.split() for line in table.splitlines() if f"pid={host.process.pid}," in line]
        return lines[0][3]

    # ---- what the run's folder says ----

    @property
    def step(self) -> int:
        """The newest row's step."""
        return int(self._last("step") or 0)

    @property
    def islands(self) -> int:
        """How many islands computed the newest row."""
        return int(self._last("islands") or 0)

    def _last(self, key: str) -> int | None:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return None
        with open(path, "rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, end - 8192))
            lines = stream.read().split(b"\n")[:-1]
        found = re.findall(rb'"%s": ?(\d+)' % key.encode(), lines[-1]) if lines else []
        return int(found[0]) if found else None

    def until_step(self, step: int, deadline_s: float = 90.0) -> None:
        """Waits until that step is committed."""
        self.wait(lambda: self.step >= step, deadline_s)

    def until_islands(self, count: int, deadline_s: float = 60.0) -> None:
        """Waits until so many islands compute."""
        self.wait(lambda: self.islands == count, deadline_s)

    def goes_on(self) -> None:
        """Waits until a step is committed that is not now."""
        step = self.step
        self.wait(lambda: self.step > step, 60)

    def wait(self, happened: Callable[[], bool], deadline_s: float) -> None:
        """Waits for something; what all hosts said, when it does not come."""
        end = time.monotonic() + deadline_s
        while not happened():
            assert time.monotonic() < end, self.told()
            assert any(host.process.poll() is None for host in self.hosts), self.told()
            time.sleep(0.005)

    def told(self) -> str:
        """The end of what each host said."""
        parts = [
            f"--- host {number} (exit {host.process.poll()})\n{host.said[-2500:]}"
            for number, host in enumerate(self.hosts)
        ]
        return "\n".join(parts)


def check_run(folder: Path, clean: str, steps: int = STEPS) -> list[dict[str, object]]:
    """The oracles: the clean run's digest, each step once, generations that never go back, each
    sample once. Returns the events."""
    written = rows(folder)
    assert [row["step"] for row in written] == list(range(1, steps + 1))
    quorums = [int(str(row["quorum"])) for row in written]
    assert quorums == sorted(quorums)
    assert digest(folder) == clean
    found = events(folder)
    assert [event["event"] for event in found].count("finished") == 1
    ledger = cordee("data", "ledger", str(folder))
    assert ledger.returncode == 0, ledger.stdout + ledger.stderr
    return found


def clean_digest(folder: Path, *words: str) -> str:
    """The digest of the run on one process, undisturbed."""
    train(folder, *LONG, *words, "launch.processes=1")
    return digest(folder)


def gone_within(pids: Sequence[int], limit_s: float) -> bool:
    """Whether all these processes end in time."""
    end = time.monotonic() + limit_s
    while any(alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
