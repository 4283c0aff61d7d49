"""A supervisor's traffic with those of other hosts: views, store keys, and the news of the end.

Not here: how messages travel (`link.py`), what views mean (`members.py`). A run on one host has no
link, and everything here is local then.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cordee.fault.keys import Answer, Keys
from cordee.fault.link import Link
from cordee.fault.members import Member


@dataclass(frozen=True)
class Meeting:
    """How this host meets others: a new `link()` whenever it needs one (with a fresh id), the
    member that speaks over it, and whom it asks to be let in ("": it founds the run)."""

    link: Callable[[], Link] | None
    member: Callable[..., Member]
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
        self._meet(meeting.through)

    def _meet(self, through: str) -> None:
        self.link = self._meeting.link() if self._meeting.link else None
        me = self.link.id if self.link else "here"
        self.member = self._meeting.member(me, assign=self._assign, report=self._report)
        self._through = through
        if not through:
            self.member.found(time.monotonic())
        elif self.link is not None:
            self.link.send(through, {"hello": me})  # whoever refuses us says so at once

    def join(self) -> None:
        """Asks to be let in, now that this host has ranks to bring."""
        self.member.join(self._through, time.monotonic())

    def again(self) -> None:
        """After a fence: back under a new name, through whoever was in the run."""
        me = self.member.me
        others = [host.partition("#")[0] for host in self._known if host != me]
        self.close()
        self._meet(others[0] if others else self._meeting.through)

    def carry(self) -> None:
        """Takes in what has come, and sends what the member wants said."""
        link, now = self.link, time.monotonic()
        if link is not None:
            for sender, message in link.receive():
                self._take(sender, message, now)
            for host in link.lost():
                self.member.lost(host, now)
            for to, message in self.member.take_outbox():
                link.send(to, {"view": message})
        if self.member.view is not None:
            self._known = self.member.view.hosts

    def refusal(self) -> str:
        """Why this host was not let in, with the table of differences; "" while nobody refused."""
        if self.link is None:
            return ""
        told = [f"{r.why}\n{r.table}" for r in self.link.refused()]
        return "\n".join(told) if self.member.view is None and not self._known else ""

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
        for host in self._known:
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
            self.link.send(to, message)

    def _take(self, sender: str, message: Mapping[str, Any], now: float) -> None:
        match message:
            case {"view": said}:
                self.member.hear(sender, said, now)
            case {"set": [generation, key, value]}:
                self.keys.set(generation, key, value)
            case {"get": [generation, key, number]}:
                self.keys.get(
                    generation, key, lambda value: self._send(sender, {"answer": [number, value]})
                )
            case {"answer": [number, value]}:
                if answer := self._asked.pop(number, None):
                    answer(value)
            case {"over": code} if sender in self._known:
                self.over = int(code)
