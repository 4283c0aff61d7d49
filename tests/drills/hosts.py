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

from tests.conftest import (
    SMALL,
    clean_environment,
    read_events,
    read_rows,
    run_cordee,
    train_small,
    weights_digest,
)

STEPS = 160
LONG_RUN = (
    "run.exact=true", f"run.steps={STEPS}", "evaluate.sample=0", "evaluate.tokens=0",
    "checkpoint.every=50", "batch.microbatches=12", "fault.spares=0",
    "model.layers=2",
)  # fmt: skip
"""A run that lasts long enough for hosts to come and go: some ten seconds alone."""

STEP_OF_ROW = re.compile(rb'"step": ?(\d+)')


def free_port(ip: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe_socket:
        probe_socket.bind((ip, 0))
        return int(probe_socket.getsockname()[1])


def children_of(pid: int) -> list[int]:
    """Processes that `pid` has started and that live."""
    child_pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(stat[1]) == pid and stat[0] not in "ZX":
                child_pids.append(int(entry.name))
    return child_pids


class HostProcess:
    """One host: the command that a user would give there, its workers, and what it says."""

    def __init__(
        self, folder: Path, *arguments: str, prefix: Sequence[str] = (), path: str = ""
    ) -> None:
        """`path`: where Python looks first, before the package."""
        self.folder = folder
        environment = clean_environment()
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (path, environment["PYTHONPATH"])))
        self.start_s = time.monotonic()
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "cordee", "train", *SMALL, *LONG_RUN, *arguments,
             f"run.dir={folder}"],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._frozen_pids: list[int] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def output(self) -> str:
        """Everything so far."""
        return "".join(self.lines)

    @property
    def worker_pids(self) -> list[int]:
        """Its workers' process ids, and that of the template they are forks of."""
        return children_of(self.process.pid)

    @property
    def rank_pids(self) -> list[int]:
        """The process ids of its ranks."""
        names = {pid: Path(f"/proc/{pid}/comm") for pid in self.worker_pids}
        return [pid for pid, name in names.items() if name.read_text().startswith("cordee rank")]

    def kill(self) -> list[int]:
        """Kills the supervisor; its workers, which must go by themselves."""
        pids = self.worker_pids
        self.process.kill()
        self.process.wait()
        return pids

    def freeze(self) -> None:
        """Stops every process of this host; the supervisor first, it would kill a silent worker."""
        os.kill(self.process.pid, signal.SIGSTOP)
        self._frozen_pids = self.worker_pids
        for pid in self._frozen_pids:
            os.kill(pid, signal.SIGSTOP)

    def thaw(self, workers_first: bool = False) -> None:
        """Lets them go on."""
        pids = [self.process.pid, *self._frozen_pids]
        for pid in pids[::-1] if workers_first else pids:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue

    def send_signal(self, signal_number: int = signal.SIGTERM) -> None:
        """Tells it to leave."""
        self.process.send_signal(signal_number)

    def wait_exit(self, deadline_s: float = 120.0) -> int:
        """The exit code."""
        exit_code = self.process.wait(deadline_s)
        self._reader.join(5)
        return exit_code

    def cleanup(self) -> None:
        """Kills what is left of it, frozen or not."""
        pids = self.worker_pids
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in {*pids, *self._frozen_pids}:
            if is_process_alive(pid):
                os.kill(pid, signal.SIGKILL)


def is_process_alive(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class HostGroup:
    """All hosts of one run, as a context: nothing is left behind."""

    def __init__(self, folder: Path, *arguments: str, address: str = "") -> None:
        self.folder, self.arguments = folder, arguments
        self.address = address or f"127.0.0.1:{free_port()}"
        self.hosts: list[HostProcess] = []

    def __enter__(self) -> HostGroup:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        for host in self.hosts:
            host.cleanup()

    def start_first(
        self, *arguments: str, ranks: int = 1, prefix: Sequence[str] = ()
    ) -> HostProcess:
        """The first host."""
        return self._start_host(ranks, prefix, f"launch.listen={self.address}", *arguments)

    def join(
        self,
        *arguments: str,
        join_address: str = "",
        ranks: int = 1,
        prefix: Sequence[str] = (),
        **options: Any,
    ) -> HostProcess:
        """One more host, as soon as there is a run to join; `options`: another folder, another
        path."""
        self.wait_until(lambda: (self.folder / "members.id").exists(), 60)
        return self._start_host(
            ranks, prefix, f"launch.join={join_address or self.address}", *arguments, **options
        )

    def _start_host(
        self, ranks: int, prefix: Sequence[str], *arguments: str, **options: Any
    ) -> HostProcess:
        folder = options.pop("folder", self.folder)
        arguments = (f"launch.processes={ranks}", *self.arguments, *arguments)
        host = HostProcess(folder, *arguments, prefix=prefix, **options)
        self.hosts.append(host)
        return host

    def listen_address(self, host: HostProcess) -> str:
        """Where a host's supervisor listens; a joined one has a port of its own."""
        table = subprocess.run(["ss", "-Hltnp"], check=True, capture_output=True, text=True).stdout
        lines = [line.split() for line in table.splitlines() if f"pid={host.process.pid}," in line]
        return lines[0][3]

    # ---- what the run's folder says ----

    @property
    def last_step(self) -> int:
        """The newest row's step."""
        return int(self._last_value("step") or 0)

    @property
    def last_island_count(self) -> int:
        """How many islands computed the newest row."""
        return int(self._last_value("islands") or 0)

    def _last_value(self, key: str) -> int | None:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return None
        with open(path, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 8192))
            lines = stream.read().split(b"\n")[:-1]
        values = re.findall(rb'"%s": ?(\d+)' % key.encode(), lines[-1]) if lines else []
        return int(values[0]) if values else None

    def wait_for_step(self, step: int, deadline_s: float = 90.0) -> None:
        """Waits until that step is committed."""
        self.wait_until(lambda: self.last_step >= step, deadline_s)

    def wait_for_islands(self, count: int, deadline_s: float = 60.0) -> None:
        """Waits until so many islands compute."""
        self.wait_until(lambda: self.last_island_count == count, deadline_s)

    def wait_for_next_step(self) -> None:
        """Waits until a step is committed that is not now."""
        step = self.last_step
        self.wait_until(lambda: self.last_step > step, 60)

    def wait_until(self, condition: Callable[[], bool], deadline_s: float) -> None:
        """Waits for something; what all hosts said, when it does not come."""
        deadline = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < deadline, self.transcript()
            assert any(host.process.poll() is None for host in self.hosts), self.transcript()
            time.sleep(0.005)

    def transcript(self) -> str:
        """The end of what each host said."""
        parts = [
            f"--- host {number} (exit {host.process.poll()})\n{host.output[-2500:]}"
            for number, host in enumerate(self.hosts)
        ]
        return "\n".join(parts)


def check_run(folder: Path, expected_digest: str, steps: int = STEPS) -> list[dict[str, object]]:
    """The oracles: the clean run's digest, each step once, generations that never go back, each
    sample once. Returns the events."""
    metric_rows = read_rows(folder)
    assert [row["step"] for row in metric_rows] == list(range(1, steps + 1))
    quorums = [int(str(row["quorum"])) for row in metric_rows]
    assert quorums == sorted(quorums)
    assert weights_digest(folder) == expected_digest
    run_events = read_events(folder)
    assert [event["event"] for event in run_events].count("finished") == 1
    ledger = run_cordee("data", "ledger", str(folder))
    assert ledger.returncode == 0, ledger.stdout + ledger.stderr
    return run_events


def clean_digest(folder: Path, *arguments: str) -> str:
    """The digest of the run on one process, undisturbed."""
    train_small(folder, *LONG_RUN, *arguments, "launch.processes=1")
    return weights_digest(folder)


def all_exit_within(pids: Sequence[int], limit_s: float) -> bool:
    """Whether all these processes end in time."""
    deadline = time.monotonic() + limit_s
    while any(is_process_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
