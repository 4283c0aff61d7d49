"""A supervisor's traffic with those of other hosts: views, store keys, and the news of the end.

Not here: how messages travel (`link.py`), what views mean (`members.py`). A run on one host has no
link, and everything here is local then.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cordee.errors import ConfigError, RunError
from cordee.fault.keys import Answer, Keys
from cordee.fault.link import Link, Refusal
from cordee.fault.members import Member
from cordee.fault.rounds import named

PATIENCE_S = 10.0
"""How long a host that wants in hears nothing before it tries elsewhere, or gives up."""

AGAIN_S = 0.5
"""Between two greetings of a host that has not answered yet."""


@dataclass(frozen=True)
class Meeting:
    """How this host meets others: a new `link()` whenever it needs one (with a fresh id), the
    member that speaks over it, whether the run's folder says that it is `finished()`, the kind of
    this host's devices, and whom it asks to be let in ("": it founds the run)."""

    link: Callable[[], Link] | None
    member: Callable[..., Member]
    finished: Callable[[], bool]
    device: str
    through: str = ""


class Hosts:
    """This host's link and member, renewed when it was fenced; and the generation's keys."""

    def __init__(self, meeting: Meeting, assign: Any, report: Any) -> None:
        self._meeting, self._assign, self._report = meeting, assign, report
        self.keys = Keys()
        self._asked: dict[int, Answer] = {}
        self._numbers = itertools.count()
        self.over: int | None = None
        """The exit code with which another host has ended the run."""
        self.link: Link | None = None
        self._known: tuple[str, ...] = ()
        self._met: dict[str, None] = {}
        self._tried: list[str] = []
        self._own = {""}
        self._refused: list[Refusal] = []
        self._joining = False
        self._first = ""
        self._meet(meeting.through)

    def _meet(self, through: str) -> None:
        self.link = self._meeting.link() if self._meeting.link else None
        me = self.link.id if self.link else "here"
        self._own.add(place_of(me))
        self.member = self._meeting.member(me, assign=self._assign, report=self._tell)
        self._through = through
        self._heard_s = time.monotonic()
        self._greet_s = 0.0
        if through:
            self._tried.append(through)
        else:
            self.member.found(self._heard_s)

    def _tell(self) -> dict[str, Any]:
        """This host's report, as `orders.assign` reads it."""
        return {**self._report(), "device": self._meeting.device}

    def join(self) -> None:
        """Asks to be let in, now that this host has ranks to bring."""
        self._joining = True
        self.member.join(self._through, time.monotonic())

    def again(self) -> None:
        """Back under a new name, through another host that was in the run or was met."""
        others = [place_of(host) for host in [*self._known, *self._met]]
        others = list(dict.fromkeys([*others, self._meeting.through]))
        places = [place for place in others if place not in self._own]
        fresh = [place for place in places if place not in self._tried]
        if not fresh:
            self._tried.clear()
        self.close()
        self._meet(next(iter(fresh or places), place_of(self.member.me)))
        if self._joining or self._known:
            self.join()

    @property
    def unheard(self) -> str:
        """Where this host has asked in vain to be let in; "" while there is hope."""
        waits = self._through and self.member.view is None and self.link is not None
        lost = waits and time.monotonic() - self._heard_s > PATIENCE_S
        return self._through if lost else ""

    def shut_out(self, is_alone: Callable[[], bool]) -> tuple[int, str] | None:
        """(exit code, words) when this host will not be let in; None while it may be."""
        if ours := [r for r in self._refused if self._is_about_us(r)]:
            told = "\n".join(f"{r.why}\n{r.table}".rstrip() for r in ours)
            return 2, f"error: the run did not let this host in: {told}"
        if not self.unheard:
            return None
        if self._meeting.finished():
            return 0, "the run is finished"
        if not self._known:
            fix = "the address that a living host of the run was given as --listen"
            what = f"nobody has answered for {PATIENCE_S:g} s where this host wants to join"
            error = ConfigError(what, values={"launch.join": self._through}, fix=fix)
            return 2, f"error: {error}"
        if is_alone():
            return 1, "no other host is left; the same command goes on from the last checkpoint"
        return None

    def carry(self) -> None:
        """Takes in what has come, and sends what the member wants said."""
        link, now = self.link, time.monotonic()
        if link is not None:
            for sender, message in link.receive():
                self._heard_s, self._met[sender] = now, None
                self._take(sender, message, now)
            for host in link.lost():
                if self.over is None:  # else it has merely come to the end before this one
                    self.member.lost(host, now)
            for to, message in self.member.take_outbox():
                self._send(to, {"view": message})
            if self._through and self.member.view is None and now > self._greet_s:
                self._greet_s = now + AGAIN_S
                link.send(self._through, {"hello": link.id})  # who refuses us says so at once
        if self.member.view is not None:
            self._known, self._through = self.member.view.hosts, ""
            self._tried.clear()

    def refused_others(self) -> str:
        """Which hosts were refused here, and why, with the tables of differences; "": none."""
        self._refused = self.link.refused() if self.link is not None else []
        others = [r for r in self._refused if not self._is_about_us(r)]
        return "\n".join(f"{place_of(r.who)}: {r.why}\n{r.table}".rstrip() for r in others)

    def _is_about_us(self, refusal: Refusal) -> bool:
        """Whether it means that this host is not let in; anybody may knock here meanwhile."""
        asks = self._through and not self._known
        return bool(asks) and ("#" in refusal.who or refusal.who == self._through)

    def shown(self, orders: Mapping[str, Any]) -> str:
        """Where the progress is shown, once each time that it is another host; else ""."""
        ranks, before = orders["ranks"], self._first
        self._first = ranks[0][0]
        if self._first in (before, self.member.me):
            return ""
        place = named(self._first, orders["names"])
        return f"{len(ranks)} ranks compute; progress is shown on {place}"

    # ---- store ----

    def set(self, generation: int, key: str, value: str) -> None:
        """Writes a key where the leader keeps it."""
        if leader := self._leader():
            self._send(leader, {"set": [generation, key, value]})
        else:
            self.keys.set(generation, key, value)

    def get(self, generation: int, key: str, answer: Answer) -> None:
        """Answers when the leader has the key."""
        if leader := self._leader():
            number = next(self._numbers)
            self._asked[number] = answer
            self._send(leader, {"get": [generation, key, number]})
        else:
            self.keys.get(generation, key, answer)

    def tell_over(self, code: int) -> None:
        """Tells all hosts that the run has ended."""
        for host in dict.fromkeys([*self._known, *self._met]):  # also who was about to join
            if host != self.member.me:
                self._send(host, {"over": code})

    def close(self) -> None:
        """Sends the last words and closes the link."""
        if self.link is not None:
            self.link.close()

    # ---- inside ----

    def _leader(self) -> str:
        """The leader, if it is another host."""
        view = self.member.view
        return "" if view is None or view.leader == self.member.me else view.leader

    def _send(self, to: str, message: Mapping[str, Any]) -> None:
        if self.link is not None:
            # A host that somebody made up, or a message of no size: nobody misses it.
            with suppress(ConfigError, ValueError):
                self.link.send(to, message)

    def _take(self, sender: str, message: Mapping[str, Any], now: float) -> None:
        match message:
            case {"view": said}:
                try:
                    self.member.hear(sender, said, now)
                except RunError as error:
                    if self.link is not None:
                        self.link.dismiss(sender, f"it sent what makes no sense: {error.what}")
            # Who keeps keys has promised the number of their generation, which it leads.
            case {"set": [generation, key, value]} if generation <= self.member.promised:
                self.keys.set(generation, key, value)
            case {"get": [generation, key, number]} if generation <= self.member.promised:
                self.keys.get(
                    generation, key, lambda value: self._send(sender, {"answer": [number, value]})
                )
            case {"answer": [number, value]}:
                if answer := self._asked.pop(number, None):
                    answer(value)
            case {"hello": _} if self.member.view is not None:
                self._send(sender, {"welcome": self.member.me})
            case {"over": code} if sender in self._known or self._through:
                self.over = int(code)


def place_of(host: str) -> str:
    """A host's id without what only machines need."""
    return host.partition("#")[0]
