"""A training run as seen from outside: its rows as they come, its processes, and faults by signal.

Used by `recovery.py`, `rivals.py` and `soak.py`. Nothing of the run is asked or changed: what it
writes and what /proc says is all that is known here. Whatever happens, `subreaper` leaves no
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


class DeadlineExceeded(RuntimeError):
    """What was waited for did not come before its deadline."""


@dataclass(frozen=True)
class FaultTrial:
    """One fault: seconds to the next step and to two islands; NaN: it did not come back. `same`:
    whether the run ended with the bits of one without faults; None: its end was not waited for."""

    fault: str
    first_s: float
    full_s: float
    step_s: float
    same: bool | None = None


def with_digest_check(trials: list[FaultTrial], is_same_digest: bool) -> list[FaultTrial]:
    """The trials of a run whose end is known."""
    return [replace(trial, same=is_same_digest) for trial in trials]


class JsonLinesTail:
    """The lines that are new in a file of JSON lines, also when it was cut back meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset, self._inode, self._partial_line = 0, 0, b""

    def read_new(self) -> list[Row]:
        """Whole lines since the last call."""
        try:
            with open(self.path, "rb") as stream:
                file_stat = os.fstat(stream.fileno())
                if file_stat.st_ino != self._inode or file_stat.st_size < self._offset:
                    self._offset, self._inode, self._partial_line = 0, file_stat.st_ino, b""
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        return [json.loads(line) for line in lines if line]


class RunMonitor:
    """A run that was started with `run_command`; more processes of it (other hosts) may follow.

    `read_rows` are all rows that were seen, by step, the newest of each; `last_row` is the newest.
    """

    def __init__(self, folder: Path, log_path: Path) -> None:
        self.folder, self.log_path = folder, log_path
        self.rows: dict[int, Row] = {}
        self.last_row: Row = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        self._tail = JsonLinesTail(folder / "metrics.jsonl")

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a process of the run in a session of its own; its words go to the log."""
        with open(self.log_path, "ab") as log_file:
            process = subprocess.Popen(
                list(command), env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def read_new_rows(self) -> list[Row]:
        """The rows since the last look."""
        new_rows = self._tail.read_new()
        for row in new_rows:
            self.rows[row["step"]] = self.last_row = row
        return new_rows

    def wait_until(
        self,
        condition: Callable[[], bool],
        deadline_s: float,
        description: str,
        poll_s: float = 0.01,
    ) -> None:
        """Waits, looking at rows meanwhile. Late: it did not happen; the run's words are told."""
        end_s = time.monotonic() + deadline_s
        while not condition():
            self.read_new_rows()
            is_over = all(process.poll() is not None for process in self.processes)
            if (is_over and not condition()) or time.monotonic() > end_s:
                raise DeadlineExceeded(
                    "the run is over: " * is_over
                    + f"{description} did not happen in {deadline_s:.0f} s\n{self.log_tail()}"
                )
            time.sleep(poll_s)

    def log_tail(self) -> str:
        """The end of the run's words."""
        return self.log_path.read_text(errors="replace")[-3000:] if self.log_path.exists() else ""

    def measure_recovery(
        self, inject: Callable[[], object], full_islands: int, deadline_s: float = 120.0
    ) -> tuple[float, float]:
        """Seconds from `inject` to the next committed step of a new generation, and of one with
        `full_islands` islands. Late: it did not come back."""
        self.read_new_rows()
        old_generation = self.last_row.get("quorum", 0)
        start_s = time.monotonic()
        inject()
        first_s = 0.0
        while time.monotonic() - start_s < deadline_s:
            for row in self.read_new_rows():
                if row["quorum"] <= old_generation:
                    continue
                elapsed_s = time.monotonic() - start_s
                first_s = first_s or elapsed_s
                if row["islands"] >= full_islands:
                    return first_s, elapsed_s
            time.sleep(POLL_S)
        raise DeadlineExceeded(f"not back after {deadline_s:.0f} s\n{self.log_tail()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            kill_tree(process.pid)
            process.wait()


def median_step_s(run: RunMonitor) -> float:
    """The median of the newest steps' whole time, of those that all ranks took."""
    newest_rows = [run.rows[n] for n in sorted(run.rows)[-60:]]
    pairs = [(a, b) for a, b in itertools.pairwise(newest_rows) if a["quorum"] == b["quorum"]]
    step_times_s = [float(b["elapsed_s"] - a["elapsed_s"]) for a, b in pairs if b["islands"] == 2]
    return median(step_times_s)


def wait_for_rows(run: RunMonitor, count: int) -> None:
    """Waits for so many steps in all."""
    run.wait_until(lambda: len(run.rows) >= count, 120, f"{count} steps")


# ---- processes -----------------------------------------------------------------------------------


def child_pids(pid: int) -> list[int]:
    """The living children of a process, its threads' included."""
    pids = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            pids += [int(word) for word in (task / "children").read_text().split()]
    return [child for child in pids if is_alive(child)]


def process_tree(pid: int) -> list[int]:
    """A process and everything below it."""
    return [pid, *(descendant for child in child_pids(pid) for descendant in process_tree(child))]


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used so far; 0 when it is gone."""
    with suppress(OSError):
        stat_fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat_fields[11]) + int(stat_fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def thread_cpu_s(pid: int, name: str) -> float:
    """Seconds of processor time that the threads of that name in a process have used so far."""
    total_s = 0.0
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            if (task / "comm").read_text().strip() == name:
                total_s += int((task / "schedstat").read_text().split()[0]) / 1e9
    return total_s


def send_signal(pid: int, signal_number: int) -> None:
    """A signal to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal_number)


def kill_tree(pid: int) -> None:
    """Kills a process and everything below it."""
    for descendant in process_tree(pid):
        send_signal(descendant, signal.SIGKILL)


@contextmanager
def subreaper() -> Iterator[None]:
    """While this lasts, orphans of our processes become our children; at its end all are killed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)

    def exit_on_signal(signal_number: int, _: object) -> None:
        raise SystemExit(128 + signal_number)

    old_handler = signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        yield
    finally:
        while orphans := child_pids(os.getpid()):
            for child in orphans:
                kill_tree(child)
            time.sleep(0.01)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        signal.signal(signal.SIGTERM, old_handler)


# ---- Cordée --------------------------------------------------------------------------------------

BASE_OVERRIDES = (
    "run.exact=true", "model.layers=2", "model.width=128", "model.heads=4", "data.sequence=128",
    "data.path=builtin:markov", "data.tokens=200000", "batch.microbatch=2",
    "batch.microbatches=6", "optim.name=adamw", "evaluate.sample=0", "evaluate.tokens=2048",
    "checkpoint.every=10", "launch.threads=1", "run.precision=fp32",
)  # fmt: skip
"""A small model: a step of some 50 ms on two processes of a quiet core each. fp32, which every
processor has; so a digest holds for all of one kind."""


def train_command(folder: Path, *overrides: str) -> list[str]:
    """The command line of a run in `folder`."""
    return [
        sys.executable,
        "-m",
        "cordee",
        "train",
        *BASE_OVERRIDES,
        *overrides,
        f"run.dir={folder}",
    ]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The run's events so far."""
    return JsonLinesTail(folder / "events.jsonl").read_new()


def member_pids(folder: Path) -> list[int]:
    """The pids of the newest generation, by rank; empty before the first."""
    memberships = [e["members"] for e in read_events(folder) if e.get("members")]
    return [int(member["pid"]) for member in memberships[-1]] if memberships else []


def worker_name(pid: int) -> str:
    """What a worker calls itself: "rank 0", "ready" (a warm spare), or ""."""
    with suppress(OSError):
        prefix, _, name = Path(f"/proc/{pid}/comm").read_text().strip().partition(" ")
        return name if prefix == "cordee" else ""
    return ""


def is_settled(
    run: RunMonitor, hosts: Sequence[subprocess.Popen[bytes]], islands: int, spare_count: int
) -> bool:
    """Whether `islands` islands compute and every host's spares have imported everything."""
    run.read_new_rows()
    names_by_host = [[worker_name(child) for child in child_pids(host.pid)] for host in hosts]
    rank_count = sum(name.startswith("rank") for host_names in names_by_host for name in host_names)
    has_warm_spares = all(host_names.count("ready") >= spare_count for host_names in names_by_host)
    return has_warm_spares and rank_count == islands == run.last_row.get("islands")


def find_live_address(folder: Path, excluded: str) -> str:
    """Where a living host of the newest view is met that is not the founder. A view names a host
    that has just been killed until the others have voted. Late: nobody answers."""
    hosts = json.loads((folder / "members.json").read_text())["view"]["hosts"]
    for address in (str(host).partition("#")[0] for host in hosts):
        if address != excluded and is_listening(address):
            return address
    raise DeadlineExceeded(f"no host of {hosts} but {excluded or 'none'} answers")


def is_listening(address: str) -> bool:
    """Whether somebody takes connections at host:port."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex((host, int(port))) == 0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
