"""Processes as forks of one, the server, that has imported what all of them need.

An import of torch takes seconds; a fork takes milliseconds and shares the memory of what is
imported. The server has one thread and no accelerator's context, which no fork survives. A fork's
parent is not the server but its owner, who waits for it like for any child and with whom it ends;
so a server that dies takes nobody along.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from cordee.dist.process_group import exit_with_parent, module_command, set_environment
from cordee.hardware.system import (
    AdoptedChild,
    memory_file,
    open_descriptors,
    set_process_name,
    set_subreaper,
)

FORK_TIMEOUT_S = 2.0
"""A fork takes some 20 ms; a server that takes so long is stopped or swapped out."""

MAX_REQUEST_BYTES, MAX_DESCRIPTORS = 1 << 16, 16


class ForkServerError(RuntimeError):
    """The server is gone, silent, or must not fork; the message says which."""


class ForkServer:
    """The server as its owner sees it. Readable when it has imported everything, or has ended:
    `check` says which."""

    def __init__(
        self, modules: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int]
    ) -> None:
        """Starts a server that imports `modules`, with that environment and these descriptors,
        which its forks share. ForkServerError: this system cannot do it."""
        if not (hasattr(os, "pidfd_open") and set_subreaper(True)):
            raise ForkServerError("this system has no pidfd_open or no prctl")
        self.is_ready, self.was_killed, self._environment = False, False, dict(environment)
        self._start_s = time.monotonic()
        self._endpoint, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stderr_descriptor = memory_file("cordee-words")
        command = [*module_command("cordee.elastic.fork_server"), str(server_end.fileno())]
        try:
            self._process = subprocess.Popen(
                [*command, ",".join(map(str, descriptors)), *modules], env=environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._stderr_descriptor,
                pass_fds=(server_end.fileno(), *descriptors), process_group=0,
            )  # fmt: skip
        except OSError as error:
            self._endpoint.close()
            os.close(self._stderr_descriptor)
            set_subreaper(False)
            raise ForkServerError(f"it cannot be started: {error.strerror}") from error
        finally:
            server_end.close()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._start_s

    def fileno(self) -> int:
        return self._endpoint.fileno()

    def check(self) -> None:
        """Hears that it is ready; ForkServerError when it has ended or must not fork."""
        hazard = json.loads(self._receive())["hazard"]
        if hazard:
            raise ForkServerError(hazard)
        self.is_ready = True

    def has_environment(self, environment: Mapping[str, str]) -> bool:
        """Whether libraries have read these variables when the server loaded them."""
        return self._environment == environment

    def fork(
        self, entry: str, words: Sequence[str], variables: Mapping[str, str],
        stderr_descriptor: int, descriptors: Sequence[int],
    ) -> AdoptedChild:  # fmt: skip
        """A new process in a process group of its own, which calls `entry` (module:function) with
        `words` as its command line, `variables` besides the server's, standard error as given, and
        `descriptors` under the numbers that they have here. OSError: the system has no room;
        ForkServerError: ask for no more forks."""
        request = json.dumps({
            "entry": entry, "words": list(words), "variables": dict(variables),
            "descriptors": list(descriptors),
        })  # fmt: skip
        passed_descriptors = [stderr_descriptor, *descriptors]
        try:
            socket.send_fds(self._endpoint, [request.encode()], passed_descriptors)
        except OSError as error:
            raise ForkServerError(self._last_words()) from error
        if not select.select([self._endpoint], [], [], FORK_TIMEOUT_S)[0]:
            raise ForkServerError(f"it did not answer within {FORK_TIMEOUT_S:.0f} s")
        reply = json.loads(self._receive())
        if reply["errno"]:
            raise OSError(reply["errno"], os.strerror(reply["errno"]))
        return AdoptedChild(reply["pid"])

    def close(self) -> None:
        """Ends the server, not its forks."""
        self._process.kill()
        self._process.wait()
        self._endpoint.close()
        os.close(self._stderr_descriptor)
        set_subreaper(False)

    def _receive(self) -> bytes:
        with suppress(OSError):
            if packet := self._endpoint.recv(MAX_REQUEST_BYTES):
                return packet
        raise ForkServerError(self._last_words())

    def _last_words(self) -> str:
        """How it ended; its socket is closed a little before it has."""
        with suppress(subprocess.TimeoutExpired):
            self.was_killed = self._process.wait(1.0) < 0
        size = os.fstat(self._stderr_descriptor).st_size
        lines = os.pread(self._stderr_descriptor, size, 0).decode(errors="replace").splitlines()
        return f"it ended: {lines[-1].strip()[:200]}" if lines else "it ended"


# ---- the server ----------------------------------------------------------------------------------


def serve(endpoint: socket.socket, shared_descriptors: Sequence[int], names: Sequence[str]) -> None:
    """Imports the modules, says whether forks are safe, and forks until the owner has ended."""
    # A scheduler that warns a job may signal all its processes: that is the owner's to act on.
    stop_signals = [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP]
    stop_signals += [signal.SIGUSR1, signal.SIGUSR2]
    previous_actions = {number: signal.signal(number, signal.SIG_IGN) for number in stop_signals}
    set_process_name("cordee import")
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a fork would write to, and so copy, the pages of all objects
    set_process_name("cordee template")
    hazard = _fork_hazard({0, 1, 2, endpoint.fileno(), *shared_descriptors})
    endpoint.send(json.dumps({"hazard": hazard}).encode())
    while True:
        packet, descriptors, _, _ = socket.recv_fds(endpoint, MAX_REQUEST_BYTES, MAX_DESCRIPTORS)
        if not packet:
            return
        request, error_number, pid = json.loads(packet), 0, 0
        try:
            pid = _fork_orphan()
        except OSError as error:
            error_number = error.errno or 1
        if pid == 0 and not error_number:
            endpoint.close()
            for number, action in previous_actions.items():
                signal.signal(number, action)
            _run_entry(request, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        endpoint.send(json.dumps({"pid": pid, "errno": error_number}).encode())


def _fork_hazard(known_descriptors: set[int]) -> str:
    """Why this process must not fork, in words; "" when it may."""
    # OpenBLAS ends its threads at a fork and starts them again when they are used.
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    thread_count = len(os.listdir("/proc/self/task"))
    if thread_count > 1:
        return f"its imports started {thread_count - 1} threads"
    other_descriptors = [
        number
        for number in open_descriptors()
        if number not in known_descriptors and os.path.exists(f"/proc/self/fd/{number}")
    ]
    return f"its imports left {len(other_descriptors)} files open" if other_descriptors else ""


def _fork_orphan() -> int:
    """A fork whose parent, a fork too, has ended, so that the owner is its parent now: its pid, or
    0 in the fork itself. OSError when there is no room for one."""
    read_end, write_end = os.pipe()
    try:
        middle_pid = os.fork()
        if middle_pid == 0:
            middle_pid = os.getpid()
            try:
                pid = os.fork()
            except OSError as error:
                os.write(write_end, str(-(error.errno or 1)).encode())
                os._exit(1)
            if pid:
                os.write(write_end, str(pid).encode())
                os._exit(0)
            while os.getppid() == middle_pid:
                time.sleep(0.0002)
            return 0
        os.waitpid(middle_pid, 0)
        result = int(os.read(read_end, 32) or -errno.EAGAIN)
    finally:
        os.close(read_end)
        os.close(write_end)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _run_entry(request: Mapping[str, object], descriptors: Sequence[int]) -> None:
    """In the fork: what a process that was started would have, then the entry; never returns."""
    exit_code = 1
    try:
        os.setpgid(0, 0)
        set_process_name("cordee worker")
        targets = [2, *request["descriptors"]]  # type: ignore[misc]
        _renumber(descriptors, targets)
        set_environment(request["variables"])  # type: ignore[arg-type]
        sys.argv = ["cordee", *request["words"]]  # type: ignore[misc]
        module_name, _, function_name = str(request["entry"]).partition(":")
        getattr(importlib.import_module(module_name), function_name)()
        exit_code = 0
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)


def _renumber(descriptors: Sequence[int], targets: Sequence[int]) -> None:
    """Gives descriptors these numbers, which may be those of others among them."""
    free_number = max(*descriptors, *targets) + 1
    copies = [fcntl.fcntl(d, fcntl.F_DUPFD_CLOEXEC, free_number) for d in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for copy, target in zip(copies, targets, strict=True):
        os.dup2(copy, target, inheritable=target <= 2)
        os.close(copy)


if __name__ == "__main__":
    exit_with_parent()
    shared = [int(number) for number in sys.argv[2].split(",") if number]
    serve(socket.socket(fileno=int(sys.argv[1])), shared, sys.argv[3:])
