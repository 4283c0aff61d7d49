"""A host's vote: promises, acceptances, and the changes that follow for its workers.

The half of a `Member` that only answers; it never begins anything. Not here: heartbeats, deadlines
and candidates (`members.py`), and the rules of the vote themselves (`views.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from cordee.elastic.failure_detector import FailureDetector, Timeouts
from cordee.elastic.heartbeat_table import HeartbeatTable
from cordee.elastic.proposal import Proposal
from cordee.elastic.views import (
    Acceptor,
    Evicted,
    Left,
    MembershipChange,
    Promise,
    View,
    ViewHalted,
    ViewInstalled,
)

Message = Mapping[str, Any]


class AcceptorRole:
    """One host as an acceptor. `view` is the view that is active here; None: none is."""

    def __init__(
        self, own_id: str, timeouts: Timeouts, report: Callable[[], Any], last_generation: int
    ) -> None:
        self.own_id = own_id
        self.view: View | None = None
        self._report = report
        self._detector = FailureDetector(timeouts)
        self._heartbeats = HeartbeatTable(own_id, self._detector)
        self._acceptor = Acceptor(last_generation)
        self._highest_number = last_generation
        self._proposal: Proposal | None = None
        self._pending_events: list[Message] = []
        self._offered_event_count = 0
        self._last_promise: Message = {}
        self._join_address = ""
        self._is_leaving = self._is_out = False
        self._last_progress_s = 0.0
        self._wait_reason = ""
        self._local_messages: deque[Message] = deque()
        self._outbox: list[tuple[str, dict[str, Any]]] = []
        self._changes: list[MembershipChange] = []

    @property
    def promised_number(self) -> int:
        """The highest number that this host has promised: no later generation can be there yet."""
        return self._acceptor.promised_number

    def take_outbox(self) -> list[tuple[str, dict[str, Any]]]:
        """(destination, message) to be sent, in order; each is given once."""
        messages, self._outbox = self._outbox, []
        return messages

    def take_changes(self) -> list[MembershipChange]:
        """What changed here, in order; each is given once."""
        changes, self._changes = self._changes, []
        return changes

    def _on_propose(self, sender: str, message: Message) -> None:
        number, acceptor = message["number"], self._acceptor
        self._highest_number = max(self._highest_number, number)
        is_outsider = (
            acceptor.installed_view is not None and sender not in acceptor.installed_view.hosts
        )
        if is_outsider and message["formed"] < acceptor.installed_number:
            assert acceptor.installed_view is not None
            self._send(sender, {"kind": "enter", "view": acceptor.installed_view.to_json()})
        elif self.own_id not in message["hosts"] and self.own_id not in message["leavers"]:
            return
        elif not acceptor.may_promise(number, sender) or self._follows_healthy_leader(sender):
            reply = {"kind": "refuse", "number": number, "promised": acceptor.promised_number}
            self._send(sender, reply)
        else:
            if number > acceptor.promised_number:
                self._halt_view()
                if self._proposal and self._proposal.number < number:
                    self._proposal = None
                acceptor.promise(number, sender)
                self._offered_event_count, self._last_progress_s = (
                    len(self._pending_events),
                    self._detector.clock_s,
                )
                accepted_views = tuple(acceptor.accepted_views.values())
                promise = Promise(
                    acceptor.installed_view,
                    accepted_views,
                    self._report(),
                    tuple(self._pending_events),
                )
                self._last_promise = {"kind": "promise", "number": number, **promise.to_json()}
            self._send(sender, self._last_promise)

    def _follows_healthy_leader(self, sender: str) -> bool:
        """Whether this host follows a leader that is well: then others may not have its vote."""
        view = self.view
        is_follower = (
            view is not None
            and self.own_id != view.leader
            and sender not in (view.leader, self.own_id)
        )
        return is_follower and view is not None and self._heartbeats.is_leader_healthy(view)

    def _halt_view(self) -> None:
        if self.view:
            self._changes.append(ViewHalted(self.view.number))
            self.view = None

    def _on_accept(self, sender: str, message: Message) -> None:
        view = View.from_json(message["view"])
        base_view = None if message["base"] is None else View.from_json(message["base"])
        reply = {"kind": "accepted", "number": view.number}
        if self._acceptor.accept(view, base_view, sender):
            self._last_progress_s = self._detector.clock_s
        else:
            reply |= {"kind": "refuse", "promised": self._acceptor.promised_number}
        self._send(sender, reply)

    def _on_install(self, sender: str, message: Message) -> None:
        view, acceptor = View.from_json(message["view"]), self._acceptor
        has_accepted = view.key in acceptor.accepted_views or (
            acceptor.installed_view and acceptor.installed_view.key == view.key
        )
        is_newer = view.number > acceptor.installed_number
        if self.own_id not in view.hosts:
            if is_newer and not self._join_address:
                reason = f"generation {view.number} goes on without this host"
                self._leave_run(
                    Left() if self._is_leaving else Evicted(f"fenced: {reason}"), reason
                )
            return
        if is_newer:
            acceptor.learn(view)
        if (
            has_accepted
            and acceptor.promised_number == view.number
            and (self.view is None or is_newer)
        ):
            self._install_view(view)

    def _install_view(self, view: View) -> None:
        self.view, self._proposal, self._join_address, self._wait_reason = view, None, "", ""
        if view.hosts == (self.own_id,):  # the last one saves before it leaves
            self._is_leaving = False
        self._changes.append(ViewInstalled(view))
        del self._pending_events[: self._offered_event_count]
        self._offered_event_count = 0
        self._heartbeats.install_view(view)
        self._last_progress_s = self._detector.clock_s

    def _leave_run(self, change: MembershipChange, reason: str) -> None:
        self._halt_view()
        self._changes.append(change)
        self._is_out, self._proposal, self._wait_reason = True, None, reason

    def _send(self, host: str, message: Message) -> None:
        if host == self.own_id:
            self._local_messages.append(message)
        else:
            self._outbox.append((host, dict(message)))
