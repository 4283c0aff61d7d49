"""Membership: the hosts of a run agree on views, by number, whatever dies, freezes or is cut off.

A pure state machine: messages, seconds and calls go in, messages and changes come out; no socket,
thread, clock or randomness. Vertical Paxos in miniature, with dynamic voting. Why it is safe:

A host promises each number to one candidate, halts at the promise, and accepts nothing lower after.
A view is active only when all whom its candidate asked have accepted it, and a generation commits
only with all its hosts in it: it is dead once one of its hosts has promised more. A candidate goes
on only with a quorum (more than half, or half with the leader) of the newest view known to have
been active, and of every newer one that all its hosts present have accepted. Take an active view X
and a younger candidate Y that knows of it: Y holds a quorum of X, so a host of X is halted. If Y
knew only an older active view F: X (or, by induction, a view between) needed a quorum of F as well,
and two quorums of F meet in a host that accepted X before it promised Y, and said so. A witness
makes it one line: it accepts after all hosts, and promises only to who brings a host of the newest
active view. Traded away: a view of two hosts cannot outlive its leader without a witness; every
host sends heartbeats to every other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from cordee.elastic.acceptor import AcceptorRole, Message
from cordee.elastic.failure_detector import Timeouts
from cordee.elastic.proposal import Proposal, quorum_wait_reason
from cordee.elastic.views import Left, Promise, View
from cordee.elastic.witness import Witness
from cordee.errors import RunError


class Member(AcceptorRole):
    """One host's part in the run's membership. `utc_timestamp` is this host's own monotonic
    seconds.

    `assign(reports by host)` gives the orders of a new view, on its candidate, when all its hosts
    have promised and are halted; `report()` gives this host's part of it. `last_generation`: a
    generation that the run is known to have had; new ones are numbered above it.
    """

    def __init__(
        self,
        own_id: str,
        timeouts: Timeouts,
        *,
        assign: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        report: Callable[[], Any],
        witness: Witness | None = None,
        last_generation: int = 0,
    ) -> None:
        super().__init__(own_id, timeouts, report, last_generation)
        self._timeouts, self._assign, self._witness = timeouts, assign, witness
        self._last_generation = last_generation
        self._heartbeat_number, self._next_heartbeat_s = 0, 0.0

    # What the supervisor calls.

    @property
    def status(self) -> str:
        """One sentence for a person: what this host is in, or waits for."""
        if self._is_out:
            return self._wait_reason
        if self._proposal:
            names = ", ".join(self._proposal.pending_voters)
            return f"forming generation {self._proposal.number}: waiting for {names}"
        if self._join_address:
            return self._wait_reason or f"asking {self._join_address} to be let in"
        if self.view:
            return f"working in generation {self.view.number}" + (
                f"; {self._wait_reason}" if self._wait_reason else ""
            )
        return self._wait_reason or "waiting for a new generation"

    def bootstrap(self, now: float) -> None:
        """The first host: a view of itself alone."""
        self._detector.advance(now)
        self._acceptor.learn(View(self._highest_number, self.own_id, (self.own_id,)))
        self._start_proposal(Proposal(0, (self.own_id,), (), 0.0))
        self._deliver_local()

    def join(self, join_address: str, now: float) -> None:
        """Asks the host at `join_address` to be let in, again and again until it is."""
        self._detector.advance(now)
        self._join_address = join_address
        self._send_heartbeats()

    def leave(self, now: float) -> None:
        """This host wants out; Left follows when the others go on without it, or at once alone."""
        self._detector.advance(now)
        self._is_leaving = True
        if self._join_address:
            self._leave_run(Left(), "left before it was let in")
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
        """Heartbeats, deadlines and retries; to be called every beat_s / 2 or more often."""
        self._detector.advance(now)
        if self._is_out:
            return
        if self._detector.clock_s >= self._next_heartbeat_s:
            self._send_heartbeats()
            if self._proposal:
                self._send_proposal(self._proposal)
        self._propose_if_due()
        self._deliver_local()

    # Heartbeats.

    def _known_hosts(self) -> list[str]:
        return self._acceptor.known_hosts()

    def _heartbeat_peers(self) -> list[str]:
        return self._heartbeats.peers(self._known_hosts(), self.view, self._join_address)

    def _heartbeat_message(self) -> dict[str, Any]:
        self._heartbeat_number += 1
        return {
            "kind": "beat",
            "beat": self._heartbeat_number,
            "view": self.view.number if self.view else 0,
            "formed": self._acceptor.installed_number,
            "promised": self._acceptor.promised_number,
            "hears": [host for host in self._heartbeat_peers() if self._detector.is_alive(host)],
            "meet": list(self._heartbeats.joiners),
            "joining": bool(self._join_address),
            "leaving": self._is_leaving,
            "wants": bool(self._pending_events),
            "witnessed": self._witness is not None,
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
        self._highest_number = max(self._highest_number, message["promised"], message["formed"])
        self._help_laggard(sender, message)
        if message["meet"] != previous.get("meet", []) or (not previous and self._join_address):
            self._send_heartbeats()
        acceptor, needs_view = (
            self._acceptor,
            message["wants"] or message["leaving"] or self._heartbeats.joiners,
        )
        if self._is_leave_complete(sender, message):
            self._leave_run(Left(), f"left: generation {acceptor.installed_number} goes on")
        elif needs_view or message["promised"] > (
            self.view.number if self.view else self._highest_number
        ):
            self._propose_if_due()

    def _help_laggard(self, sender: str, message: Message) -> None:
        """Tells a host that is behind where the others are: in with it, out of it, or let in."""
        installed_view = self._acceptor.installed_view
        if installed_view is None:
            return
        if message["joining"] and sender not in installed_view.hosts:
            self._on_join(sender, {"host": sender, "witnessed": message["witnessed"]})
        elif message["formed"] < installed_view.number:
            self._send(sender, {"kind": "enter", "view": installed_view.to_json()})

    def _is_leave_complete(self, sender: str, message: Message) -> bool:
        installed_view = self._acceptor.installed_view
        if not self._is_leaving or installed_view is None or self.own_id in installed_view.hosts:
            return False
        return sender in installed_view.hosts and message["formed"] >= installed_view.number

    def _on_join(self, sender: str, message: Message) -> None:
        host = message["host"]
        if self.view is None or host in self.view.hosts:
            return
        if message["witnessed"] != (self._witness is not None):
            sentence = (
                "refused: one side has a witness (the run's shared folder), the other has not"
            )
            self._send(host, {"kind": "refused", "says": sentence})
        elif self.view.leader != self.own_id:
            self._send(self.view.leader, {**message, "kind": "join"})
        elif host not in self._heartbeats.joiners:
            self._heartbeats.joiners.append(host)
            self._send_heartbeats()

    def _on_join_refused(self, sender: str, message: Message) -> None:
        self._wait_reason = str(message["says"]) if self._join_address else self._wait_reason

    # When to stand for a new view, and with whom.

    def _choose_proposal(self) -> tuple[Proposal, bool]:
        """A round to come, and whether this host as a leader has a reason for it."""
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
        proposal = Proposal(0, hosts, tuple(leavers), self._detector.clock_s)
        proposal.silence_reasons = {
            host: self._detector.silence_reason(host) for host in lost_hosts
        }
        current_number = self.view.number if self.view else self._highest_number
        reason = (
            lost_hosts
            or leavers
            or joiners
            or self._pending_events
            or heartbeats.needs_new_view(staying_hosts, current_number)
        )
        return proposal, bool(reason)

    def _propose_if_due(self) -> None:
        """Begins a round when one is due here; nurses the one under way."""
        installed_view, acceptor = self._acceptor.installed_view, self._acceptor
        if (
            self._join_address
            and acceptor.accepted_views
            and self._detector.is_silent(acceptor.promised_candidate)
        ):
            self._join_address = ""  # its vote may have let a view begin: it answers for it now
        if self._is_out or self._join_address or installed_view is None:
            return
        if self.own_id not in self._known_hosts():  # a leaver that waits until the others are in
            if all(self._detector.is_silent(host) for host in installed_view.hosts):
                self._leave_run(Left(), "left: the others have not been heard since")
            return
        clock_s = self._detector.clock_s
        if self._proposal and not self._abandon_if_stalled(self._proposal):
            return
        proposal, reason = self._choose_proposal()
        if self._is_leaving and proposal.hosts == (self.own_id,):
            lacks_quorum = self._witness is None and not installed_view.has_quorum(proposal.voters)
            if self._known_hosts() == [self.own_id] or lacks_quorum:
                self._leave_run(Left(), "left: no host stays in the run")
                return
        is_leader = self.view is not None and self.view.leader == self.own_id
        if self.view and not is_leader and not self._detector.is_silent(self.view.leader):
            reason, self._last_progress_s = False, clock_s
        elif not is_leader:
            reason = clock_s - self._last_progress_s >= self._election_delay_s(proposal)
        if self._witness is None and not installed_view.has_quorum(proposal.voters):
            self._wait_reason = quorum_wait_reason(installed_view, proposal.voters)
        elif reason:
            self._start_proposal(proposal)
        elif self.view:
            self._wait_reason = ""

    def _election_delay_s(self, proposal: Proposal) -> float:
        """Seconds before this host stands: by seniority, after who else is at it."""
        seniority = proposal.voters.index(self.own_id)
        installed_view, candidate = self._acceptor.installed_view, self._acceptor.promised_candidate
        if self.view is None:
            if candidate == self.own_id:
                seniority += 1
            elif not self._detector.is_silent(candidate):
                return self._timeouts.min_silence_s + seniority * self._timeouts.election_stagger_s
        if installed_view is not None and not installed_view.has_quorum(proposal.voters):
            seniority += 1
        return seniority * self._timeouts.election_stagger_s

    def _abandon_if_stalled(self, proposal: Proposal) -> bool:
        """Gives a round up when one of the asked is silent or slow; whether another may begin."""
        is_slow = self._detector.clock_s - proposal.started_s > 2 * self._timeouts.min_silence_s
        pending_voters = [host for host in proposal.pending_voters if host != self.own_id]
        stalled_voters = [
            host for host in pending_voters if is_slow or self._detector.is_silent(host)
        ]
        self._heartbeats.mute(stalled_voters, 2 * self._timeouts.min_silence_s)
        if stalled_voters:
            self._proposal, self._last_progress_s = None, float("-inf")
        return bool(stalled_voters)

    # A candidate's side of a round.

    def _start_proposal(self, proposal: Proposal) -> None:
        self._highest_number = max(self._highest_number, self._acceptor.promised_number) + 1
        proposal.number, proposal.started_s = self._highest_number, self._detector.clock_s
        self._proposal, self._last_progress_s = proposal, self._detector.clock_s
        self._send_proposal(proposal)

    def _send_proposal(self, proposal: Proposal) -> None:
        installed_number = self._acceptor.installed_number
        message = (
            proposal.accept_message()
            if proposal.view
            else proposal.propose_message(installed_number)
        )
        for host in proposal.pending_voters:
            self._send(host, message)

    def _abandon_proposal(self, reason: str) -> None:
        self._proposal, self._last_progress_s, self._wait_reason = (
            None,
            self._detector.clock_s,
            reason,
        )

    def _on_promise(self, sender: str, message: Message) -> None:
        proposal = self._proposal
        if proposal is None or proposal.number != message["number"] or proposal.view:
            return
        if sender in proposal.pending_voters:
            proposal.promises[sender] = Promise.from_json(message)
        if proposal.pending_voters:
            return
        reason, witness_reply = proposal.blocking_reason(self.own_id, self._witness)
        if witness_reply:
            self._highest_number = max(self._highest_number, witness_reply.number)
        if reason:
            self._abandon_proposal(reason)
            if (
                witness_reply
                and witness_reply.view
                and self._acceptor.installed_number > self._last_generation
            ):
                self._on_install(self.own_id, {"view": witness_reply.view.to_json()})
            return
        proposal.decide(self.own_id, self._assign)
        proposal.started_s = self._detector.clock_s
        self._send_proposal(proposal)

    def _on_refuse(self, sender: str, message: Message) -> None:
        self._highest_number = max(self._highest_number, message["promised"])
        if self._proposal and self._proposal.number == message["number"]:
            self._abandon_proposal(f"waiting: {sender} follows another leader or candidate")
            if (
                message["promised"] < message["number"]
            ):  # its leader still seems well to it: ask again soon
                self._last_progress_s -= (
                    self._timeouts.election_stagger_s - self._timeouts.heartbeat_interval_s
                )

    def _on_accepted(self, sender: str, message: Message) -> None:
        proposal = self._proposal
        if proposal is None or proposal.view is None or proposal.number != message["number"]:
            return
        proposal.accepted_by.add(sender)
        if proposal.pending_voters:
            return
        if self._witness and not self._witness.accept(proposal.view):
            self._abandon_proposal("waiting for the witness: it did not accept")
            return
        self._proposal = None
        self._acceptor.learn(proposal.view)
        for host in proposal.voters:
            self._send(host, {"kind": "enter", "view": proposal.view.to_json()})

    # Plumbing.

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
            "propose": self._on_propose,
            "promise": self._on_promise,
            "refuse": self._on_refuse,
            "accept": self._on_accept,
            "accepted": self._on_accepted,
            "enter": self._on_install,
        }
        previous_view = self.view
        handlers[message["kind"]](sender, message)
        if self.view is not previous_view and self.view:
            self._send_heartbeats()
