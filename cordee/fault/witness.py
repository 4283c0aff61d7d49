"""A witness: one more voter, in a file that the run's hosts share, so that one of two may go on.

The witness accepts last, after all hosts of a view have: what it holds is the newest active view.
It promises a number only to a candidate that brings a host of that view, which is thereby halted.
Traded away: a folder that hangs holds up its supervisor; `Member` counts no silence meanwhile.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cordee.config.paths import free_name
from cordee.errors import RunError
from cordee.fault.views import View

PATIENCE_S = 1.0
POLL_S = 0.01


@dataclass(frozen=True)
class Vow:
    """The witness's answer: whether it promised, its highest number, and the view it holds."""

    granted: bool
    number: int
    view: View | None


class Witness(Protocol):
    """What `Member` asks of a witness."""

    def promise(self, number: int, by: str, among: Collection[str]) -> Vow | None:
        """Promises `number` to `by`, whose promisers are `among`; None: cannot be reached."""

    def accept(self, view: View) -> bool:
        """Makes `view` the newest active one; False: promised higher, or cannot be reached."""


class Slate:
    """The witness's memory and rules, without a place to keep them."""

    def __init__(self) -> None:
        self.number, self.by = 0, ""
        self.view: View | None = None

    def promise(self, number: int, by: str, among: Collection[str]) -> Vow | None:
        """As `Witness.promise`. A candidate without a host of the view held changes nothing."""
        newer = number > self.number or (number, by) == (self.number, self.by)
        halts = self.view is None or any(host in among for host in self.view.hosts)
        if newer and halts:
            self.number, self.by = number, by
        return Vow(newer and halts, self.number, self.view)

    def accept(self, view: View) -> bool:
        """As `Witness.accept`."""
        if view.number != self.number:
            return False
        self.view = view
        return True

    def to_json(self) -> dict[str, Any]:
        """The memory as plain JSON."""
        view = self.view.to_json() if self.view else None
        return {"number": self.number, "by": self.by, "view": view}

    @classmethod
    def from_json(cls, data: Any) -> Slate:
        """Reads `to_json`'s output. RunError: anything else."""
        if not isinstance(data, dict) or set(data) != {"number", "by", "view"}:
            raise RunError("the witness's file is not readable", values={"holds": data})
        slate = cls()
        slate.number, slate.by = int(data["number"]), str(data["by"])
        slate.view = View.from_json(data["view"]) if data["view"] else None
        return slate


class FileWitness:
    """A `Slate` in one JSON file, changed under an exclusive lock and replaced whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure = ""

    def promise(self, number: int, by: str, among: Collection[str]) -> Vow | None:
        """As `Witness.promise`; `failure` says why it could not be reached."""
        vow = None
        with self._slate() as slate:
            vow = slate.promise(number, by, among) if slate else None
        return None if self.failure else vow

    def accept(self, view: View) -> bool:
        """As `Witness.accept`. False after a failed write: nobody may act on the view then."""
        with self._slate() as slate:
            done = slate is not None and slate.accept(view)
        return done and not self.failure

    def forget(self) -> None:
        """For the one who knows that all hosts of the view held are gone: a new run may begin."""
        with self._slate() as slate:
            if slate is not None:
                slate.view = None

    @contextmanager
    def _slate(self) -> Iterator[Slate | None]:
        """The memory, locked, written back at the end; None when the folder or lock refuses."""
        self.failure = ""
        try:
            lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self.failure = f"{self.path.name}: {error.strerror}"
            yield None
            return
        try:
            slate = self._read(lock)
            before = slate and slate.to_json()
            yield slate
            if slate is not None and slate.to_json() != before:
                self._write(slate)
        finally:
            os.close(lock)

    def _read(self, lock: int) -> Slate | None:
        until = time.monotonic() + PATIENCE_S
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        self.failure = f"{self.path.name}: locked for {PATIENCE_S} s"
                        return None
                    time.sleep(POLL_S)
            if not self.path.exists():
                return Slate()
            return Slate.from_json(json.loads(self.path.read_text()))
        except (OSError, ValueError, RunError) as error:
            self.failure = f"{self.path.name}: {error}"
            return None

    def _write(self, slate: Slate) -> None:
        fresh = free_name(self.path)
        try:
            with open(fresh, "x") as stream:
                stream.write(json.dumps(slate.to_json()))
                stream.flush()
                os.fsync(stream.fileno())
            fresh.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            self.failure = f"{self.path.name}: {error.strerror}"
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
