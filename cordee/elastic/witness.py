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

from cordee.config.paths import make_temporary_path
from cordee.elastic.views import View
from cordee.errors import RunError

LOCK_TIMEOUT_S = 1.0
LOCK_POLL_S = 0.01


@dataclass(frozen=True)
class WitnessReply:
    """The witness's answer: whether it promised, its highest number, and the view it holds."""

    is_granted: bool
    number: int
    view: View | None


class Witness(Protocol):
    """What `Member` asks of a witness."""

    def promise(self, number: int, candidate: str, voters: Collection[str]) -> WitnessReply | None:
        """Promises `number` to `candidate`, whose promisers are `voters`; None: cannot be
        reached."""

    def accept(self, view: View) -> bool:
        """Makes `view` the newest active one; False: promised higher, or cannot be reached."""


class WitnessState:
    """The witness's memory and rules, without a place to keep them."""

    def __init__(self) -> None:
        self.number, self.candidate = 0, ""
        self.view: View | None = None

    def promise(self, number: int, candidate: str, voters: Collection[str]) -> WitnessReply | None:
        """As `Witness.promise`. A candidate without a host of the view held changes nothing."""
        is_newer = number > self.number or (number, candidate) == (self.number, self.candidate)
        includes_host = self.view is None or any(host in voters for host in self.view.hosts)
        if is_newer and includes_host:
            self.number, self.candidate = number, candidate
        return WitnessReply(is_newer and includes_host, self.number, self.view)

    def accept(self, view: View) -> bool:
        """As `Witness.accept`."""
        if view.number != self.number:
            return False
        self.view = view
        return True

    def to_json(self) -> dict[str, Any]:
        """The memory as plain JSON."""
        view = self.view.to_json() if self.view else None
        return {"number": self.number, "by": self.candidate, "view": view}

    @classmethod
    def from_json(cls, data: Any) -> WitnessState:
        """Reads `to_json`'s output. RunError: anything else."""
        if not isinstance(data, dict) or set(data) != {"number", "by", "view"}:
            raise RunError("the witness's file is not readable", values={"holds": data})
        state = cls()
        state.number, state.candidate = int(data["number"]), str(data["by"])
        state.view = View.from_json(data["view"]) if data["view"] else None
        return state


class FileWitness:
    """A `WitnessState` in one JSON file, changed under an exclusive lock and replaced whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure = ""

    def promise(self, number: int, candidate: str, voters: Collection[str]) -> WitnessReply | None:
        """As `Witness.promise`; `failure` says why it could not be reached."""
        reply = None
        with self._locked_state() as state:
            reply = state.promise(number, candidate, voters) if state else None
        return None if self.failure else reply

    def accept(self, view: View) -> bool:
        """As `Witness.accept`. False after a failed write: nobody may act on the view then."""
        with self._locked_state() as state:
            is_accepted = state is not None and state.accept(view)
        return is_accepted and not self.failure

    def clear_view(self) -> None:
        """For the one who knows that all hosts of the view held are gone: a new run may begin."""
        with self._locked_state() as state:
            if state is not None:
                state.view = None

    @contextmanager
    def _locked_state(self) -> Iterator[WitnessState | None]:
        """The memory, locked, written back at the end; None when the folder or lock refuses."""
        self.failure = ""
        try:
            lock_descriptor = os.open(
                f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            self.failure = f"{self.path.name}: {error.strerror}"
            yield None
            return
        try:
            state = self._read(lock_descriptor)
            previous_json = state and state.to_json()
            yield state
            if state is not None and state.to_json() != previous_json:
                self._write(state)
        finally:
            os.close(lock_descriptor)

    def _read(self, lock_descriptor: int) -> WitnessState | None:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        try:
            while True:
                try:
                    fcntl.flock(lock_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        self.failure = f"{self.path.name}: locked for {LOCK_TIMEOUT_S} s"
                        return None
                    time.sleep(LOCK_POLL_S)
            if not self.path.exists():
                return WitnessState()
            return WitnessState.from_json(json.loads(self.path.read_text()))
        except (OSError, ValueError, RunError) as error:
            self.failure = f"{self.path.name}: {error}"
            return None

    def _write(self, state: WitnessState) -> None:
        temporary_path = make_temporary_path(self.path)
        try:
            with open(temporary_path, "x") as stream:
                stream.write(json.dumps(state.to_json()))
                stream.flush()
                os.fsync(stream.fileno())
            temporary_path.replace(self.path)
            folder_descriptor = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder_descriptor)
            finally:
                os.close(folder_descriptor)
        except OSError as error:
            self.failure = f"{self.path.name}: {error.strerror}"
            with suppress(OSError):
                temporary_path.unlink(missing_ok=True)
