"""A host's vote: promises, acceptances, and the changes that follow for its workers.

The half of a `Member` that only answers; it never begins anything. Not here: heartbeats, deadlines
and candidates (`members.py`), and the rules of the vote themselves (`views.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from cordee.fault.circle import Circle
from cordee.fault.pace import Ears, Rules
from cordee.fault.rounds import Round
from cordee.fault.views import Acceptor, Change, Entered, Fenced, Halted, Left, Promise, View

Message = Mapping[str, Any]


class Voter:
    """One host as an acceptor. `view` is the view that is active here; None: none is."""

    def __init__(self, me: str, rules: Rules, report: Callable[[], Any], last: int) -> None:
        self.me = me
        self.view: View | None = None
        self._report = report
        self._ears = Ears(rules)
        self._circle = Circle(me, self._ears)
        self._votes = Acceptor(last)
        self._top = last
        self._round: Round | None = None
        self._calls: list[Message] = []
        self._offered = 0
        self._promise: Message = {}
        self._through = ""
        self._leaving = self._over = False
        self._since = 0.0
        self._trouble = ""
        self._local: deque[Message] = deque()
        self._outbox: list[tuple[str, dict[str, Any]]] = []
        self._changes: list[Change] = []

    @property
    def promised(self) -> int:
        """The highest number that this host has promised: no later generation can be there yet."""
        return self._votes.promised

    def take_outbox(self) -> list[tuple[str, dict[str, Any]]]:
        """(destination, message) to be sent, in order; each is given once."""
        out, self._outbox = self._outbox, []
        return out

    def take_changes(self) -> list[Change]:
        """What changed here, in order; each is given once."""
        out, self._changes = self._changes, []
        return out

    def _on_propose(self, sender: str, m: Message) -> None:
        number, votes = m["number"], self._votes
        self._top = max(self._top, number)
        outsider = votes.formed is not None and sender not in votes.formed.hosts
        if outsider and m["formed"] < votes.formed_number:
            assert votes.formed is not None
            self._send(sender, {"kind": "enter", "view": votes.formed.to_json()})
        elif self.me not in m["hosts"] and self.me not in m["leavers"]:
            return
        elif not votes.may_promise(number, sender) or self._is_led(sender):
            answer = {"kind": "refuse", "number": number, "promised": votes.promised}
            self._send(sender, answer)
        else:
            if number > votes.promised:
                self._halt()
                if self._round and self._round.number < number:
                    self._round = None
                votes.promise(number, sender)
                self._offered, self._since = len(self._calls), self._ears.clock
                attempts = tuple(votes.attempts.values())
                told = Promise(votes.formed, attempts, self._report(), tuple(self._calls))
                self._promise = {"kind": "promise", "number": number, **told.to_json()}
            self._send(sender, self._promise)

    def _is_led(self, sender: str) -> bool:
        """Whether this host follows a leader that is well: then others may not have its vote."""
        view = self.view
        led = view is not None and self.me != view.leader and sender not in (view.leader, self.me)
        return led and view is not None and self._circle.is_well(view)

    def _halt(self) -> None:
        if self.view:
            self._changes.append(Halted(self.view.number))
            self.view = None

    def _on_accept(self, sender: str, m: Message) -> None:
        view = View.from_json(m["view"])
        base = None if m["base"] is None else View.from_json(m["base"])
        answer = {"kind": "accepted", "number": view.number}
        if self._votes.accept(view, base, sender):
            self._since = self._ears.clock
        else:
            answer |= {"kind": "refuse", "promised": self._votes.promised}
        self._send(sender, answer)

    def _on_enter(self, sender: str, m: Message) -> None:
        view, votes = View.from_json(m["view"]), self._votes
        held = view.key in votes.attempts or (votes.formed and votes.formed.key == view.key)
        newer = view.number > votes.formed_number
        if self.me not in view.hosts:
            if newer and not self._through:
                says = f"generation {view.number} goes on without this host"
                self._end(Left() if self._leaving else Fenced(f"fenced: {says}"), says)
            return
        if newer:
            votes.learn(view)
        if held and votes.promised == view.number and (self.view is None or newer):
            self._enter(view)

    def _enter(self, view: View) -> None:
        self.view, self._round, self._through, self._trouble = view, None, "", ""
        if view.hosts == (self.me,):  # the last one saves before it leaves
            self._leaving = False
        self._changes.append(Entered(view))
        del self._calls[: self._offered]
        self._offered = 0
        self._circle.enter(view)
        self._since = self._ears.clock

    def _end(self, change: Change, says: str) -> None:
        self._halt()
        self._changes.append(change)
        self._over, self._round, self._trouble = True, None, says

    def _send(self, host: str, message: Message) -> None:
        if host == self.me:
            self._local.append(message)
        else:
            self._outbox.append((host, dict(message)))
