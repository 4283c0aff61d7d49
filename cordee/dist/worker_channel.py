"""A worker's end of the channel to its host's supervisor: assignments, heartbeats, keys.

A worker takes part in one generation after another, with an `Assignment` for each. When a
generation ends, this process's TCP connections are shut, so that a collective that waits for a peer
raises at once, whatever the peer's state; gloo's own `abort` does not wake it. The store that
process groups are made through belongs to one generation: no key of the dead is ever read.
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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from cordee.dist.ipc import PROGRESS_RECORD, Assignment, MessageSocket
from cordee.dist.process_group import LaunchInfo
from cordee.hardware.system import open_tcp_connections, set_process_name

HEARTBEAT_S = 0.2
"""Seconds between heartbeats."""

CUT_GRACE_S = 0.25
"""From the end of a generation to the cut: a rank that hears of it by itself, or at its next step,
leaves its island where it stands; one that waits for the frozen or unreachable needs the cut."""

CONNECTION_ERRORS = (
    "gloo",
    "Connection closed",
    "Connection reset",
    "timed out",
    "Timed out",
    "Broken pipe",
)
"""What the library's words say when a peer is gone; it has no class for it."""


SAFE_PHASES = ("step.start", "group", "fill", "evaluate", "finish")
"""Points at which a worker may turn back."""


class GenerationEnded(RuntimeError):
    """The generation ended while something of it was waited for."""


@dataclass
class _KeyRequest:
    answer: bytes = b""
    answered: threading.Event = field(default_factory=threading.Event)


class SupervisorClient:
    """See the file's header. One thread reads, answers and beats; the main thread trains."""

    def __init__(self, launch_info: LaunchInfo) -> None:
        """Takes over the descriptors that this worker was started with."""
        self._socket = MessageSocket(socket.socket(fileno=launch_info.channel_descriptor))
        self._progress_memory = mmap.mmap(launch_info.progress_descriptor, PROGRESS_RECORD.size)
        self._lock = threading.Lock()
        self._assignments: queue.SimpleQueue[Assignment | None] = queue.SimpleQueue()
        self._requests: dict[int, _KeyRequest] = {}
        self._terminal_descriptors = launch_info.terminal_descriptors
        self._log_descriptors = (os.dup(1), os.dup(2))
        self._ended_generation = 0
        self._cut_at_s = math.inf
        self._assignment: Assignment | None = None
        self._end_condition = threading.Condition()
        self._cut_lock = threading.Lock()
        """Held while connections are cut: none of the next generation is made meanwhile."""
        self.stop_signal: int | None = None
        """The signal by which the supervisor asks all ranks to leave; None while it does not."""
        self.step = -1
        self.phase = "import"
        self._phase_start_s = time.monotonic()
        threading.Thread(target=self._receive_loop, name="cordee-line", daemon=True).start()

    # ---- the main thread ----

    def report_ready(self) -> None:
        """Says that this worker has imported everything and may get a rank."""
        set_process_name("cordee ready")
        self._send({"say": "ready"})

    def next_assignment(self) -> Assignment | None:
        """Waits for the next assignment; None: nothing is left to do, or the supervisor is gone."""
        with self._cut_lock:
            self._assignment = None
        self.record_phase("wait", self.step)
        while True:
            assignment = self._assignments.get()
            if assignment is None or assignment.generation > self._ended_generation:
                self._cut_at_s, self._assignment = math.inf, assignment
                set_process_name(
                    "cordee ending" if assignment is None else f"cordee rank {assignment.rank}"
                )
                self._redirect_output(assignment is not None and assignment.rank == 0)
                return assignment

    def record_phase(self, phase: str, step: int) -> None:
        """Notes where in a step this worker is. GenerationEnded: it is over, and nothing of a step
        has begun (a rank that is alone would not hear of it by a broken connection)."""
        if phase.startswith("save."):
            return
        self.phase, self.step, self._phase_start_s = phase, step, time.monotonic()
        PROGRESS_RECORD.pack_into(self._progress_memory, 0, step, phase.encode())
        if (
            self._assignment is not None
            and self._ended_generation >= self._assignment.generation
            and phase in SAFE_PHASES
        ):
            raise GenerationEnded(f"generation {self._assignment.generation} ended")

    def is_generation_end(self, error: RuntimeError, patience_s: float) -> bool:
        """Whether `error` comes from the end of this generation, not from this worker.

        A broken connection is reported; the supervisors then agree on what to do, and this waits
        for their word, at most `patience_s`.
        """
        assignment = self._assignment
        if assignment is None:
            return False
        if self._ended_generation < assignment.generation:
            message = str(error) or type(error).__name__
            is_network_error = isinstance(error, GenerationEnded | dist.DistError)
            if not is_network_error and not any(phrase in message for phrase in CONNECTION_ERRORS):
                return False
            self._send({"say": "stumbled", "generation": assignment.generation, "step": self.step,
                       "cause": message.splitlines()[0][:300]})  # fmt: skip
            with self._end_condition:
                self._end_condition.wait_for(
                    lambda: self._ended_generation >= assignment.generation, patience_s
                )
        return self._ended_generation >= assignment.generation

    def report_preemption(self, signal_number: int) -> None:
        """Says that this worker alone was told to go (a preemption notice)."""
        self._send({"say": "leaving", "signal": signal_number})

    def report_exit(self, exit_code: int, verdict: str = "") -> None:
        """Says that this worker is at its end: `exit_code` is what it will exit with."""
        self._send({"say": "done", "code": exit_code, "verdict": verdict})
        self._redirect_output(False)

    def release_terminal(self) -> None:
        """Says where this worker stands at its end, and gives the terminal back: a failure's words
        are the supervisor's to tell."""
        self._send_heartbeat()
        self._redirect_output(False)

    def make_store(self, assignment: Assignment) -> Store:
        """The store through which the groups of `assignment`'s generation are made."""
        return _GenerationStore(self, assignment.generation)

    # ---- store ----

    def put(self, generation: int, key: str, value: bytes) -> None:
        encoded_value = base64.b64encode(value).decode()
        self._send({"say": "set", "generation": generation, "key": key, "value": encoded_value})

    def get(self, generation: int, key: str, patience_s: float) -> bytes:
        """Waits for a key of a generation. GenerationEnded: it is over, or nobody wrote it."""
        request = _KeyRequest()
        with self._lock:
            request_id = len(self._requests)
            self._requests[request_id] = request
        self._send({"say": "get", "generation": generation, "key": key, "number": request_id})
        deadline = time.monotonic() + patience_s
        while not request.answered.wait(0.05):
            if self._ended_generation >= generation or time.monotonic() > deadline:
                raise GenerationEnded(f"generation {generation} ended while {key} was waited for")
        return request.answer

    # ---- the channel's thread ----

    def _receive_loop(self) -> None:
        set_process_name("cordee line", thread=True)
        next_heartbeat_s = 0.0
        while not self._socket.is_closed:
            now, assignment = time.monotonic(), self._assignment
            if now >= next_heartbeat_s:
                next_heartbeat_s = now + HEARTBEAT_S
                self._send_heartbeat()
            cut_at_s = math.inf if assignment is None else self._cut_at_s
            select.select(
                [self._socket], [], [], max(0.0, min(next_heartbeat_s, cut_at_s) - time.monotonic())
            )
            for message in self._socket.receive():
                self._dispatch(message)
            self._cut_after_grace()
        self._assignments.put(None)

    def _cut_after_grace(self) -> None:
        """Shuts this process's connections once its generation has ended and the grace is over."""
        with self._cut_lock:
            assignment, now = self._assignment, time.monotonic()
            if (
                assignment is not None
                and self._ended_generation >= assignment.generation
                and now >= self._cut_at_s
            ):
                cut_connections()
                self._cut_at_s = now + CUT_GRACE_S  # again: what was about to connect has by then

    def _dispatch(self, message: Mapping[str, Any]) -> None:
        match message["do"]:
            case "assign":
                self._assignments.put(Assignment(**message["assignment"]))
            case "halt":
                with self._end_condition:
                    self._ended_generation = max(self._ended_generation, int(message["generation"]))
                    self._cut_at_s = time.monotonic() + CUT_GRACE_S
                    self._end_condition.notify_all()
            case "answer":
                request = self._requests[message["number"]]
                request.answer = base64.b64decode(message["value"])
                request.answered.set()
            case "leave":
                self.stop_signal = int(message["signal"])
            case "end":
                self._assignments.put(None)

    def _send_heartbeat(self) -> None:
        phase_s, assignment = round(time.monotonic() - self._phase_start_s, 3), self._assignment
        self._send({
            "say": "beat", "step": self.step, "phase": self.phase, "for_s": phase_s,
            "generation": 0 if assignment is None else assignment.generation,
        })  # fmt: skip

    def _send(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            self._socket.send(message)

    def _redirect_output(self, is_first: bool) -> None:
        """The first rank writes to the terminal, the others to where the supervisor keeps it."""
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        for descriptor, target in enumerate(
            self._terminal_descriptors if is_first else self._log_descriptors, 1
        ):
            os.dup2(target, descriptor)


class _GenerationStore(Store):
    """A generation's keys, kept by the supervisors.

    The library begins the default group's keys with how many groups this process has tried to make,
    and ranks that have seen other faults count differently: that number is left out.
    """

    def __init__(self, client: SupervisorClient, generation: int) -> None:
        super().__init__()
        self._client, self._generation = client, generation
        self._patience_s = 20.0

    def set(self, key: str, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._client.put(self._generation, _strip_group_count(key), data)

    def get(self, key: str) -> bytes:
        return self._client.get(self._generation, _strip_group_count(key), self._patience_s)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        patience_s = timeout.total_seconds() if timeout else self._patience_s
        for key in keys:
            self._client.get(self._generation, _strip_group_count(key), patience_s)

    def set_timeout(self, timeout: timedelta) -> None:
        self._patience_s = timeout.total_seconds()


def _strip_group_count(key: str) -> str:
    group_count, separator, plain_key = key.partition("//")
    return plain_key if separator and group_count.isdigit() and len(group_count) < 10 else key


def cut_connections() -> None:
    """Shuts every TCP connection of this process: the process groups', which then raise."""
    # A listening socket must stay as it is: gloo takes its end for a fault of its own.
    for connection in open_tcp_connections():
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
