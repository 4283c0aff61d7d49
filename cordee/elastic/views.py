"""Views of who is in the run, what a host remembers of the votes, and which votes may go on.

A view's number is the run's generation. Plain data and the two rules on which safety rests: a host
promises a number once and to one candidate (`Acceptor`), and a new view needs a part of every older
view that may be working (`blocking_view`). Not here: messages and time (`members.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
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

    @property
    def key(self) -> tuple[int, tuple[str, ...]]:
        """Tells two candidates' views of one number apart: no host is asked by both."""
        return self.number, self.hosts

    def has_quorum(self, voters: Collection[str]) -> bool:
        """Whether `voters` holds more than half of the hosts, or exactly half with the leader."""
        count = 2 * sum(host in voters for host in self.hosts)
        return count > len(self.hosts) or (count == len(self.hosts) and self.leader in voters)

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


@dataclass(frozen=True)
class Promise:
    """A host's vote for a number: what it remembers, its report and its verdicts."""

    installed_view: View | None
    accepted_views: tuple[View, ...]
    report: Any
    events: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """The promise as plain JSON."""
        return {
            "formed": self.installed_view and self.installed_view.to_json(),
            "attempts": [view.to_json() for view in self.accepted_views],
            "report": self.report,
            "calls": [dict(event) for event in self.events],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Promise:
        """Reads `to_json`'s output. RunError: a view in it is not one."""
        installed_view = None if data["formed"] is None else View.from_json(data["formed"])
        accepted_views = tuple(View.from_json(view) for view in data["attempts"])
        return cls(installed_view, accepted_views, data["report"], tuple(data["calls"]))


class Acceptor:
    """A host's memory of the votes: the number promised, the newest view known to have been active
    (`installed_view`), and the views accepted since, which may or may not have become active
    (`accepted_views`).
    """

    def __init__(self, last_generation: int) -> None:
        self.promised_number, self.promised_candidate = last_generation, ""
        self.installed_view: View | None = None
        self.accepted_views: dict[tuple[int, tuple[str, ...]], View] = {}

    @property
    def installed_number(self) -> int:
        """The number of the newest view known to have been active; -1: none."""
        return self.installed_view.number if self.installed_view else -1

    def may_promise(self, number: int, candidate: str) -> bool:
        """Whether `number` is higher than any promised, or promised to this candidate already."""
        return number > self.promised_number or (number, candidate) == (
            self.promised_number,
            self.promised_candidate,
        )

    def promise(self, number: int, candidate: str) -> None:
        """From now on nothing lower is promised or accepted."""
        self.promised_number, self.promised_candidate = number, candidate

    def accept(self, view: View, base_view: View | None, candidate: str) -> bool:
        """Accepts `view` unless something higher was promised; `base_view` is what it stands on."""
        if (view.number, candidate) != (self.promised_number, self.promised_candidate):
            return False
        if base_view is not None:
            self.learn(base_view)
        if view.number > self.installed_number:
            self.accepted_views[view.key] = view
        return True

    def learn(self, view: View) -> None:
        """`view` is known to have been active."""
        if view.number > self.installed_number:
            self.installed_view = view
            self.accepted_views = {
                k: v for k, v in self.accepted_views.items() if v.number > view.number
            }

    def known_hosts(self) -> list[str]:
        """Hosts of the newest active view by seniority, then those of attempts since."""
        views = ([self.installed_view] if self.installed_view else []) + list(
            self.accepted_views.values()
        )
        return list(dict.fromkeys(host for view in views for host in view.hosts))


def newest_installed_view(promises: Iterable[Promise]) -> View | None:
    """The newest view that any promise knows to have been active."""
    installed_views = [promise.installed_view for promise in promises if promise.installed_view]
    return max(installed_views, key=lambda view: view.number, default=None)


def open_views(promises: Mapping[str, Promise]) -> list[View]:
    """Attempts newer than the base that may have become active.

    A view becomes active only when all its hosts have accepted it. A promiser that is one of them
    and has not accepted will not do so any more, so that such an attempt is void.
    """
    base_view = newest_installed_view(promises.values())
    base_number = base_view.number if base_view else -1
    keys_by_host = {host: {view.key for view in p.accepted_views} for host, p in promises.items()}
    views_by_key = {
        v.key: v for p in promises.values() for v in p.accepted_views if v.number > base_number
    }
    return [
        view
        for key, view in sorted(views_by_key.items())
        if all(key in keys_by_host[host] for host in view.hosts if host in keys_by_host)
    ]


def blocking_view(promises: Mapping[str, Promise]) -> View | None:
    """A view of which these promises lack a quorum although it may be working; None: go on.

    RunError: no promise knows of any view (a candidate always knows of one).
    """
    base_view = newest_installed_view(promises.values())
    if base_view is None:
        raise RunError("no host here has been in the run", values={"hosts": list(promises)})
    views = [base_view, *open_views(promises)]
    return next((view for view in views if not view.has_quorum(promises)), None)
