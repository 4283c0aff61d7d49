"""Views of who is in the run, by number (the run's generation), and the attempt at a new one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from cordee.errors import RunError

Message = Mapping[str, Any]


@dataclass(frozen=True)
class View:
    """One generation: its hosts by seniority, and what the leader decided for them.

    `assignment` is opaque here ({}: nothing runs for now). `events` holds the verdicts that led
    here: JSON records with event, host, who, done and one sentence under says.
    """

    number: int
    leader: str
    hosts: tuple[str, ...]
    assignment: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The view as plain JSON."""
        return {
            "number": self.number,
            "leader": self.leader,
            "hosts": list(self.hosts),
            "orders": dict(self.assignment),
            "why": [dict(event) for event in self.events],
        }

    @classmethod
    def from_json(cls, data: Any) -> View:
        """Reads `to_json`'s output. RunError: anything else."""
        is_valid = (
            isinstance(data, dict)
            and set(data) == {"number", "leader", "hosts", "orders", "why"}
            and type(data["number"]) is int
            and isinstance(data["hosts"], list)
            and all(isinstance(host, str) for host in data["hosts"])
            and len(set(data["hosts"])) == len(data["hosts"])
            and data["leader"] in data["hosts"]
            and isinstance(data["orders"], dict)
            and isinstance(data["why"], list)
            and all(isinstance(event, dict) for event in data["why"])
        )
        if not is_valid:
            raise RunError("a message holds no readable view", values={"view": data})
        hosts, events = tuple(data["hosts"]), tuple(data["why"])
        return cls(data["number"], data["leader"], hosts, data["orders"], events)


@dataclass(frozen=True)
class ViewHalted:
    """The generation ended here: its workers must stop."""

    number: int


@dataclass(frozen=True)
class ViewInstalled:
    """A new active view."""

    view: View


@dataclass(frozen=True)
class Evicted:
    """The others went on without this host; it may come back under a new id."""

    reason: str


@dataclass(frozen=True)
class Left:
    """Out, as wanted."""


MembershipChange = ViewHalted | ViewInstalled | Evicted | Left


def host_label(host: str, names: Mapping[str, str]) -> str:
    """A host for a person: its name, if it is known, and its address; ids are for machines."""
    address = host.partition("#")[0]
    return f"{names[host]} ({address})" if host in names else address


class Stage(Enum):
    """How far an attempt at a new view has come."""

    READ = "read"
    HALT = "halt"
    SWAP = "swap"


@dataclass
class Proposal:
    """An attempt at a new view: it reads the register (only then does anybody halt: a register that
    is away stops nobody), has all voters halt and report, and swaps the view `base` for a new one.

    `is_first`: a founder's, in the place of whatever the register holds.
    """

    attempt: int
    is_first: bool
    stage: Stage = Stage.READ
    request_number: int = 0
    base: View | None = None
    number: int = 0
    started_s: float = 0.0
    hosts: tuple[str, ...] = ()
    leavers: tuple[str, ...] = ()
    silence_reasons: Mapping[str, str] = field(default_factory=dict)
    reports: dict[str, Message] = field(default_factory=dict)
    view: View | None = None

    @property
    def voters(self) -> tuple[str, ...]:
        """All who must halt and report."""
        return self.hosts + self.leavers

    @property
    def pending_voters(self) -> list[str]:
        """Who has not reported yet."""
        return [host for host in self.voters if host not in self.reports]

    def decide(self, own_id: str, assign: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> View:
        """The view, once all have reported: its assignment from the reports, the verdicts in
        full."""
        leader = own_id if own_id in self.hosts else self.hosts[0]
        assignment = assign({host: self.reports[host]["report"] for host in self.hosts})
        events = self._host_events(own_id, assignment) + [
            event for host in self.voters for event in self.reports[host]["calls"]
        ]
        view = View(self.number, leader, self.hosts, assignment, tuple(events))
        self.view = View.from_json(json.loads(json.dumps(view.to_json())))
        return self.view

    def _host_events(self, own_id: str, assignment: Mapping[str, Any]) -> list[Message]:
        """A verdict on each host that the new view has and the base has not, or the reverse."""
        if self.is_first or self.base is None:
            return []
        previous_hosts = self.base.hosts
        names = {**self.base.assignment.get("names", {}), **assignment.get("names", {})}
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
