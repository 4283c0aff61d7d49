"""One candidate's attempt at a new view: whom it asked, who has answered, and why it was begun.

Not here: when to begin one and what follows from it (`members.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cordee.elastic.views import Promise, View, blocking_view, newest_installed_view
from cordee.elastic.witness import Witness, WitnessReply

MembershipEvent = Mapping[str, Any]


@dataclass
class Proposal:
    """Hosts of the view to be and hosts that leave; both vote. `started_s` is on the Ears'
    clock."""

    number: int
    hosts: tuple[str, ...]
    leavers: tuple[str, ...]
    started_s: float
    silence_reasons: dict[str, str] = field(default_factory=dict)
    promises: dict[str, Promise] = field(default_factory=dict)
    accepted_by: set[str] = field(default_factory=set)
    view: View | None = None

    @property
    def voters(self) -> tuple[str, ...]:
        """All who vote."""
        return self.hosts + self.leavers

    @property
    def base_view(self) -> View | None:
        """The newest view that the promisers know to have been active."""
        return newest_installed_view(self.promises.values())

    @property
    def pending_voters(self) -> list[str]:
        """Who has not answered yet in this phase."""
        responders = self.accepted_by if self.view else self.promises
        return [host for host in self.voters if host not in responders]

    def propose_message(self, installed_number: int) -> dict[str, Any]:
        """The message that asks for a promise."""
        return {
            "kind": "propose",
            "number": self.number,
            "formed": installed_number,
            "hosts": list(self.hosts),
            "leavers": list(self.leavers),
        }

    def accept_message(self) -> dict[str, Any]:
        """The message that asks to accept the view."""
        assert self.view is not None
        base_view = self.base_view
        return {
            "kind": "accept",
            "view": self.view.to_json(),
            "base": base_view and base_view.to_json(),
        }

    def blocking_reason(
        self, own_id: str, witness: Witness | None
    ) -> tuple[str, WitnessReply | None]:
        """Once all have promised: why it must not go on ("": it may), and the witness's answer."""
        if witness is None:
            blocker = blocking_view(self.promises)
            return quorum_wait_reason(blocker, self.voters) if blocker else "", None
        reply = witness.promise(self.number, own_id, self.voters)
        if reply is None:
            return "waiting for the witness: it cannot be reached", None
        views = [
            view
            for p in self.promises.values()
            for view in (p.installed_view, *p.accepted_views)
            if view
        ]
        if reply.view is None and not all(set(view.hosts) <= set(self.voters) for view in views):
            return "waiting for all hosts: the witness has lost its memory", reply
        if reply.is_granted:
            return "", reply
        if reply.view is None:
            return "waiting: another host asked the witness first", reply
        names = ", ".join(reply.view.hosts)
        return f"waiting: the witness holds generation {reply.view.number} of {names}", reply

    def decide(self, own_id: str, assign: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> View:
        """The view, once all have promised: the orders from their reports, the verdicts in full."""
        reports = {host: self.promises[host].report for host in self.hosts}
        leader = own_id if own_id in self.hosts else self.hosts[0]
        assignment = assign(reports)
        events = tuple(self._membership_events(own_id, assignment)) + tuple(
            dict(event) for host in self.voters for event in self.promises[host].events
        )
        self.view = View(self.number, leader, self.hosts, assignment, events)
        return self.view

    def _membership_events(
        self, own_id: str, assignment: Mapping[str, Any]
    ) -> list[MembershipEvent]:
        """A verdict on each host that the new view has and the base has not, or the reverse."""
        base_view = self.base_view
        previous_hosts = base_view.hosts if base_view else ()
        names = {
            **(base_view.assignment.get("names", {}) if base_view else {}),
            **assignment.get("names", {}),
        }
        removal_text, changes = f"generation {self.number} goes on without it", []
        for host in previous_hosts:
            if host in self.leavers:
                changes.append(("host_left", host, "asked to leave", removal_text))
            elif host not in self.hosts:
                cause = self.silence_reasons.get(host, "not reached")
                action = f"{removal_text} (found by {host_label(own_id, names)})"
                changes.append(("host_silent", host, cause, action))
        for host in self.hosts:
            if host not in previous_hosts:
                action = f"generation {self.number} counts it in"
                changes.append(("host_joined", host, "asked to join", action))
        return [
            {"event": event, "host": host, "who": own_id, "done": action,
             "says": f"host {host_label(host, names)}: {cause}; {action}"}
            for event, host, cause, action in changes
        ]  # fmt: skip


def host_label(host: str, names: Mapping[str, str]) -> str:
    """A host for a person: its name, if it is known, and its address; ids are for machines."""
    address = host.partition("#")[0]
    return f"{names[host]} ({address})" if host in names else address


def quorum_wait_reason(view: View, responders: Collection[str]) -> str:
    """A sentence on the quorum of `view` that is missing."""
    responding_hosts = [host for host in view.hosts if host in responders]
    silent_hosts = [host for host in view.hosts if host not in responders]
    verb = "answers" if len(responding_hosts) == 1 else "answer"
    return (
        f"waiting for a majority: {len(responding_hosts)} of {len(view.hosts)} hosts {verb}"
        f" ({', '.join(responding_hosts)}; silent: {', '.join(silent_hosts)})"
    )
