"""A run in the background and its processes: who has which rank, what is ready, what is left.

Only processes that a run started are ever looked at or killed: they carry their supervisor's pid.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.conftest import (
    SMALL,
    clean_environment,
    read_events,
    read_rows,
    run_cordee,
    weights_digest,
)

DEADLINE_S = 120.0
"""For whatever takes seconds on a quiet machine."""


class BackgroundRun:
    """`cordee train` of the small run, as a context: at its end nothing of it may be left."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.folder = folder
        self.arguments = ("train", *SMALL, "fault.spares=1", f"run.dir={folder}", *arguments)
        self.temporary_folder = folder.with_name(folder.name + "-tmp")
        self.temporary_folder.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cordee", *self.arguments],
            env={**clean_environment(), "TMPDIR": str(self.temporary_folder), **environment},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> BackgroundRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: object, __: TracebackType | None
    ) -> None:
        for pid in self.worker_names():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        if kind is None:
            self.check_nothing_left()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)

    @property
    def output(self) -> str:
        """Everything on the screen so far."""
        return "".join(self._lines)

    # ---- processes ----

    def worker_names(self) -> dict[int, str]:
        """Living workers by pid, and what they call themselves ("rank 0", "ready", else "")."""
        names = self.process_names().items()
        return {pid: name for pid, name in names if name not in ("import", "template")}

    def template_pids(self) -> list[int]:
        """The pid of the process that workers are forks of, in a list, once it has imported all."""
        return [pid for pid, name in self.process_names().items() if name == "template"]

    def process_names(self) -> dict[int, str]:
        """The same of all processes that the supervisor has started."""
        parent_entry, names = f"CORDEE_PARENT={self.process.pid}".encode(), {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                pid = int(entry.name)
                if parent_entry in (entry / "environ").read_bytes().split(b"\0"):
                    program, _, name = (entry / "comm").read_text().strip().partition(" ")
                    names[pid] = name if program == "cordee" else ""
        return names

    def pids_by_rank(self) -> dict[int, int]:
        """Pids by rank."""
        names = self.worker_names().items()
        return {int(name[5:]): pid for pid, name in names if name.startswith("rank ")}

    def spare_pids(self) -> list[int]:
        """Pids of those that wait for a seat."""
        return [pid for pid, name in self.worker_names().items() if name == "ready"]

    # ---- waiting ----

    def wait_until(self, condition: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
        """Waits for something to be true of a run that goes on; what it was."""
        deadline = time.monotonic() + deadline_s
        while not (value := condition()):
            assert time.monotonic() < deadline, f"waited {deadline_s} s\n{self.output[-3000:]}"
            assert self.process.poll() is None, self.output[-3000:]
            time.sleep(0.02)
        return value

    def wait_for_step(self, step: int) -> int:
        """Waits until that many steps are on record; how many are."""
        self.wait_until(lambda: self.step_count >= step)
        return self.step_count

    @property
    def step_count(self) -> int:
        """Rows on record."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for_spares(self, count: int = 1) -> None:
        """Holds the ranks until so many spares are warm; needs a long fault.silence_s."""
        self.wait_for_step(1)
        pids = self.wait_until(
            lambda: [p for p, name in self.worker_names().items() if "rank" in name]
        )
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        self.wait_until(lambda: len(self.spare_pids()) >= count)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    def wait_exit(self, deadline_s: float = 2 * DEADLINE_S) -> int:
        """The exit code."""
        exit_code = self.process.wait(deadline_s)
        self._reader.join(5)
        return exit_code

    # ---- oracles ----

    def events_named(self, name: str) -> list[dict[str, Any]]:
        """Events of a name."""
        return [dict(event) for event in read_events(self.folder) if event["event"] == name]

    def check_nothing_left(self) -> None:
        """No process, no file and no shared memory of this run is left."""
        deadline = time.monotonic() + 10
        while self.process_names():
            assert time.monotonic() < deadline, f"left behind: {self.process_names()}"
            time.sleep(0.02)
        file_names = {path.name for path in self.temporary_folder.rglob("*")}
        assert not {name for name in file_names if not name.startswith("torchinductor_")}, (
            file_names
        )
        pids = {str(self.process.pid), *(str(m["pid"]) for m in self._member_records())}
        shared_names = [path.name for path in Path("/dev/shm").iterdir()]
        assert not [name for name in shared_names if pids & set(name.replace("-", "_").split("_"))]

    def _member_records(self) -> list[dict[str, Any]]:
        if not (self.folder / "events.jsonl").exists():
            return []
        return [m for event in read_events(self.folder) for m in event.get("members", ())]  # type: ignore[attr-defined]


def check_same_descent(folder: Path, expected_digest: str, steps: int) -> None:
    """The bits of the clean run, each sample once, one row a step."""
    assert [row["step"] for row in read_rows(folder)] == list(range(1, steps + 1))
    assert weights_digest(folder) == expected_digest
    ledger_check = run_cordee("data", "ledger", str(folder), "--json")
    assert ledger_check.returncode == 0, ledger_check.stdout
    assert json.loads(ledger_check.stdout)["steps"] == steps
