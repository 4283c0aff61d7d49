"""The register: the one authority on which generation a run is in.

It holds the newest view and changes only by compare-and-swap: a view is installed only in the
place of the one before it. It lies in the run's folder, in etcd, or, for a run on one host, in
memory. A register that hangs holds up nobody: `RegisterClient` asks it in a thread.
"""

from __future__ import annotations

import base64
import fcntl
import http.client
import json
import os
import re
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from cordee.config.paths import make_temporary_path
from cordee.elastic.address import format_address, parse_address
from cordee.elastic.views import View
from cordee.errors import ConfigError, RunError

LOCK_TIMEOUT_S, LOCK_POLL_S = 1.0, 0.01
ETCD_TIMEOUT_S = 2.0
"""For one request to one server of etcd; then the next one is asked."""
ETCD_SCHEME = "etcd://"


class RegisterError(Exception):
    """The register could not be asked, or what it said is not to be believed; says why. A swap
    that ends with it may have been done, or be done later."""


class Register(Protocol):
    """A place that holds the newest view. `identity` tells it from any other ("": not known before
    the first answer)."""

    identity: str

    def read(self) -> View | None:
        """The view it holds; None: none yet. RegisterError."""

    def swap(self, previous: View | None, view: View) -> View | None:
        """Puts `view` in the place of `previous`, and nothing when it holds something else; what it
        holds now. RegisterError."""


def encode_state(run_id: str, view: View) -> str:
    """What lies in the folder's file, or under etcd's key."""
    return json.dumps({"run": run_id, "view": view.to_json()})


def decode_state(run_id: str, text: str | bytes) -> View | None:
    """Reads `encode_state`'s output. RegisterError: it is none, or of another run."""
    try:
        state = json.loads(text)
        if state.get("run", run_id) != run_id:
            raise RegisterError("it is the register of another run")
        return View.from_json(state["view"]) if state["view"] else None
    except (ValueError, AttributeError, KeyError, RunError) as error:
        raise RegisterError(f"what it holds cannot be read ({error})") from error


class MemoryRegister:
    """The register of a run that has one host."""

    identity = "memory"

    def __init__(self) -> None:
        self.view: View | None = None

    def read(self) -> View | None:
        """As `Register.read`."""
        return self.view

    def swap(self, previous: View | None, view: View) -> View | None:
        """As `Register.swap`."""
        if self.view == previous:
            self.view = view
        return self.view


class FolderRegister:
    """One JSON file in a folder that all hosts see, changed under a lock and replaced whole."""

    def __init__(self, path: Path, run_id: str) -> None:
        self.path, self.run_id = path, run_id
        self.identity = f"the folder {run_id}"

    def read(self) -> View | None:
        """As `Register.read`. Needs no lock: the file is replaced, never written over."""
        try:
            return decode_state(self.run_id, self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, RegisterError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise RegisterError(f"{self.path.name}: {reason}") from error

    def swap(self, previous: View | None, view: View) -> View | None:
        """As `Register.swap`."""
        try:
            with self._lock():
                current = self.read()
                if current != previous:
                    return current
                self._write(encode_state(self.run_id, view))
                return view
        except OSError as error:
            raise RegisterError(f"{self.path.name}: {error.strerror or error}") from error

    @contextmanager
    def _lock(self) -> Iterator[None]:
        descriptor = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + LOCK_TIMEOUT_S
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        reason = f"{self.path.name}: locked for {LOCK_TIMEOUT_S} s"
                        raise RegisterError(reason) from error
                    time.sleep(LOCK_POLL_S)
            yield
        finally:
            os.close(descriptor)

    def _write(self, text: str) -> None:
        temporary_path = make_temporary_path(self.path)
        try:
            with open(temporary_path, "x") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary_path.replace(self.path)
        finally:
            with suppress(OSError):
                temporary_path.unlink(missing_ok=True)
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def parse_etcd_url(url: str) -> list[tuple[str, int]]:
    """(host, port) of etcd's servers in etcd://HOST:PORT[,HOST:PORT]. ConfigError."""
    if not url.startswith(ETCD_SCHEME):
        raise ConfigError(
            "the register is the run's folder or an etcd",
            values={"launch.register": url},
            fix=f"launch.register=folder, or {ETCD_SCHEME}HOST:PORT[,HOST:PORT]",
        )
    return [parse_address(address) for address in url.removeprefix(ETCD_SCHEME).split(",")]


class EtcdRegister:
    """One key of an etcd cluster, by its JSON gateway (etcd 3.4 or newer; plain HTTP)."""

    def __init__(self, servers: Sequence[tuple[str, int]], run_id: str) -> None:
        self.identity = ""
        self.run_id = run_id
        self._servers = deque(servers)
        self._key = base64.b64encode(f"cordee/{run_id}/members".encode()).decode()

    def read(self) -> View | None:
        """As `Register.read`."""
        return self._read_revision()[0]

    def swap(self, previous: View | None, view: View) -> View | None:
        """As `Register.swap`."""
        current, revision = self._read_revision()
        if current != previous:
            return current
        # The revision of a key that is not there is 0, also to a comparison.
        comparison = {
            "key": self._key, "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)
        }  # fmt: skip
        value = base64.b64encode(encode_state(self.run_id, view).encode()).decode()
        reply = self._post(
            "kv/txn",
            {
                "compare": [comparison],
                "success": [{"request_put": {"key": self._key, "value": value}}],
            },
        )
        return view if reply.get("succeeded") else self.read()

    def _read_revision(self) -> tuple[View | None, int]:
        """The view and the revision that wrote it; (None, 0): there is no such key."""
        reply = self._post("kv/range", {"key": self._key})
        try:
            for entry in reply.get("kvs", []):
                value = base64.b64decode(entry["value"])
                return decode_state(self.run_id, value), int(entry["mod_revision"])
        except (KeyError, TypeError, ValueError) as error:
            raise RegisterError(f"etcd's answer cannot be read ({error!r})") from error
        except RegisterError as error:
            raise RegisterError(f"etcd at {self._address}: {error}") from error
        return None, 0

    @property
    def _address(self) -> str:
        return format_address(*self._servers[0])

    def _post(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of the first server that gives one; it is asked first the next time."""
        problems = []
        for _ in range(len(self._servers)):
            try:
                reply = self._post_to(*self._servers[0], path, json.dumps(request))
                cluster_id = int(reply["header"]["cluster_id"])
                self.identity = f"the etcd cluster {cluster_id:x}"
                return reply
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                problems.append(f"etcd at {self._address}: {reason}")
                self._servers.rotate(-1)
        raise RegisterError("; ".join(problems))

    @staticmethod
    def _post_to(host: str, port: int, path: str, body: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection(host, port, timeout=ETCD_TIMEOUT_S)
        try:
            connection.request("POST", f"/v3/{path}", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            reply = json.loads(response.read())
            if response.status != http.client.OK:
                raise ValueError(reply.get("error") or f"HTTP status {response.status}")
            return dict(reply)
        finally:
            connection.close()


@dataclass(frozen=True)
class RegisterRequest:
    """What a member asks of the register: to read it (`view` is None), or `view` in the place of
    `previous`, which is the newest view that the asker knows of."""

    asker: str
    number: int
    previous: View | None = None
    view: View | None = None


@dataclass(frozen=True)
class RegisterAnswer:
    """What the register holds, or why it did not say (`error`)."""

    request: RegisterRequest
    identity: str = ""
    view: View | None = None
    error: str = ""


def ask_register(register: Register, request: RegisterRequest) -> RegisterAnswer:
    """Does what is asked, and waits for it."""
    try:
        view = register.swap(request.previous, request.view) if request.view else register.read()
        return RegisterAnswer(request, register.identity, view)
    except RegisterError as error:
        return RegisterAnswer(request, error=re.sub(r"\s+", " ", str(error)))


class RegisterClient:
    """Asks a register in a thread, one thing at a time; a register in memory, at once.

    `fileno` is readable when `take_answers` has something.
    """

    def __init__(self, register: Register) -> None:
        self._register = register
        self._requests: SimpleQueue[RegisterRequest | None] = SimpleQueue()
        self._answers: deque[RegisterAnswer] = deque()
        self._read_end, self._write_end = socket.socketpair()
        self._read_end.setblocking(False)
        self._write_end.setblocking(False)
        self._thread: Thread | None = None

    def fileno(self) -> int:
        """As a selector wants it."""
        return self._read_end.fileno()

    def submit(self, request: RegisterRequest) -> None:
        """Has it done; never waits."""
        if isinstance(self._register, MemoryRegister):
            self._answers.append(ask_register(self._register, request))
            return
        if self._thread is None:
            # A daemon: a folder that hangs must not hold up the end of the process.
            self._thread = Thread(target=self._serve, name="register", daemon=True)
            self._thread.start()
        self._requests.put(request)

    def take_answers(self) -> list[RegisterAnswer]:
        """All answers since the last call, in order."""
        with suppress(OSError):
            self._read_end.recv(4096)
        answers = []
        while self._answers:
            answers.append(self._answers.popleft())
        return answers

    def close(self) -> None:
        """No more answers; what hangs is left to itself."""
        self._requests.put(None)
        self._read_end.close()
        self._write_end.close()

    def _serve(self) -> None:
        while (request := self._requests.get()) is not None:
            self._answers.append(ask_register(self._register, request))
            with suppress(OSError):  # full: there is a byte in it already; closed: nobody asks
                self._write_end.send(b".")
