"""Views of who is in the run, what a host remembers of the votes, and which votes may go on.

A view's number is the run's generation. Plain data and the two rules on which safety rests: a host
promises a number once and to one candidate (`Acceptor`), and a new view needs a part of every older
view that may be working (`obstacle`). Not here: messages and time (`members.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cordee.errors import RunError


@dataclass(frozen=True)
class View:
    """One generation: its hosts by seniority, and what the leader decided for them.

    `orders` is opaque here ({}: nothing runs for now). `why` holds the verdicts that led here:
    JSON records with event, host, who, done and one sentence under says.
    """

    number: int
    leader: str
    hosts: tuple[str, ...]
    orders: Mapping[str, Any] = field(default_factory=dict)
    why: tuple[Mapping[str, Any], ...] = ()

    @property
    def key(self) -> tuple[int, tuple[str, ...]]:
        """Tells two candidates' views of one number apart: no host is asked by both."""
        return self.number, self.hosts

    def has_quorum(self, among: Collection[str]) -> bool:
        """Whether `among` holds more than half of the hosts, or exactly half with the leader."""
        count = 2 * sum(host in among for host in self.hosts)
        return count > len(self.hosts) or (count == len(self.hosts) and self.leader in among)

    def to_json(self) -> dict[str, Any]:
        """The view as plain JSON."""
        return {
            "number": self.number,
            "leader": self.leader,
            "hosts": list(self.hosts),
            "orders": dict(self.orders),
            "why": [dict(verdict) for verdict in self.why],
        }

    @classmethod
    def from_json(cls, data: Any) -> View:
        """Reads `to_json`'s output. RunError: anything else."""
        right = (
            isinstance(data, dict)
            and set(data) == {"number", "leader", "hosts", "orders", "why"}
            and type(data["number"]) is int
            and isinstance(data["hosts"], list)
            and all(isinstance(host, str) for host in data["hosts"])
            and len(set(data["hosts"])) == len(data["hosts"])
            and data["leader"] in data["hosts"]
            and isinstance(data["orders"], dict)
            and isinstance(data["why"], list)
            and all(isinstance(verdict, dict) for verdict in data["why"])
        )
        if not right:
            raise RunError("a message holds no readable view", values={"view": data})
        hosts, why = tuple(data["hosts"]), tuple(data["why"])
        return cls(data["number"], data["leader"], hosts, data["orders"], why)


@dataclass(frozen=True)
class Halted:
    """The generation ended here: its workers must stop."""

    number: int


@dataclass(frozen=True)
class Entered:
    """A new active view."""

    view: View


@dataclass(frozen=True)
class Fenced:
    """The others went on without this host; it may come back under a new id."""

    sentence: str


@dataclass(frozen=True)
class Left:
    """Out, as wanted."""


Change = Halted | Entered | Fenced | Left


@dataclass(frozen=True)
class Promise:
    """A host's vote for a number: what it remembers, its report and its verdicts."""

    formed: View | None
    attempts: tuple[View, ...]
    report: Any
    calls: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """The promise as plain JSON."""
        return {
            "formed": self.formed and self.formed.to_json(),
            "attempts": [view.to_json() for view in self.attempts],
            "report": self.report,
            "calls": [dict(call) for call in self.calls],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Promise:
        """Reads `to_json`'s output. RunError: a view in it is not one."""
        formed = None if data["formed"] is None else View.from_json(data["formed"])
        attempts = tuple(View.from_json(view) for view in data["attempts"])
        return cls(formed, attempts, data["report"], tuple(data["calls"]))


class Acceptor:
    """A host's memory of the votes: the number promised, the newest view known to have been active
    (`formed`), and the views accepted since, which may or may not have become active (`attempts`).
    """

    def __init__(self, last: int) -> None:
        self.promised, self.promised_to = last, ""
        self.formed: View | None = None
        self.attempts: dict[tuple[int, tuple[str, ...]], View] = {}

    @property
    def formed_number(self) -> int:
        """The number of the newest view known to have been active; -1: none."""
        return self.formed.number if self.formed else -1

    def may_promise(self, number: int, candidate: str) -> bool:
        """Whether `number` is higher than any promised, or promised to this candidate already."""
        return number > self.promised or (number, candidate) == (self.promised, self.promised_to)

    def promise(self, number: int, candidate: str) -> None:
        """From now on nothing lower is promised or accepted."""
        self.promised, self.promised_to = number, candidate

    def accept(self, view: View, base: View | None, candidate: str) -> bool:
        """Accepts `view` unless something higher was promised; `base` is what it stands on."""
        if (view.number, candidate) != (self.promised, self.promised_to):
            return False
        if base is not None:
            self.learn(base)
        if view.number > self.formed_number:
            self.attempts[view.key] = view
        return True

    def learn(self, view: View) -> None:
        """`view` is known to have been active."""
        if view.number > self.formed_number:
            self.formed = view
            self.attempts = {k: v for k, v in self.attempts.items() if v.number > view.number}

    def known_hosts(self) -> list[str]:
        """Hosts of the newest active view by seniority, then those of attempts since."""
        views = ([self.formed] if self.formed else []) + list(self.attempts.values())
        return list(dict.fromkeys(host for view in views for host in view.hosts))


def base_of(promises: Iterable[Promise]) -> View | None:
    """The newest view that any promise knows to have been active."""
    formed = [promise.formed for promise in promises if promise.formed]
    return max(formed, key=lambda view: view.number, default=None)


def open_attempts(promises: Mapping[str, Promise]) -> list[View]:
    """Attempts newer than the base that may have become active.

    A view becomes active only when all its hosts have accepted it. A promiser that is one of them
    and has not accepted will not do so any more, so that such an attempt is void.
    """
    base = base_of(promises.values())
    floor = base.number if base else -1
    held = {host: {view.key for view in p.attempts} for host, p in promises.items()}
    found = {v.key: v for p in promises.values() for v in p.attempts if v.number > floor}
    return [
        view
        for key, view in sorted(found.items())
        if all(key in held[host] for host in view.hosts if host in held)
    ]


def obstacle(promises: Mapping[str, Promise]) -> View | None:
    """A view of which these promises lack a quorum although it may be working; None: go on.

    RunError: no promise knows of any view (a candidate always knows of one).
    """
    base = base_of(promises.values())
    if base is None:
        raise RunError("no host here has been in the run", values={"hosts": list(promises)})
    views = [base, *open_attempts(promises)]
    return next((view for view in views if not view.has_quorum(promises)), None)
