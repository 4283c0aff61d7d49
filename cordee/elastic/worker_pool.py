"""A host's worker processes: started, seen to die at once, ended, and their last words kept.

A worker is a fork of a server that has imported torch, where that is safe, else a process of its
own; which rank it has, if any, it learns over its channel. No port and no file: what it reads and
what it says lie in memory files, so a kill of everything leaves nothing behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cordee.dist.ipc import PROGRESS_RECORD, MessageSocket, make_socket_pair
from cordee.dist.process_group import channel_environment, python_command, worker_environment
from cordee.elastic.assignment import AvailableWorker
from cordee.elastic.fork_server import ForkServer, ForkServerError
from cordee.hardware.system import ChildProcess, ChildWatch, memory_file

WORKER_WORDS = ("train",)
"""The command line of a worker: what it trains is in its config."""

WORKER_ENTRY = "cordee.cli.main:program"
"""What a fork calls: what `__main__.py` calls in a process of its own."""

MAX_SERVER_STARTS = 4
"""How often the fork server is started; one that goes on dying is not worth its imports."""

STDERR_TAIL_BYTES = 1 << 16
"""How much of a worker's last words is shown."""


@dataclass(eq=False)
class Worker:
    """One process. `rank` is that of the generation at hand, None while it has no seat; `last_rank`
    and `last_generation` are its last seat's; `slot` says which local device is its own.
    `current_generation`, `stepped_generation` and `ended_generation` are generations: the one that
    it is in, the last in which it committed a step, the last of its seats that ended. `phase_s` is
    for how long it said to be in its phase, `phase_start_s` since when by this host's clock.
    `kill_reason`: why it was killed, if it was."""

    number: int
    process: ChildProcess
    channel: MessageSocket
    stderr_descriptor: int
    progress_descriptor: int
    exit_watch: ChildWatch
    is_ready: bool = False
    rank: int | None = None
    last_rank: int | None = None
    last_generation: int = 0
    slot: int | None = None
    leave_signal: int | None = None
    announced_exit_code: int | None = None
    final_message: str = ""
    step: int = -1
    phase: str = "import"
    phase_s: float = 0.0
    phase_start_s: float = 0.0
    current_generation: int = 0
    stepped_generation: int = 0
    ended_generation: int = 0
    overdue_since_s: float = 0.0
    kill_reason: str = ""
    last_heard_s: float = field(default_factory=time.monotonic)
    assigned_s: float = field(default_factory=time.monotonic)
    """When it was started, or was given its last seat."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def read_progress(self) -> None:
        """Reads from its memory where it stands, also when it is dead."""
        step, phase = PROGRESS_RECORD.unpack(
            os.pread(self.progress_descriptor, PROGRESS_RECORD.size, 0)
        )
        if phase.strip(b"\0"):
            self.step, self.phase = step, phase.rstrip(b"\0").decode()

    def read_stderr_tail(self) -> str:
        """The end of what it said on standard error while it was not the first rank."""
        size = os.fstat(self.stderr_descriptor).st_size
        start = max(0, size - STDERR_TAIL_BYTES)
        return (
            os.pread(self.stderr_descriptor, size - start, start).decode(errors="replace").strip()
        )


class WorkerPool:
    """The workers of this host, by number in the order of their start."""

    def __init__(
        self, worker_config: str, threads: int, interface: str, preload: Sequence[str] = ()
    ) -> None:
        """`worker_config`: what every worker reads; `preload`: see `SupervisorConfig`."""
        self.threads, self.interface, self.preload = threads, interface, preload
        self.workers: dict[int, Worker] = {}
        self.fork_server: ForkServer | None = None
        self._config_descriptor = memory_file("cordee-plan")
        os.write(self._config_descriptor, worker_config.encode())
        self._terminal_descriptors = (os.dup(1), os.dup(2))
        self._lifeline, self._lifeline_write_end = os.pipe()  # its other end ends with this process
        self._start_count = self._server_start_count = 0

    @property
    def is_importing(self) -> bool:
        """Whether starts had better wait: a fork will be sooner than a start that begins now."""
        return self.fork_server is not None and not self.fork_server.is_ready

    def start_fork_server(self) -> ForkServer:
        """Starts, anew, the server that workers are forks of. ForkServerError: there is none."""
        self.close_fork_server()
        if self._server_start_count == MAX_SERVER_STARTS:
            raise ForkServerError(f"it ended {MAX_SERVER_STARTS} times")
        self._server_start_count += 1
        environment = worker_environment(self._lifeline, self.threads, self.interface)
        self.fork_server = ForkServer(self.preload, environment, [self._lifeline])
        return self.fork_server

    def close_fork_server(self) -> None:
        """Ends the server, if there is one; its forks stay."""
        if self.fork_server is not None:
            self.fork_server.close()
        self.fork_server = None

    def start(self) -> Worker:
        """Starts a worker, which will say that it is ready. OSError: the system has no room;
        ForkServerError: the server is not to be asked again."""
        channel, worker_socket = make_socket_pair()
        stderr_descriptor = memory_file("cordee-words")
        progress_descriptor = memory_file("cordee-mark")
        os.ftruncate(progress_descriptor, PROGRESS_RECORD.size)
        descriptors = (
            worker_socket.fileno(), self._config_descriptor, progress_descriptor,
            *self._terminal_descriptors,
        )  # fmt: skip
        try:
            process = self._start_process(descriptors, stderr_descriptor)
        except (OSError, ForkServerError):
            channel.close()
            os.close(stderr_descriptor)
            os.close(progress_descriptor)
            raise
        finally:
            worker_socket.close()
        self._start_count += 1
        worker = Worker(
            self._start_count, process, channel, stderr_descriptor, progress_descriptor,
            ChildWatch(process),
        )  # fmt: skip
        self.workers[worker.number] = worker
        return worker

    def _start_process(self, descriptors: Sequence[int], stderr_descriptor: int) -> ChildProcess:
        environment = worker_environment(self._lifeline, self.threads, self.interface)
        channel_variables, server = channel_environment(descriptors), self.fork_server
        if server is not None and server.is_ready and server.has_environment(environment):
            return server.fork(
                WORKER_ENTRY, WORKER_WORDS, channel_variables, stderr_descriptor, descriptors
            )
        # Its own group: the terminal's Ctrl-C reaches us alone, and we pass it on once.
        return subprocess.Popen(
            [*python_command(), *WORKER_WORDS], env=environment | channel_variables,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr_descriptor,
            pass_fds=(*descriptors, self._lifeline), process_group=0,
        )  # fmt: skip

    def ranked_workers(self) -> list[Worker]:
        workers = [w for w in self.workers.values() if w.rank is not None]
        return sorted(workers, key=lambda w: w.rank or 0)

    def free_slot(self) -> int:
        """The lowest local device that no living worker holds."""
        used_slots = {w.slot for w in self.workers.values()}
        return next(slot for slot in range(len(used_slots) + 1) if slot not in used_slots)

    def reap(self, worker: Worker) -> int:
        """Takes a dead worker from the pool; its exit code, negative for a signal."""
        exit_code = worker.process.wait()
        worker.channel.close()
        worker.exit_watch.close()
        os.close(worker.stderr_descriptor)
        os.close(worker.progress_descriptor)
        self.workers.pop(worker.number, None)
        return exit_code

    def available_workers(self, host: str) -> list[list[Any]]:
        """Who may get a rank, for this host's report (`assign_ranks`)."""
        return [
            AvailableWorker(host, w.number, w.pid, w.last_rank, w.last_generation).to_list()
            for w in self.workers.values()
            if w.is_ready and w.leave_signal is None and w.announced_exit_code is None
        ]

    def no_island_message(self, island_size: int) -> str:
        """What a host says whose ranks wait because no island is whole."""
        ready_count = sum(w.is_ready for w in self.workers.values())
        return (
            f"no island is whole: {ready_count} of {island_size} ranks are ready here; the run"
            " waits for others, and those keep their state"
        )

    def kill(self, worker: Worker, reason: str = "") -> None:
        """Ends a worker that does not answer; a stopped process hears no other signal. Its death,
        `reason` its cause, is dealt with like any."""
        worker.kill_reason, worker.last_heard_s = reason, time.monotonic()
        worker.exit_watch.kill()

    def shutdown(self, grace_s: float) -> None:
        """Lets workers go for up to `grace_s`, then kills what is left, the fork server too."""
        self.close_fork_server()
        deadline = time.monotonic() + grace_s
        for worker in list(self.workers.values()):
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
        for worker in list(self.workers.values()):
            if worker.process.poll() is None:
                self.kill(worker)
            self.reap(worker)


def describe_exit_code(exit_code: int) -> str:
    """An exit code in words: 'was killed by signal 9 (SIGKILL)', 'left with exit code 1'."""
    if exit_code >= 0:
        return f"left with exit code {exit_code}"
    with suppress(ValueError):
        return f"was killed by signal {-exit_code} ({signal.Signals(-exit_code).name})"
    return f"was killed by signal {-exit_code}"


def worker_event(worker: Worker, event: str, host: str, cause: str, action: str) -> dict[str, Any]:
    """What was found of a worker and done about it: who, where, which phase, and one sentence."""
    rank = worker.rank if worker.rank is not None else worker.last_rank
    worker_name = host if rank is None else f"rank {rank} (pid {worker.pid} on {host})"
    position = f" in {worker.phase} of step {worker.step}" if worker.step >= 0 else ""
    return {
        "pid": worker.pid, "rank": rank, "phase": worker.phase, "step": worker.step,
        "event": event, "host": host, "cause": cause, "done": action,
        "says": f"{worker_name}: {cause}{position}; {action}",
    }  # fmt: skip
