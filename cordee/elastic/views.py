"""Views of who is in the run, by number (the run's generation), and what changes for a host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cordee.errors import RunError


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
