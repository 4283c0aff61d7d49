"""A supervisor's traffic with the register and other hosts: views, store keys, news of the end.

A run on one host has no transport and its register in memory: everything here is local then.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cordee.elastic.failure_detector import Timeouts
from cordee.elastic.kv_store import KeyValueStore, ValueCallback
from cordee.elastic.membership import Member
from cordee.elastic.register import MemoryRegister, Register, RegisterClient
from cordee.elastic.transport import Refusal, Transport
from cordee.elastic.views import host_label
from cordee.errors import ConfigError, RunError

JOIN_TIMEOUT_S = 10.0
"""How long a host that wants in hears nothing before it tries elsewhere, or gives up."""

HELLO_INTERVAL_S = 0.5
"""Between two greetings of a host that has not answered yet."""


@dataclass(frozen=True, kw_only=True)
class RendezvousConfig:
    """How this host meets others: the seconds by which they judge each other, the register, a new
    `open_transport()` whenever it needs one (with a fresh id; None: it is alone), whether the run's
    folder says that it is `is_finished()`, the kind of this host's devices, whom it asks to be let
    in ("": it founds the run), and a generation that the run is known to have had."""

    timeouts: Timeouts
    device_kind: str
    is_finished: Callable[[], bool]
    open_transport: Callable[[], Transport] | None = None
    register: Register = field(default_factory=MemoryRegister)
    join_address: str = ""
    last_generation: int = 0


class HostLink:
    """This host's transport and member, renewed when it was fenced; and the generation's keys."""

    def __init__(self, config: RendezvousConfig, assign: Any, report: Any) -> None:
        self._config, self._assign, self._report = config, assign, report
        self.store = KeyValueStore()
        self.register_client = RegisterClient(config.register)
        self._register_problem = ""
        self._pending_gets: dict[int, ValueCallback] = {}
        self._request_numbers = itertools.count()
        self.remote_exit_code: int | None = None
        """The exit code with which another host has ended the run."""
        self.transport: Transport | None = None
        self._known_hosts: tuple[str, ...] = ()
        self._heard_hosts: dict[str, None] = {}
        self._tried_addresses: list[str] = []
        self._own_addresses = {""}
        self._refusals: list[Refusal] = []
        self._is_joining = False
        self._first_rank_host = ""
        self._connect(config.join_address)

    def _connect(self, join_address: str) -> None:
        self.transport = self._config.open_transport() if self._config.open_transport else None
        own_id = self.transport.id if self.transport else "here"
        self._own_addresses.add(address_of(own_id))
        self.member = Member(
            own_id,
            self._config.timeouts,
            assign=self._assign,
            report=self._make_report,
            last_generation=self._config.last_generation,
        )
        self._join_address = join_address
        self._last_heard_s = time.monotonic()
        self._next_hello_s = 0.0
        if join_address:
            self._tried_addresses.append(join_address)
        else:
            self.member.bootstrap(self._last_heard_s)

    def _make_report(self) -> dict[str, Any]:
        """This host's report, as `orders.assign_ranks` reads it."""
        return {**self._report(), "device": self._config.device_kind}

    def join(self) -> None:
        """Asks to be let in, now that this host has ranks to bring."""
        self._is_joining = True
        self.member.join(self._join_address, time.monotonic())

    def rejoin(self) -> None:
        """Back under a new name, through another host that was in the run or was met."""
        known_addresses = [address_of(host) for host in [*self._known_hosts, *self._heard_hosts]]
        known_addresses = list(dict.fromkeys([*known_addresses, self._config.join_address]))
        addresses = [address for address in known_addresses if address not in self._own_addresses]
        untried_addresses = [
            address for address in addresses if address not in self._tried_addresses
        ]
        if not untried_addresses:
            self._tried_addresses.clear()
        if self.transport is not None:
            self.transport.close()
        self._connect(next(iter(untried_addresses or addresses), address_of(self.member.own_id)))
        if self._is_joining or self._known_hosts:
            self.join()

    @property
    def unanswered_address(self) -> str:
        """Where this host has asked in vain to be let in; "" while there is hope."""
        is_waiting = self._join_address and self.member.view is None and self.transport is not None
        has_timed_out = is_waiting and time.monotonic() - self._last_heard_s > JOIN_TIMEOUT_S
        return self._join_address if has_timed_out else ""

    def join_failure(self, is_only_host: Callable[[], bool]) -> tuple[int, str] | None:
        """(exit code, words) when this host will not be let in; None while it may be."""
        if refusals := [r for r in self._refusals if self._is_refusal_of_us(r)]:
            text = "\n".join(f"{r.reason}\n{r.table}".rstrip() for r in refusals)
            return 2, f"error: the run did not let this host in: {text}"
        if self.member.join_refusal:
            return 2, f"error: the run did not let this host in: {self.member.join_refusal}"
        if not self.unanswered_address:
            return None
        if self._config.is_finished():
            return 0, "the run is finished"
        if not self._known_hosts:
            fix = "the address that a living host of the run was given as --listen"
            problem = f"nobody has answered for {JOIN_TIMEOUT_S:g} s where this host wants to join"
            error = ConfigError(problem, values={"launch.join": self._join_address}, fix=fix)
            return 2, f"error: {error}"
        if is_only_host():
            return 1, "no other host is left; the same command goes on from the last checkpoint"
        return None

    def pump(self) -> None:
        """Takes in what has come, and sends what the member wants said."""
        transport, now = self.transport, time.monotonic()
        self._pump_register(now)
        if transport is not None:
            for sender, message in transport.receive():
                self._last_heard_s, self._heard_hosts[sender] = now, None
                self._dispatch(sender, message, now)
            for host in transport.take_lost_peers():
                if (
                    self.remote_exit_code is None
                ):  # else it has merely come to the end before this one
                    self.member.on_connection_lost(host, now)
            self._pump_register(now)
            for target, message in self.member.take_outbox():
                self._send(target, {"view": message})
            if self._join_address and self.member.view is None and now > self._next_hello_s:
                self._next_hello_s = now + HELLO_INTERVAL_S
                transport.send(
                    self._join_address, {"hello": transport.id}
                )  # who refuses us says so at once
        if self.member.view is not None:
            self._known_hosts, self._join_address = self.member.view.hosts, ""
            self._tried_addresses.clear()

    def _pump_register(self, now: float) -> None:
        """Carries what the member asks of the register, and the answers: until nothing is left, as
        a register in memory answers at once."""
        while True:
            for request in self.member.take_requests():
                self.register_client.submit(request)
            answers = self.register_client.take_answers()
            for answer in answers:
                self.member.on_register_answer(answer, now)
            if not answers:
                return

    def register_notice(self) -> str:
        """One line, when the register stops to be of use while a change of membership waits for it,
        and when it is again; else ""."""
        previous_problem, self._register_problem = (
            self._register_problem,
            self.member.register_problem,
        )
        if bool(previous_problem) == bool(self._register_problem):
            return ""
        if not self._register_problem:
            return "the register answers again"
        return f"changes of membership wait for the register: {self._register_problem}"

    def refused_peers_text(self) -> str:
        """Which hosts were refused here, and why, with the tables of differences; "": none."""
        self._refusals = self.transport.take_refusals() if self.transport is not None else []
        refusals = [r for r in self._refusals if not self._is_refusal_of_us(r)]
        return "\n".join(f"{address_of(r.peer)}: {r.reason}\n{r.table}".rstrip() for r in refusals)

    def _is_refusal_of_us(self, refusal: Refusal) -> bool:
        """Whether it means that this host is not let in; anybody may knock here meanwhile."""
        is_joining = self._join_address and not self._known_hosts
        return bool(is_joining) and ("#" in refusal.peer or refusal.peer == self._join_address)

    def progress_notice(self, assignment: Mapping[str, Any]) -> str:
        """Where the progress is shown, once each time that it is another host; else ""."""
        ranks, previous_host = assignment["ranks"], self._first_rank_host
        self._first_rank_host = ranks[0][0]
        if self._first_rank_host in (previous_host, self.member.own_id):
            return ""
        host_name = host_label(self._first_rank_host, assignment["names"])
        return f"{len(ranks)} ranks compute; progress is shown on {host_name}"

    # ---- store ----

    def set(self, generation: int, key: str, value: str) -> None:
        """Writes a key where the leader keeps it."""
        if leader := self._remote_leader():
            self._send(leader, {"set": [generation, key, value]})
        else:
            self.store.set(generation, key, value)

    def get(self, generation: int, key: str, callback: ValueCallback) -> None:
        """Answers when the leader has the key."""
        if leader := self._remote_leader():
            request_number = next(self._request_numbers)
            self._pending_gets[request_number] = callback
            self._send(leader, {"get": [generation, key, request_number]})
        else:
            self.store.get(generation, key, callback)

    def announce_exit(self, exit_code: int) -> None:
        """Tells all hosts that the run has ended."""
        for host in dict.fromkeys(
            [*self._known_hosts, *self._heard_hosts]
        ):  # also who was about to join
            if host != self.member.own_id:
                self._send(host, {"over": exit_code})

    def close(self) -> None:
        """Sends the last words, and closes what it has open."""
        self.register_client.close()
        if self.transport is not None:
            self.transport.close()

    # ---- inside ----

    def _remote_leader(self) -> str:
        """The leader, if it is another host."""
        view = self.member.view
        return "" if view is None or view.leader == self.member.own_id else view.leader

    def _send(self, target: str, message: Mapping[str, Any]) -> None:
        if self.transport is not None:
            # A host that somebody made up, or a message of no size: nobody misses it.
            with suppress(ConfigError, ValueError):
                self.transport.send(target, message)

    def _dispatch(self, sender: str, message: Mapping[str, Any], now: float) -> None:
        match message:
            case {"view": view_message}:
                try:
                    self.member.receive(sender, view_message, now)
                except RunError as error:
                    if self.transport is not None:
                        self.transport.disconnect(
                            sender, f"it sent what makes no sense: {error.message}"
                        )
            # Who keeps keys has halted for their generation, which it leads.
            case {"set": [generation, key, value]} if generation <= self.member.max_generation:
                self.store.set(generation, key, value)
            case {"get": [generation, key, request_number]} if (
                generation <= self.member.max_generation
            ):
                self.store.get(
                    generation,
                    key,
                    lambda value: self._send(sender, {"answer": [request_number, value]}),
                )
            case {"answer": [request_number, value]}:
                if callback := self._pending_gets.pop(request_number, None):
                    callback(value)
            case {"hello": _} if self.member.view is not None:
                self._send(sender, {"welcome": self.member.own_id})
            case {"over": exit_code} if sender in self._known_hosts or self._join_address:
                self.remote_exit_code = int(exit_code)


def address_of(host: str) -> str:
    """A host's id without what only machines need."""
    return host.partition("#")[0]
