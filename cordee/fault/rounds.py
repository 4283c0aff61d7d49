"""One candidate's attempt at a new view: whom it asked, who has answered, and why it was begun.

Not here: when to begin one and what follows from it (`members.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cordee.fault.views import Promise, View, base_of, obstacle
from cordee.fault.witness import Vow, Witness

Verdict = Mapping[str, Any]


@dataclass
class Round:
    """Hosts of the view to be and hosts that leave; both vote. `began` is on the Ears' clock."""

    number: int
    hosts: tuple[str, ...]
    leavers: tuple[str, ...]
    began: float
    verdicts: dict[str, str] = field(default_factory=dict)
    promises: dict[str, Promise] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)
    view: View | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """All who vote."""
        return self.hosts + self.leavers

    @property
    def base(self) -> View | None:
        """The newest view that the promisers know to have been active."""
        return base_of(self.promises.values())

    @property
    def missing(self) -> list[str]:
        """Who has not answered yet in this phase."""
        done = self.accepted if self.view else self.promises
        return [host for host in self.asked if host not in done]

    def propose(self, formed_number: int) -> dict[str, Any]:
        """The message that asks for a promise."""
        return {
            "kind": "propose",
            "number": self.number,
            "formed": formed_number,
            "hosts": list(self.hosts),
            "leavers": list(self.leavers),
        }

    def accept(self) -> dict[str, Any]:
        """The message that asks to accept the view."""
        assert self.view is not None
        base = self.base
        return {
            "kind": "accept",
            "view": self.view.to_json(),
            "base": base and base.to_json(),
        }

    def blocked(self, me: str, witness: Witness | None) -> tuple[str, Vow | None]:
        """Once all have promised: why it must not go on ("": it may), and the witness's answer."""
        if witness is None:
            lacking = obstacle(self.promises)
            return waiting_for(lacking, self.asked) if lacking else "", None
        vow = witness.promise(self.number, me, self.asked)
        if vow is None:
            return "waiting for the witness: it cannot be reached", None
        views = [view for p in self.promises.values() for view in (p.formed, *p.attempts) if view]
        if vow.view is None and not all(set(view.hosts) <= set(self.asked) for view in views):
            return "waiting for all hosts: the witness has lost its memory", vow
        if vow.granted:
            return "", vow
        if vow.view is None:
            return "waiting: another host asked the witness first", vow
        names = ", ".join(vow.view.hosts)
        return f"waiting: the witness holds generation {vow.view.number} of {names}", vow

    def decide(self, me: str, assign: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> View:
        """The view, once all have promised: the orders from their reports, the verdicts in full."""
        reports = {host: self.promises[host].report for host in self.hosts}
        leader = me if me in self.hosts else self.hosts[0]
        orders = assign(reports)
        why = tuple(self._changes(me, orders)) + tuple(
            dict(call) for host in self.asked for call in self.promises[host].calls
        )
        self.view = View(self.number, leader, self.hosts, orders, why)
        return self.view

    def _changes(self, me: str, orders: Mapping[str, Any]) -> list[Verdict]:
        """A verdict on each host that the new view has and the base has not, or the reverse."""
        base = self.base
        before = base.hosts if base else ()
        names = {**(base.orders.get("names", {}) if base else {}), **orders.get("names", {})}
        without, found = f"generation {self.number} goes on without it", []
        for host in before:
            if host in self.leavers:
                found.append(("host_left", host, "asked to leave", without))
            elif host not in self.hosts:
                said = self.verdicts.get(host, "not reached")
                done = f"{without} (found by {named(me, names)})"
                found.append(("host_silent", host, said, done))
        for host in self.hosts:
            if host not in before:
                done = f"generation {self.number} counts it in"
                found.append(("host_joined", host, "asked to join", done))
        return [
            {"event": event, "host": host, "who": me, "done": done,
             "says": f"host {named(host, names)}: {said}; {done}"}
            for event, host, said, done in found
        ]  # fmt: skip


def named(host: str, names: Mapping[str, str]) -> str:
    """A host for a person: its name, if it is known, and its address; ids are for machines."""
    place = host.partition("#")[0]
    return f"{names[host]} ({place})" if host in names else place


def waiting_for(view: View, answering: Collection[str]) -> str:
    """A sentence on the quorum of `view` that is missing."""
    here = [host for host in view.hosts if host in answering]
    silent = [host for host in view.hosts if host not in answering]
    answer = "answers" if len(here) == 1 else "answer"
    return (
        f"waiting for a majority: {len(here)} of {len(view.hosts)} hosts {answer}"
        f" ({', '.join(here)}; silent: {', '.join(silent)})"
    )
