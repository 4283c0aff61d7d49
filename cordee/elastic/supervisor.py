"""A host's supervisor: keeps its workers running and, with other hosts', decides who computes what.

One thread, one selector, no torch. A worker that dies is seen at once, one that falls silent is
killed; either way the hosts agree on a new generation (`membership.py`) in which the others, a warm
spare among them, go on. Workers die with their supervisor, and the same command goes on from the
newest checkpoint.
"""

from __future__ import annotations

import selectors
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from types import FrameType
from typing import Any

from cordee.dist.streams import print_to_stderr
from cordee.elastic.assignment import assign_ranks, is_training
from cordee.elastic.fork_server import ForkServer, ForkServerError
from cordee.elastic.hosts import HostLink, RendezvousConfig
from cordee.elastic.oom import oom_kills
from cordee.elastic.run_progress import (
    STOP_EXIT_CODES,
    STOP_SIGNALS,
    RunProgress,
    SupervisorConfig,
    WorkerFailure,
    is_signal_handled,
    worker_assignment,
)
from cordee.elastic.views import Evicted, Left, MembershipChange, View, ViewHalted, ViewInstalled
from cordee.elastic.watchdog import Watchdog
from cordee.elastic.worker_pool import Worker, WorkerPool, describe_exit_code, worker_event
from cordee.errors import RunError

EXIT_GRACE_S = 10.0
"""How long ranks may take to leave after the run has failed."""

SPARE_START_DELAY_S = 3.0
"""Spares are started once a generation has run for so long: starts come first."""

BROKEN_CONNECTION_S = 1.0
"""A connection that broke although nobody died is acted upon after so long."""

TICK_S = 0.1

START_RETRY_S = 1.0
"""Between two tries to start a worker that the system refuses."""

COMPUTE_PHASES = ("step.", "evaluate", "finish")
"""Phases of a worker whose generation has its state, and has written what led to it."""


class Supervisor:
    """See the file's header."""

    def __init__(self, config: SupervisorConfig, rendezvous: RendezvousConfig) -> None:
        self.config = config
        self.num_ranks = config.num_ranks
        self.host_name = socket.gethostname()
        self.progress = RunProgress()
        self.watchdog = Watchdog(config.heartbeat_timeout_s, config.startup_timeout_s)
        self.pool = WorkerPool(
            config.worker_config, config.threads, config.interface, config.preload
        )
        self.host_link = HostLink(
            rendezvous,
            lambda reports: assign_ranks(reports, config.island_size, config.replan),
            self.report,
        )
        self.is_founder = not rendezvous.join_address
        self.view: View | None = None
        self._selector = selectors.DefaultSelector()
        self._oom_count = oom_kills()
        self._start_refused_s = 0.0
        """When the system last refused a worker; 0: it gave the last one."""

    def run(self) -> int:
        """Until the run is over: 0 done, 1 failed, 128 + signal when asked to leave."""
        read_end, write_end = socket.socketpair()
        write_end.setblocking(False)
        previous_actions = {
            s: signal.signal(s, self._on_signal) for s in STOP_SIGNALS if is_signal_handled(s)
        }
        previous_wakeup_fd = signal.set_wakeup_fd(write_end.fileno())
        self._selector.register(read_end, selectors.EVENT_READ, lambda: read_end.recv(4096))
        self._selector.register(
            self.host_link.register_client, selectors.EVENT_READ, self._pump_hosts
        )
        self._watch_transport()
        try:
            self._start_fork_server(self.config.no_fork_cause)
            # While they import: what a first death would have to wait for.
            self.config.replan(max(1, self.num_ranks // self.config.island_size - 1))
            while self.progress.exit_code is None:
                for key, _ in self._selector.select(TICK_S):
                    if self.progress.exit_code is None:  # else all workers are buried
                        key.data()
                self._tick()
            if self.view is not None and self.progress.exit_code not in STOP_EXIT_CODES:
                self.host_link.announce_exit(self.progress.exit_code)
            return self.progress.exit_code
        finally:
            signal.set_wakeup_fd(previous_wakeup_fd)
            self.pool.shutdown(0.0)
            self.host_link.close()
            self._selector.close()
            read_end.close()
            write_end.close()
            for signal_number, action in previous_actions.items():
                signal.signal(signal_number, action)

    def report(self) -> dict[str, Any]:
        """What this host has, for the orders of a view."""
        return {
            "name": self.host_name,
            "wants": self.num_ranks,
            "ready": self.pool.available_workers(self.host_name),
            "begun": self.progress.has_begun,
            "stranded": self.progress.is_stranded,
        }

    @property
    def _is_multi_host(self) -> bool:
        """Whether other hosts are in the run now."""
        return self.view is not None and len(self.view.hosts) > 1

    @property
    def _needs_no_workers(self) -> bool:
        """Whether the run is about to end, here at least."""
        progress = self.progress
        is_over = progress.is_ending or progress.exit_code is not None
        return is_over or bool(progress.received_signals)

    # ---- what happens ----

    def _watch_transport(self) -> None:
        if self.host_link.transport is not None:
            self._selector.register(
                self.host_link.transport, selectors.EVENT_READ, self._pump_hosts
            )

    def _start_fork_server(self, no_fork_cause: str = "") -> None:
        """Starts the server that workers are forks of, or says why each worker imports for itself;
        then the workers that are missing, as soon as may be."""
        try:
            if no_fork_cause:
                raise ForkServerError(no_fork_cause)
            server = self.pool.start_fork_server()
            self._selector.register(
                server, selectors.EVENT_READ, lambda: self._on_fork_server(server)
            )
        except ForkServerError as error:
            self.pool.close_fork_server()
            self._print(f"each worker imports torch for itself: {error}")
        self._start_missing(is_urgent=True)

    def _on_fork_server(self, server: ForkServer) -> None:
        """The fork server has imported everything, or it has ended."""
        if server is not self.pool.fork_server:
            return  # replaced since the selector looked: a worker died with it
        try:
            server.check()
        except ForkServerError as error:
            self._replace_fork_server(str(error))
        else:
            self._start_missing(is_urgent=True)

    def _replace_fork_server(self, cause: str) -> None:
        """Starts another fork server, as this one has failed; not when it could not import or must
        not fork: what ails it, a worker that imports for itself says better."""
        server = self.pool.fork_server
        assert server is not None
        self._selector.unregister(server)
        if self._needs_no_workers:
            self.pool.close_fork_server()
        elif server.is_ready or server.was_killed:
            self._print(f"the fork server is started again: {cause}")
            self._start_fork_server()
        else:
            self._start_fork_server(f"the fork server failed: {cause}")

    def _start_worker(self) -> bool:
        """Starts a worker; False when the system has no room for it now: others may go on."""
        try:
            worker = self.pool.start()
        except ForkServerError as error:
            self._replace_fork_server(str(error))
            return False
        except OSError as error:
            if not (self.pool.workers or self.progress.has_begun):
                raise RunError(
                    "no worker can be started",
                    values={"host": self.host_name, "cause": error.strerror or str(error)},
                    fix="more processes (ulimit -u) or memory, then the same command",
                ) from error
            if not self._start_refused_s:
                self._print(f"a worker cannot be started: {error.strerror}; it is tried again")
            self._start_refused_s = time.monotonic()
            return False
        self._start_refused_s = 0.0
        self._selector.register(
            worker.exit_watch, selectors.EVENT_READ, lambda: self._on_exit(worker)
        )
        self._selector.register(
            worker.channel, selectors.EVENT_READ, lambda: self._read_messages(worker)
        )
        return True

    def _on_signal(self, signal_number: int, _: FrameType | None) -> None:
        self.progress.received_signals.append(signal_number)

    def _handle_signals(self) -> None:
        """Acts on signals: leave in good order, at the second one at once."""
        progress = self.progress
        if len(progress.received_signals) == progress.handled_count:
            return
        view_age_s = time.monotonic() - progress.view_start_s
        if (
            self._is_multi_host
            and progress.unrecorded_events
            and not progress.must_stop_now
            and view_age_s < EXIT_GRACE_S
        ):
            return  # this host may be the only one that holds the run's state
        progress.handled_count = len(progress.received_signals)
        signal_number = progress.received_signals[-1 if progress.must_stop_now else 0]
        is_waiting = (
            self.view is not None and progress.has_begun and not is_training(self.view.assignment)
        )
        if progress.must_stop_now or is_waiting or not self.pool.ranked_workers():
            progress.exit_code = 128 + signal_number
        elif self._is_multi_host:
            self.host_link.member.leave(time.monotonic())
        else:
            for worker in self.pool.ranked_workers():
                worker.channel.send({"do": "leave", "signal": signal_number})

    def _read_messages(self, worker: Worker) -> None:
        for message in worker.channel.receive():
            worker.last_heard_s = time.monotonic()
            self._on_message(worker, message)
        if worker.channel.is_closed:
            with suppress(KeyError, ValueError):
                self._selector.unregister(worker.channel)

    def _on_message(self, worker: Worker, message: Mapping[str, Any]) -> None:
        progress = self.progress
        match message:
            case {"say": "beat", "step": step, "phase": phase, "generation": generation}:
                self.watchdog.on_heartbeat(worker, message)
                progress.step = max(progress.step, step)
                is_current = self.view is not None and generation == self.view.number
                if is_current and phase.startswith(COMPUTE_PHASES):
                    progress.unrecorded_events.clear()
            case {"say": "ready"}:
                worker.is_ready = True
                self._on_ready(worker)
            case {"say": "stumbled", "generation": generation, "step": step}:
                worker.step, progress.step = step, max(progress.step, step)
                if self.view is not None and generation == self.view.number:
                    progress.connection_error_s = progress.connection_error_s or time.monotonic()
            case {"say": "set", "generation": generation, "key": key, "value": value}:
                self.host_link.set(generation, key, value)
            case {"say": "get", "generation": generation, "key": key, "number": number}:
                self.host_link.get(
                    generation,
                    key,
                    lambda v: worker.channel.send({"do": "answer", "number": number, "value": v}),
                )
            case {"say": "leaving", "signal": number}:
                self._on_leaving(worker, number)
            case {"say": "done", "code": exit_code, "verdict": final_message}:
                progress.is_ending = True
                progress.is_finished = progress.is_finished or (worker.rank == 0 and exit_code == 0)
                worker.announced_exit_code, worker.final_message = exit_code, final_message

    def _on_ready(self, worker: Worker) -> None:
        """A worker that fills a gap is a reason for a new generation; a spare is none."""
        ready_workers = [w for w in self.pool.workers.values() if w.is_ready]
        if self.progress.is_ending:
            return
        if self.progress.has_begun:
            island_size, ranked_count = self.config.island_size, len(self.pool.ranked_workers())
            islands = min(len(ready_workers), self.num_ranks) // island_size
            # With other hosts' ranks this one may make an island whole that this host cannot.
            if islands * island_size > ranked_count or (
                self._is_multi_host and ranked_count < self.num_ranks
            ):
                self._request_view("joined", worker, f"pid {worker.pid} is ready", "it gets a seat")
        elif len(ready_workers) >= self.num_ranks and not self.is_founder and self.view is None:
            self.host_link.join()
        elif len(ready_workers) >= self.num_ranks:
            self._request_view(
                "begun", worker, f"{len(ready_workers)} ranks are ready", "they get seats"
            )

    def _on_leaving(self, worker: Worker, signal_number: int) -> None:
        """A worker that alone was told to go: the others go on; the last one makes all leave."""
        other_workers = [w for w in self.pool.workers.values() if w.is_ready and w is not worker]
        if not self._is_multi_host and len(other_workers) < self.config.island_size:
            self.progress.received_signals.append(signal_number)
            return
        worker.leave_signal = signal_number
        self.num_ranks = max(self.num_ranks - 1, 0)
        signal_name = signal.Signals(signal_number).name
        self._request_view(
            "left", worker, f"it was told to leave by {signal_name}", "the others go on"
        )

    def _on_exit(self, worker: Worker) -> None:
        self._read_messages(worker)
        self._selector.unregister(worker.exit_watch)
        with suppress(KeyError, ValueError):
            self._selector.unregister(worker.channel)
        stderr_tail = worker.read_stderr_tail()
        worker.read_progress()
        exit_code = self.pool.reap(worker)
        if worker.announced_exit_code is not None:
            self._on_announced_exit(worker, stderr_tail)
        elif worker.leave_signal is None:
            self._on_failure(worker, exit_code, stderr_tail)

    def _on_announced_exit(self, worker: Worker, stderr_tail: str) -> None:
        progress = self.progress
        assert worker.announced_exit_code is not None
        if worker.announced_exit_code and worker.final_message:
            self.pool.shutdown(EXIT_GRACE_S)
            WorkerFailure(
                worker.step, worker.final_message, "", stderr_tail, worker.announced_exit_code
            ).report()
            progress.exit_code = worker.announced_exit_code
        elif not [w for w in self.pool.ranked_workers() if w.announced_exit_code is None]:
            progress.exit_code = worker.announced_exit_code

    def _on_failure(self, worker: Worker, exit_code: int, stderr_tail: str) -> None:
        progress, rank = self.progress, worker.rank
        if (
            -exit_code in progress.received_signals or progress.is_finished
        ):  # it did what it was told, or was not needed
            progress.exit_code = 0 if progress.is_finished else 128 - exit_code
            return
        if rank is None and worker.is_ready and progress.has_begun:  # a spare: nobody waits for it
            return
        progress.is_ending = False
        worker_name = f"rank {rank} (pid {worker.pid})" if rank is not None else f"pid {worker.pid}"
        failure = WorkerFailure(
            worker.step,
            worker_name,
            worker.kill_reason or self._describe_death(exit_code),
            stderr_tail,
            exit_code,
        )
        failure_count = progress.record_failure(failure, worker.assigned_s)
        is_last_worker = (
            progress.received_signals and not self._is_multi_host and not self.pool.workers
        )
        if (
            exit_code == 2
            or not self.config.recover
            or failure_count >= self.config.max_failures
            or is_last_worker
        ):
            self.pool.shutdown(EXIT_GRACE_S if failure_count == 1 else 0.0)
            progress.exit_code = progress.give_up()
            return
        if stderr_tail:
            failure.report("")
        if rank is not None:
            has_spare = any(w.is_ready and w.rank is None for w in self.pool.workers.values())
            action = "a warm spare takes its place" if has_spare else "the others go on"
            self._request_view("lost", worker, failure.cause, action)
        self._start_missing(is_urgent=True)

    def _describe_death(self, exit_code: int) -> str:
        """How a worker died that nobody here has killed."""
        previous_count, self._oom_count = self._oom_count, oom_kills()
        is_out_of_memory = exit_code == -signal.SIGKILL and self._oom_count > previous_count
        suffix = ", as the kernel was out of memory" if is_out_of_memory else ""
        return describe_exit_code(exit_code) + suffix

    # ---- generations ----

    def _request_view(self, event: str, worker: Worker, cause: str, action: str) -> None:
        """Asks for a new generation, and says why in one sentence."""
        record = worker_event(worker, event, self.host_name, cause, action)
        self.host_link.member.request_view(record, time.monotonic())
        self._pump_hosts()

    def _pump_hosts(self) -> None:
        """Carries messages between hosts, and acts on what the membership decided."""
        self.host_link.pump()
        for change in self.host_link.member.take_changes():
            self._on_change(change)
        self.host_link.pump()

    def _on_change(self, change: MembershipChange) -> None:
        match change:
            case ViewHalted(generation):
                self.progress.generation_end_s = time.monotonic()
                for worker in self.pool.workers.values():
                    if worker.rank is not None:
                        worker.channel.send({"do": "halt", "generation": generation})
                        self.watchdog.on_generation_end(worker, generation)
                    worker.rank = None
            case ViewInstalled(view):
                self.config.run_lock.acquire_shared()
                self._install_view(view)
                if (
                    self.progress.received_signals
                    and not self._is_multi_host
                    and not self.pool.ranked_workers()
                ):
                    self.progress.exit_code = 128 + self.progress.received_signals[0]
            case Evicted(sentence):
                self._print(f"{sentence}; it asks to be let in again")
                self.view = None
                self._rejoin()
            case Left():
                self.progress.exit_code = (
                    128 + (self.progress.received_signals or [signal.SIGTERM])[0]
                )

    def _install_view(self, view: View) -> None:
        """Gives this host's workers their seats in a new generation."""
        progress, assignment = self.progress, view.assignment
        self.view, progress.connection_error_s, progress.view_start_s = view, 0.0, time.monotonic()
        progress.is_stranded, progress.no_island_since_s = False, 0.0
        self.host_link.store.start_generation(view.number)
        for worker in self.pool.workers.values():
            if worker.leave_signal is not None:
                worker.channel.send({"do": "end"})
        progress.unrecorded_events += view.events
        if not assignment:
            if progress.has_begun:
                progress.no_island_since_s = progress.view_start_s
                self._print(self.pool.no_island_message(self.config.island_size))
            return
        drill = ""
        if is_training(assignment):
            drill = self.config.drill_for(progress.generation_count)
            progress.has_begun, progress.generation_count = True, progress.generation_count + 1
            if notice := self.host_link.progress_notice(assignment):
                self._print(notice)
        for rank, (host, worker_number, pid) in enumerate(assignment["ranks"]):
            if host != self.host_link.member.own_id:
                continue
            if worker_number not in self.pool.workers:  # it died meanwhile: nobody may wait for it
                says = f"pid {pid} on {self.host_name} died before it had its seat; all meet again"
                record = {"event": "lost", "host": self.host_name, "pid": pid, "rank": rank}
                self.host_link.member.request_view({**record, "says": says}, time.monotonic())
                continue
            worker = self.pool.workers[worker_number]
            worker.slot = self.pool.free_slot() if worker.slot is None else worker.slot
            worker.rank, worker.assigned_s = rank, progress.view_start_s
            if is_training(assignment):
                worker.last_rank, worker.last_generation = rank, view.number
            assignment_fields = asdict(worker_assignment(view, rank, worker.slot, progress, drill))
            worker.channel.send({"do": "assign", "assignment": assignment_fields})
            if progress.received_signals and not self._is_multi_host:
                worker.channel.send({"do": "leave", "signal": progress.received_signals[0]})

    # ---- from time to time ----

    def _tick(self) -> None:
        now = time.monotonic()
        self._handle_signals()
        if self.host_link.remote_exit_code is None:
            self.host_link.member.tick(now)
        self._pump_hosts()
        self._handle_other_hosts(now)
        for worker in self.pool.workers.values():
            worker.channel.flush()
        for worker, reason in self.watchdog.find_dead_workers(self.pool.workers.values()):
            self.pool.kill(worker, reason)
        if stuck_worker := self.watchdog.find_stuck_worker(self.pool.ranked_workers()):
            self._request_view(
                "stuck", *stuck_worker, "all meet again, and who does not come is replaced"
            )
        if (
            self.progress.island_wait_expired(now)
            and self.view
            and self.view.leader == self.host_link.member.own_id
        ):
            sentence = "no island has been whole for long; what is left of the run is saved"
            self.host_link.member.request_view(
                {"event": "stranded", "host": self.host_name, "says": sentence}, now
            )
        if (
            self.progress.connection_error_s
            and now - self.progress.connection_error_s > BROKEN_CONNECTION_S
        ):
            self.progress.connection_error_s = 0.0
            if ranked_workers := self.pool.ranked_workers():
                self._request_view(
                    "broken", ranked_workers[0], "a connection broke", "all meet again"
                )
        server = self.pool.fork_server
        if server and not server.is_ready and server.age_s > self.config.startup_timeout_s:
            self._replace_fork_server(f"it imported for {server.age_s:.0f} s")
        self._start_missing(is_urgent=False)

    def _handle_other_hosts(self, now: float) -> None:
        """Acts on the news of the end, on refusals, and on a wish that is not heard."""
        progress, host_link = self.progress, self.host_link
        # A rank that was given a seat while the first one came to the end would wait for it.
        exit_code = 0 if progress.is_finished else host_link.remote_exit_code
        if exit_code is not None:
            progress.is_finished = exit_code == 0
            progress.run_end_s = progress.run_end_s or now
            if not self.pool.ranked_workers() or now - progress.run_end_s > EXIT_GRACE_S:
                progress.exit_code = exit_code
            return
        if notice := host_link.register_notice():
            self._print(notice)
        if refusals := host_link.refused_peers_text():
            self._print(f"refused {refusals}")
        if join_failure := host_link.join_failure(self.config.run_lock.is_only_holder):
            progress.exit_code, sentence = join_failure
            print_to_stderr(sentence)
        elif host_link.unanswered_address:
            self._rejoin()

    def _rejoin(self) -> None:
        if self.host_link.transport is not None:
            self._selector.unregister(self.host_link.transport)
        self.host_link.rejoin()
        self._watch_transport()

    def _print(self, sentence: str) -> None:
        print_to_stderr(f"{self.host_name}: {sentence}")

    def _start_missing(self, is_urgent: bool) -> None:
        """Starts what is missing: at once what computes, spares when the run is under way."""
        progress = self.progress
        if self._needs_no_workers or self.pool.is_importing:
            return
        active_workers = [w for w in self.pool.workers.values() if w.leave_signal is None]
        is_under_way = (
            progress.has_begun and time.monotonic() - progress.view_start_s > SPARE_START_DELAY_S
        )
        missing_count = (
            self.num_ranks + (self.config.spares if is_under_way else 0) - len(active_workers)
        )
        if self._start_refused_s and time.monotonic() - self._start_refused_s < START_RETRY_S:
            return
        for _ in range(missing_count if is_urgent or is_under_way or self._start_refused_s else 0):
            if not self._start_worker():
                return
