"""Membership: the hosts of a run agree on views, by number, whatever dies, freezes or is cut off.

A pure state machine: messages, seconds, calls and answers of the register go in; messages, changes
and questions to the register come out. No socket, thread, clock or randomness.

Why it is safe. A generation commits a step only with all its hosts in it. A host stands for the
next one only if it is in the view that the register holds, and only once its own ranks are halted
for good in that generation, which therefore commits nothing any more when the register swaps it
for the next. The register swaps each view once, so views are one line. All else (heartbeats,
silence, who stands first, who halts for whom) decides how soon, never what.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from cordee.elastic.failure_detector import FailureDetector, HeartbeatTable, Timeouts
from cordee.elastic.register import RegisterAnswer, RegisterRequest
from cordee.elastic.views import (
    Evicted,
    Left,
    MembershipChange,
    Message,
    Proposal,
    Stage,
    View,
    ViewHalted,
    ViewInstalled,
)
from cordee.errors import RunError

REGISTER_RETRY_S = 0.5
"""Between two tries of a register that does not answer."""


class Member:
    """One host's part in the run's membership. `now` is this host's own monotonic seconds.

    `assign(reports by host)` gives the assignment of a new view, on its candidate, when all its
    hosts are halted; `report()` gives this host's part of it. `last_generation`: a generation that
    the run is known to have had; a first view is numbered above it.
    """

    def __init__(
        self,
        own_id: str,
        timeouts: Timeouts,
        *,
        assign: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        report: Callable[[], Any],
        last_generation: int = 0,
    ) -> None:
        self.own_id = own_id
        self.view: View | None = None
        """The view that is active here; None: none is."""
        self.register_problem = ""
        """Why the register cannot be asked or believed; "": it can, or was not asked."""
        self.join_refusal = ""
        """Why the others do not let this host in."""
        self._timeouts, self._assign, self._report = timeouts, assign, report
        self._detector = FailureDetector(timeouts)
        self._heartbeats = HeartbeatTable(own_id, self._detector)
        self._installed_view: View | None = None
        self._halted_number = last_generation
        self._halted_for, self._halted_attempt = "", 0
        self._proposal: Proposal | None = None
        self._attempt_count = 0
        self._pending_events: list[Message] = []
        self._join_address = ""
        self._is_founder = self._is_leaving = self._is_out = False
        self._last_progress_s = self._next_heartbeat_s = 0.0
        self._heartbeat_number = 0
        self._register_identity = ""
        self._request_count, self._next_register_s = 0, 0.0
        self._open_requests: dict[int, float] = {}
        self._local_messages: deque[Message] = deque()
        self._outbox: list[tuple[str, dict[str, Any]]] = []
        self._requests: list[RegisterRequest] = []
        self._changes: list[MembershipChange] = []

    # What the supervisor calls.

    @property
    def max_generation(self) -> int:
        """No later generation than this can be there yet, as far as this host is needed for it."""
        return self._halted_number + 1

    def bootstrap(self, now: float) -> None:
        """The first host, whose caller knows that no other lives: a view of itself alone."""
        self._detector.advance(now)
        self._is_founder = True
        self._propose_if_due()

    def join(self, join_address: str, now: float) -> None:
        """Asks the host at `join_address` to be let in, again and again until it is."""
        self._detector.advance(now)
        self._join_address = join_address
        self._ask_register()  # who does not know the run's register cannot be in the run
        self._send_heartbeats()

    def leave(self, now: float) -> None:
        """This host wants out; Left follows when the others go on without it, or at once alone."""
        self._detector.advance(now)
        self._is_leaving = True
        if self._join_address:
            self._leave_run(Left())
        self._send_heartbeats()
        self._propose_if_due()
        self._deliver_local()

    def request_view(self, event: Message, now: float) -> None:
        """Something changed here: a new view is wanted, with the verdict `event` (JSON) in it."""
        self._detector.advance(now)
        self._pending_events.append(json.loads(json.dumps(event)))
        self._send_heartbeats()
        self._propose_if_due()
        self._deliver_local()

    def on_connection_lost(self, host: str, now: float) -> None:
        """The transport's connection to `host` broke: it is asked once more, then it is gone."""
        self._detector.advance(now)
        if host in self._known_hosts() and not self._is_out:
            if self._detector.on_connection_lost(host):
                self._send(host, self._heartbeat_message())
            self._propose_if_due()
            self._deliver_local()

    def receive(self, sender: str, message: Message, now: float) -> None:
        """A message from `sender`. RunError: it cannot be read; the connection is worth nothing."""
        self._detector.advance(now)
        if self._is_out or sender == self.own_id:
            return
        try:
            self._dispatch(sender, message)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            kind = message.get("kind") if isinstance(message, Mapping) else None
            values = {"sender": sender, "kind": kind}
            raise RunError("a message between hosts cannot be read", values=values) from error
        self._deliver_local()

    def tick(self, now: float) -> None:
        """Heartbeats, deadlines and retries; to be called every `heartbeat_interval_s` / 2 or more
        often."""
        self._detector.advance(now)
        if self._is_out:
            return
        if self._detector.clock_s >= self._next_heartbeat_s:
            self._send_heartbeats()
            if self._proposal and self._proposal.stage is Stage.HALT:
                self._send_halts(self._proposal)
        age_s = self._detector.clock_s - min(self._open_requests.values(), default=float("inf"))
        if age_s > self._timeouts.min_silence_s and not self.register_problem:
            self.register_problem = f"it has not answered for {age_s:.0f} s"
        self._propose_if_due()
        self._deliver_local()

    def take_outbox(self) -> list[tuple[str, dict[str, Any]]]:
        """(destination, message) to be sent, in order; each is given once."""
        messages, self._outbox = self._outbox, []
        return messages

    def take_requests(self) -> list[RegisterRequest]:
        """What to ask the register, in order; each is given once."""
        requests, self._requests = self._requests, []
        return requests

    def take_changes(self) -> list[MembershipChange]:
        """What changed here, in order; each is given once."""
        changes, self._changes = self._changes, []
        return changes

    # The register.

    def _ask_register(self, proposal: Proposal | None = None) -> None:
        """Reads it; for a proposal that is decided: swaps."""
        self._request_count += 1
        self._open_requests[self._request_count] = self._detector.clock_s
        previous, view = self._installed_view, None
        if proposal:
            proposal.request_number = self._request_count
            if proposal.view:
                previous, view = proposal.base, proposal.view
        self._requests.append(RegisterRequest(self.own_id, self._request_count, previous, view))

    def on_register_answer(self, answer: RegisterAnswer, now: float) -> None:
        """The register's answer to a request; one of an earlier member here is passed over."""
        self._detector.advance(now)
        number, proposal = answer.request.number, self._proposal
        if self._is_out or answer.request.asker != self.own_id:
            return
        self._open_requests.pop(number, None)
        is_proposals = proposal is not None and proposal.request_number == number
        self.register_problem = answer.error or self._disbelief(answer)
        if self.register_problem:
            self._next_register_s = self._detector.clock_s + REGISTER_RETRY_S
            if is_proposals:
                self._abandon_proposal()
            return
        if not self._register_identity:
            self._register_identity = answer.identity
            self._send_heartbeats()
        if proposal and is_proposals:
            self._advance_proposal(proposal, answer.view)
        elif answer.view:
            self._learn(answer.view)
        self._deliver_local()

    def _disbelief(self, answer: RegisterAnswer) -> str:
        """Why an answer must not be acted upon: it is not of this run's register, or of one that is
        behind what this host knew when it asked. "": it may."""
        known_view, number = answer.request.previous, answer.view.number if answer.view else 0
        if self._register_identity not in ("", answer.identity):
            return (
                f"refused: it is another one ({answer.identity}; this run's is"
                f" {self._register_identity})"
            )
        if known_view and number < known_view.number:
            return (
                f"refused: it went back from generation {known_view.number} to {number}, as one"
                " that was restored from a backup; stop the run and start it again"
            )
        if known_view and number == known_view.number and answer.view != known_view:
            return f"refused: it holds a generation {number} that is not this run's"
        return ""

    def _advance_proposal(self, proposal: Proposal, view: View | None) -> None:
        """The register holds `view`: the proposal goes on from it, is done, or comes too late."""
        if proposal.stage is Stage.SWAP and view == proposal.view and view:
            self._proposal = None
            for host in proposal.voters:
                self._send(host, {"kind": "enter", "view": view.to_json()})
            if self.own_id in view.hosts:
                self._learn(view)
            else:  # a leaver goes when it has heard that the others are in
                self._installed_view = view
        elif proposal.stage is Stage.READ and (proposal.is_first or view == self._installed_view):
            self._prepare_proposal(proposal, view)
        else:
            self._abandon_proposal()
            if view:
                self._learn(view)

    def _prepare_proposal(self, proposal: Proposal, base: View | None) -> None:
        """With whom, now that the register has answered; nothing when the reason is gone."""
        proposal.base = base
        proposal.number = base.number + 1 if base else 1
        if proposal.is_first:
            proposal.number = max(proposal.number, self._halted_number + 1)
            proposal.hosts = (self.own_id,)
        else:
            has_reason = self._choose_hosts(proposal)
            if self.view and self.view.leader != self.own_id:
                has_reason = self._detector.is_silent(self.view.leader)
            if self.view and not has_reason:
                self._proposal = None
                return
        proposal.stage, proposal.started_s = Stage.HALT, self._detector.clock_s
        self._send_halts(proposal)

    def _learn(self, view: View) -> None:
        """`view` is, or was, in the register."""
        newest_number = self._installed_view.number if self._installed_view else -1
        is_newer = view.number > newest_number
        if self.own_id not in view.hosts:
            if is_newer and not self._join_address:
                reason = f"fenced: generation {view.number} goes on without this host"
                self._leave_run(Left() if self._is_leaving else Evicted(reason))
            return
        if is_newer:
            self._installed_view = view
        elif view != self._installed_view:
            return
        if view.number > self._halted_number and (self.view is None or is_newer):
            self._install_view(view)

    def _install_view(self, view: View) -> None:
        self._halt_view()
        self.view, self._proposal, self._join_address = view, None, ""
        self._halted_for = ""
        if view.hosts == (self.own_id,):  # the last one saves before it leaves
            self._is_leaving = False
        self._changes.append(ViewInstalled(view))
        for event in view.events:
            if event in self._pending_events:
                self._pending_events.remove(event)
        self._heartbeats.install_view(view)
        self._last_progress_s = self._detector.clock_s
        self._send_heartbeats()

    def _halt_view(self) -> None:
        if self.view:
            self._changes.append(ViewHalted(self.view.number))
            self.view = None

    def _leave_run(self, change: MembershipChange) -> None:
        self._halt_view()
        self._changes.append(change)
        self._is_out, self._proposal = True, None

    # Heartbeats.

    def _known_hosts(self) -> list[str]:
        return list(self._installed_view.hosts) if self._installed_view else []

    @property
    def _installed_number(self) -> int:
        return self._installed_view.number if self._installed_view else -1

    def _heartbeat_peers(self) -> list[str]:
        return self._heartbeats.peers(self._known_hosts(), self.view, self._join_address)

    def _heartbeat_message(self) -> dict[str, Any]:
        self._heartbeat_number += 1
        return {
            "kind": "beat",
            "beat": self._heartbeat_number,
            "view": self.view.number if self.view else 0,
            "formed": self._installed_number,
            "halted": self._halted_number,
            "hears": [host for host in self._heartbeat_peers() if self._detector.is_alive(host)],
            "meet": list(self._heartbeats.joiners),
            "joining": bool(self._join_address),
            "leaving": self._is_leaving,
            "wants": bool(self._pending_events),
            "register": self._register_identity,
        }

    def _send_heartbeats(self) -> None:
        self._next_heartbeat_s = self._detector.clock_s + self._timeouts.heartbeat_interval_s
        if not self._is_out:
            message = self._heartbeat_message()
            for host in self._heartbeat_peers():
                self._send(host, message)

    def _on_heartbeat(self, sender: str, message: Message) -> None:
        previous = self._heartbeats.record(sender, message)
        if previous is None:
            return
        self._help_laggard(sender, message)
        if message["meet"] != previous.get("meet", []) or (not previous and self._join_address):
            self._send_heartbeats()
        needs_view = message["wants"] or message["leaving"] or self._heartbeats.joiners
        if self._is_leave_complete(sender, message):
            self._leave_run(Left())
        elif needs_view or (self.view and message["halted"] >= self.view.number):
            self._propose_if_due()

    def _help_laggard(self, sender: str, message: Message) -> None:
        """Tells a host that is behind where the others are: in with it, out of it, or let in."""
        installed_view = self._installed_view
        if installed_view is None:
            return
        if message["joining"] and sender not in installed_view.hosts:
            self._on_join(sender, {"host": sender, "register": message["register"]})
        elif message["formed"] < installed_view.number:
            self._send(sender, {"kind": "enter", "view": installed_view.to_json()})

    def _is_leave_complete(self, sender: str, message: Message) -> bool:
        installed_view = self._installed_view
        if not self._is_leaving or installed_view is None or self.own_id in installed_view.hosts:
            return False
        return sender in installed_view.hosts and message["formed"] >= installed_view.number

    def _on_join(self, sender: str, message: Message) -> None:
        host = message["host"]
        if self.view is None or host in self.view.hosts or not message["register"]:
            return
        if message["register"] != self._register_identity:
            sentence = (
                f"refused: its register is {message['register']}, this run's is"
                f" {self._register_identity}"
            )
            self._send(host, {"kind": "refused", "says": sentence})
        elif self.view.leader != self.own_id:
            self._send(self.view.leader, {**message, "kind": "join"})
        elif host not in self._heartbeats.joiners:
            self._heartbeats.joiners.append(host)
            self._send_heartbeats()

    def _on_join_refused(self, sender: str, message: Message) -> None:
        self.join_refusal = str(message["says"]) if self._join_address else ""

    # When to stand for a new view, and with whom.

    def _choose_hosts(self, proposal: Proposal) -> bool:
        """Whom it is to have in it; whether a leader has a reason for it."""
        heartbeats, known_hosts = self._heartbeats, self._known_hosts()
        lost_hosts = heartbeats.unreachable_hosts(known_hosts, self.view)
        staying_hosts = [host for host in known_hosts if host not in lost_hosts]
        leavers = [host for host in staying_hosts if heartbeats.is_leaving(host)]
        leavers += [self.own_id] if self._is_leaving else []
        joiners = [
            host
            for host in heartbeats.admissible_joiners(staying_hosts)
            if host not in staying_hosts
        ]
        hosts = tuple(host for host in [*staying_hosts, *joiners] if host not in leavers)
        if not hosts:  # all leave: this one goes last, with what they hold
            hosts, leavers = (self.own_id,), [host for host in leavers if host != self.own_id]
        proposal.hosts, proposal.leavers = hosts, tuple(leavers)
        proposal.silence_reasons = {
            host: self._detector.silence_reason(host) for host in lost_hosts
        }
        number = self.view.number if self.view else self._installed_number
        needs_view = heartbeats.needs_new_view(staying_hosts, number)
        return bool(lost_hosts or leavers or joiners or self._pending_events or needs_view)

    def _propose_if_due(self) -> None:
        """Begins a proposal when one is due here; nurses the one under way."""
        if self._is_out or (self._detector.clock_s < self._next_register_s and not self._proposal):
            return
        if self._join_address:
            self._read_if_untold()
            return
        if self._proposal and not self._abandon_if_stalled(self._proposal):
            return
        proposal = Proposal(self._attempt_count + 1, is_first=self._installed_view is None)
        if self._installed_view is None:
            if self._is_founder:
                self._start_proposal(proposal)
            return
        known_hosts = self._known_hosts()
        if self.own_id not in known_hosts:  # a leaver that waits until the others are in
            if all(self._detector.is_silent(host) for host in known_hosts):
                self._leave_run(Left())
            return
        if self._is_leaving and known_hosts == [self.own_id]:
            self._leave_run(Left())
            return
        has_reason = self._choose_hosts(proposal)
        if self.view is None or self.view.leader != self.own_id:
            has_reason = self._is_own_turn(proposal)
        if has_reason:
            self._start_proposal(proposal)

    def _read_if_untold(self) -> None:
        """A joiner reads the register until it answers; and when the host that it halted for is
        silent: a view with it in it may be there, and nobody else left to say so."""
        is_untold = self._halted_for and self._detector.is_silent(self._halted_for)
        if (is_untold or not self._register_identity) and not self._open_requests:
            self._next_register_s = self._detector.clock_s + REGISTER_RETRY_S
            self._ask_register()

    def _is_own_turn(self, proposal: Proposal) -> bool:
        """Whether a host that is no leader stands now: by seniority, after who else is at it."""
        clock_s = self._detector.clock_s
        if self.view and not self._detector.is_silent(self.view.leader):
            self._last_progress_s = clock_s
            return False
        seniority, known_hosts = proposal.voters.index(self.own_id), self._known_hosts()
        stagger_s, delay_s = self._timeouts.election_stagger_s, 0.0
        if self.view is None and self._halted_for == self.own_id:
            seniority += 1
        elif self.view is None and not self._detector.is_silent(self._halted_for):
            delay_s = self._timeouts.min_silence_s
        # Of two parts that cannot see each other, the larger one goes first.
        if 2 * sum(host in proposal.voters for host in known_hosts) < len(known_hosts):
            seniority += 1
        return clock_s - self._last_progress_s >= delay_s + seniority * stagger_s

    def _abandon_if_stalled(self, proposal: Proposal) -> bool:
        """Gives a proposal up when one of the asked is silent or slow; whether another may
        begin."""
        if proposal.stage is not Stage.HALT:
            return False
        is_slow = self._detector.clock_s - proposal.started_s > 2 * self._timeouts.min_silence_s
        pending_voters = [host for host in proposal.pending_voters if host != self.own_id]
        stalled_voters = [
            host for host in pending_voters if is_slow or self._detector.is_silent(host)
        ]
        self._heartbeats.mute(stalled_voters, 2 * self._timeouts.min_silence_s)
        if stalled_voters:
            self._proposal, self._last_progress_s = None, float("-inf")
        return bool(stalled_voters)

    # A candidate and who halts for it.

    def _start_proposal(self, proposal: Proposal) -> None:
        self._attempt_count, self._proposal = proposal.attempt, proposal
        self._last_progress_s = self._detector.clock_s
        self._ask_register(proposal)

    def _send_halts(self, proposal: Proposal) -> None:
        message = {
            "kind": "halt",
            "number": proposal.number,
            "attempt": proposal.attempt,
            "hosts": list(proposal.hosts),
            "leavers": list(proposal.leavers),
        }
        for host in proposal.pending_voters:
            self._send(host, message)

    def _abandon_proposal(self) -> None:
        self._proposal, self._last_progress_s = None, self._detector.clock_s

    def _on_halt(self, sender: str, message: Message) -> None:
        number, attempt = message["number"], message["attempt"]
        if self._installed_view and number <= self._installed_view.number:
            self._send(sender, {"kind": "enter", "view": self._installed_view.to_json()})
        elif self.own_id not in message["hosts"] and self.own_id not in message["leavers"]:
            return
        elif self._follows_healthy_leader(sender):
            self._send(sender, {"kind": "refuse", "attempt": attempt})
        else:
            if (sender, attempt) != (self._halted_for, self._halted_attempt):
                self._last_progress_s = self._detector.clock_s
            self._halt_view()
            self._halted_number = max(self._halted_number, number - 1)
            self._halted_for, self._halted_attempt = sender, attempt
            proposal = self._proposal
            if proposal and proposal.stage is not Stage.SWAP and self._is_senior(sender):
                self._proposal = None
            reply = {
                "kind": "halted",
                "attempt": attempt,
                "report": self._report(),
                "calls": list(self._pending_events),
            }
            self._send(sender, reply)

    def _is_senior(self, host: str) -> bool:
        """Whether `host` is before this one in the newest view."""
        known_hosts = self._known_hosts()
        if host not in known_hosts or self.own_id not in known_hosts:
            return False
        return known_hosts.index(host) < known_hosts.index(self.own_id)

    def _follows_healthy_leader(self, sender: str) -> bool:
        """Whether this host follows a leader that is well: then it does not halt for others."""
        view = self.view
        is_follower = (
            view is not None
            and self.own_id != view.leader
            and sender not in (view.leader, self.own_id)
        )
        return is_follower and view is not None and self._heartbeats.is_leader_healthy(view)

    def _on_halted(self, sender: str, message: Message) -> None:
        proposal = self._proposal
        if (
            proposal is None
            or proposal.stage is not Stage.HALT
            or proposal.attempt != message["attempt"]
            or sender not in proposal.pending_voters
        ):
            return
        proposal.reports[sender] = message
        if not proposal.pending_voters:
            proposal.decide(self.own_id, self._assign)
            proposal.stage = Stage.SWAP
            self._ask_register(proposal)

    def _on_refuse(self, sender: str, message: Message) -> None:
        proposal = self._proposal
        if proposal and (proposal.stage, proposal.attempt) == (Stage.HALT, message["attempt"]):
            self._abandon_proposal()
            # Its leader still seems well to it: ask again soon.
            self._last_progress_s -= (
                self._timeouts.election_stagger_s - self._timeouts.heartbeat_interval_s
            )

    def _on_enter(self, sender: str, message: Message) -> None:
        self._learn(View.from_json(message["view"]))

    # Plumbing.

    def _send(self, host: str, message: Message) -> None:
        if host == self.own_id:
            self._local_messages.append(message)
        else:
            self._outbox.append((host, dict(message)))

    def _deliver_local(self) -> None:
        while self._local_messages and not self._is_out:
            self._dispatch(self.own_id, self._local_messages.popleft())

    def _dispatch(self, sender: str, message: Message) -> None:
        if message["kind"] == "beat":
            self._on_heartbeat(sender, message)
            return
        if sender != self.own_id:
            self._detector.on_message(sender, is_heartbeat=False)
        handlers = {
            "join": self._on_join,
            "refused": self._on_join_refused,
            "halt": self._on_halt,
            "halted": self._on_halted,
            "refuse": self._on_refuse,
            "enter": self._on_enter,
        }
        handlers[message["kind"]](sender, message)
