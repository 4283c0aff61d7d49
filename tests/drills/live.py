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

from tests.conftest import SMALL, clean_environment, cordee, digest, events, rows

DEADLINE_S = 120.0
"""For whatever takes seconds on a quiet machine."""


class Live:
    """`cordee train` of the small run, as a context: at its end nothing of it may be left."""

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        self.folder = folder
        self.words = ("train", *SMALL, "fault.spares=1", f"run.dir={folder}", *words)
        self.temporary = folder.with_name(folder.name + "-tmp")
        self.temporary.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cordee", *self.words],
            env={**clean_environment(), "TMPDIR": str(self.temporary), **environment},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: object, __: TracebackType | None
    ) -> None:
        for pid in self.workers():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        if kind is None:
            self.left_nothing()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)

    @property
    def said(self) -> str:
        """Everything on the screen so far."""
        return "".join(self._lines)

    # ---- processes ----

    def workers(self) -> dict[int, str]:
        """Living workers by pid, and what they call themselves ("rank 0", "ready", else "")."""
        mark, found = f"CORDEE_PARENT={self.process.pid}".encode(), {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                pid = int(entry.name)
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    head, _, name = (entry / "comm").read_text().strip().partition(" ")
                    found[pid] = name if head == "cordee" else ""
        return found

    def ranks(self) -> dict[int, int]:
        """Pids by rank."""
        names = self.workers().items()
        return {int(name[5:]): pid for pid, name in names if name.startswith("rank ")}

    def spares(self) -> list[int]:
        """Pids of those that wait for a seat."""
        return [pid for pid, name in self.workers().items() if name == "ready"]

    # ---- waiting ----

    def until(self, happened: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
        """Waits for something to be true of a run that goes on; what it was."""
        end = time.monotonic() + deadline_s
        while not (found := happened()):
            assert time.monotonic() < end, f"waited {deadline_s} s\n{self.said[-3000:]}"
            assert self.process.poll() is None, self.said[-3000:]
            time.sleep(0.02)
        return found

    def until_step(self, step: int) -> int:
        """Waits until that many steps are on record; how many are."""
        self.until(lambda: self.step >= step)
        return self.step

    @property
    def step(self) -> int:
        """Rows on record."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def until_spares(self, count: int = 1) -> None:
        """Holds the ranks until so many spares are warm; needs a long fault.silence_s."""
        self.until_step(1)
        ranks = self.until(lambda: [p for p, name in self.workers().items() if "rank" in name])
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        self.until(lambda: len(self.spares()) >= count)
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)

    def end(self, deadline_s: float = 2 * DEADLINE_S) -> int:
        """The exit code."""
        code = self.process.wait(deadline_s)
        self._reader.join(5)
        return code

    # ---- oracles ----

    def told(self, name: str) -> list[dict[str, Any]]:
        """Events of a name."""
        return [dict(event) for event in events(self.folder) if event["event"] == name]

    def left_nothing(self) -> None:
        """No process, no file and no shared memory of this run is left."""
        end = time.monotonic() + 10
        while self.workers():
            assert time.monotonic() < end, f"left behind: {self.workers()}"
            time.sleep(0.02)
        left = {path.name for path in self.temporary.rglob("*")}
        assert not {name for name in left if not name.startswith("torchinductor_")}, left
        pids = {str(self.process.pid), *(str(m["pid"]) for m in self._members())}
        shared = [path.name for path in Path("/dev/shm").iterdir()]
        assert not [name for name in shared if pids & set(name.replace("-", "_").split("_"))]

    def _members(self) -> list[dict[str, Any]]:
        if not (self.folder / "events.jsonl").exists():
            return []
        return [m for event in events(self.folder) for m in event.get("members", ())]  # type: ignore[attr-defined]


def same_descent(folder: Path, clean: str, steps: int) -> None:
    """The bits of the clean run, each sample once, one row a step."""
    assert [row["step"] for row in rows(folder)] == list(range(1, steps + 1))
    assert digest(folder) == clean
    proof = cordee("data", "ledger", str(folder), "--json")
    assert proof.returncode == 0, proof.stdout
    assert json.loads(proof.stdout)["steps"] == steps
