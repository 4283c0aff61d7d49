"""Membership: the hosts of a run agree on views, by number, whatever dies, freezes or is cut off.

A pure state machine: messages, seconds and calls go in, messages and changes come out; no socket,
thread, clock or randomness. Vertical Paxos in miniature, with dynamic voting. Why it is safe:

A host promises each number to one candidate, halts at the promise, and accepts nothing lower after.
A view is active only when all whom its candidate asked have accepted it, and a generation commits
only with all its hosts in it: it is dead once one of its hosts has promised more. A candidate goes
on only with a quorum (more than half, or half with the leader) of the newest view known to have
been active, and of every newer one that all its hosts present have accepted. Take an active view X
and a younger candidate Y that knows of it: Y holds a quorum of X, so a host of X is halted. If Y
knew only an older active view F: X (or, by induction, a view between) needed a quorum of F as well,
and two quorums of F meet in a host that accepted X before it promised Y, and said so. A witness
makes it one line: it accepts after all hosts, and promises only to who brings a host of the newest
active view. Traded away: a view of two hosts cannot outlive its leader without a witness; every
host sends heartbeats to every other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from cordee.errors import RunError
from cordee.fault.pace import Rules
from cordee.fault.rounds import Round, waiting_for
from cordee.fault.views import Left, Promise, View
from cordee.fault.voter import Message, Voter
from cordee.fault.witness import Witness


class Member(Voter):
    """One host's part in the run's membership. `now` is this host's own monotonic seconds.

    `assign(reports by host)` gives the orders of a new view, on its candidate, when all its hosts
    have promised and are halted; `report()` gives this host's part of it. `last`: a generation that
    the run is known to have had; new ones are numbered above it.
    """

    def __init__(
        self,
        me: str,
        rules: Rules,
        *,
        assign: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        report: Callable[[], Any],
        witness: Witness | None = None,
        last: int = 0,
    ) -> None:
        super().__init__(me, rules, report, last)
        self._rules, self._assign, self._witness = rules, assign, witness
        self._last = last
        self._beat_number, self._beat_due = 0, 0.0

    # What the supervisor calls.

    @property
    def says(self) -> str:
        """One sentence for a person: what this host is in, or waits for."""
        if self._over:
            return self._trouble
        if self._round:
            names = ", ".join(self._round.missing)
            return f"forming generation {self._round.number}: waiting for {names}"
        if self._through:
            return self._trouble or f"asking {self._through} to be let in"
        if self.view:
            return f"working in generation {self.view.number}" + (
                f"; {self._trouble}" if self._trouble else ""
            )
        return self._trouble or "waiting for a new generation"

    def found(self, now: float) -> None:
        """The first host: a view of itself alone."""
        self._ears.advance(now)
        self._votes.learn(View(self._top, self.me, (self.me,)))
        self._begin(Round(0, (self.me,), (), 0.0))
        self._pump()

    def join(self, through: str, now: float) -> None:
        """Asks the host at `through` to be let in, again and again until it is."""
        self._ears.advance(now)
        self._through = through
        self._beat()

    def leave(self, now: float) -> None:
        """This host wants out; Left follows when the others go on without it, or at once alone."""
        self._ears.advance(now)
        self._leaving = True
        if self._through:
            self._end(Left(), "left before it was let in")
        self._beat()
        self._act()
        self._pump()

    def call(self, why: Message, now: float) -> None:
        """Something changed here: a new view is wanted, with the verdict `why` (JSON) in it."""
        self._ears.advance(now)
        self._calls.append(json.loads(json.dumps(why)))
        self._beat()
        self._act()
        self._pump()

    def lost(self, host: str, now: float) -> None:
        """The transport's connection to `host` broke: it is asked once more, then it is gone."""
        self._ears.advance(now)
        if host in self._known() and not self._over:
            if self._ears.lose(host):
                self._send(host, self._beat_message())
            self._act()
            self._pump()

    def hear(self, sender: str, message: Message, now: float) -> None:
        """A message from `sender`. RunError: it cannot be read; the connection is worth nothing."""
        self._ears.advance(now)
        if self._over or sender == self.me:
            return
        try:
            self._take(sender, message)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            kind = message.get("kind") if isinstance(message, Mapping) else None
            values = {"sender": sender, "kind": kind}
            raise RunError("a message between hosts cannot be read", values=values) from error
        self._pump()

    def tick(self, now: float) -> None:
        """Heartbeats, deadlines and retries; to be called every beat_s / 2 or more often."""
        self._ears.advance(now)
        if self._over:
            return
        if self._ears.clock >= self._beat_due:
            self._beat()
            if self._round:
                self._ask(self._round)
        self._act()
        self._pump()

    # Heartbeats.

    def _known(self) -> list[str]:
        return self._votes.known_hosts()

    def _peers(self) -> list[str]:
        return self._circle.peers(self._known(), self.view, self._through)

    def _beat_message(self) -> dict[str, Any]:
        self._beat_number += 1
        return {
            "kind": "beat",
            "beat": self._beat_number,
            "view": self.view.number if self.view else 0,
            "formed": self._votes.formed_number,
            "promised": self._votes.promised,
            "hears": [host for host in self._peers() if self._ears.knows(host)],
            "meet": list(self._circle.joiners),
            "joining": bool(self._through),
            "leaving": self._leaving,
            "wants": bool(self._calls),
            "witnessed": self._witness is not None,
        }

    def _beat(self) -> None:
        self._beat_due = self._ears.clock + self._rules.beat_s
        if not self._over:
            message = self._beat_message()
            for host in self._peers():
                self._send(host, message)

    def _on_beat(self, sender: str, m: Message) -> None:
        news = self._circle.note(sender, m)
        if news is None:
            return
        self._top = max(self._top, m["promised"], m["formed"])
        self._guide(sender, m)
        if m["meet"] != news.get("meet", []) or (not news and self._through):
            self._beat()
        votes, wanted = self._votes, m["wants"] or m["leaving"] or self._circle.joiners
        if self._handed_over(sender, m):
            self._end(Left(), f"left: generation {votes.formed_number} goes on")
        elif wanted or m["promised"] > (self.view.number if self.view else self._top):
            self._act()

    def _guide(self, sender: str, m: Message) -> None:
        """Tells a host that is behind where the others are: in with it, out of it, or let in."""
        formed = self._votes.formed
        if formed is None:
            return
        if m["joining"] and sender not in formed.hosts:
            self._on_join(sender, {"host": sender, "witnessed": m["witnessed"]})
        elif m["formed"] < formed.number:
            self._send(sender, {"kind": "enter", "view": formed.to_json()})

    def _handed_over(self, sender: str, m: Message) -> bool:
        formed = self._votes.formed
        if not self._leaving or formed is None or self.me in formed.hosts:
            return False
        return sender in formed.hosts and m["formed"] >= formed.number

    def _on_join(self, sender: str, m: Message) -> None:
        host = m["host"]
        if self.view is None or host in self.view.hosts:
            return
        if m["witnessed"] != (self._witness is not None):
            says = "refused: one side has a witness (the run's shared folder), the other has not"
            self._send(host, {"kind": "refused", "says": says})
        elif self.view.leader != self.me:
            self._send(self.view.leader, {**m, "kind": "join"})
        elif host not in self._circle.joiners:
            self._circle.joiners.append(host)
            self._beat()

    def _on_refused(self, sender: str, m: Message) -> None:
        self._trouble = str(m["says"]) if self._through else self._trouble

    # When to stand for a new view, and with whom.

    def _choose(self) -> tuple[Round, bool]:
        """A round to come, and whether this host as a leader has a reason for it."""
        circle, known = self._circle, self._known()
        gone = circle.gone(known, self.view)
        stays = [host for host in known if host not in gone]
        leavers = [host for host in stays if circle.leaves(host)]
        leavers += [self.me] if self._leaving else []
        fresh = [host for host in circle.met(stays) if host not in stays]
        hosts = tuple(host for host in [*stays, *fresh] if host not in leavers)
        if not hosts:  # all leave: this one goes last, with what they hold
            hosts, leavers = (self.me,), [host for host in leavers if host != self.me]
        chosen = Round(0, hosts, tuple(leavers), self._ears.clock)
        chosen.verdicts = {host: self._ears.verdict(host) for host in gone}
        number = self.view.number if self.view else self._top
        reason = gone or leavers or fresh or self._calls or circle.wants(stays, number)
        return chosen, bool(reason)

    def _act(self) -> None:
        """Begins a round when one is due here; nurses the one under way."""
        formed, votes = self._votes.formed, self._votes
        if self._through and votes.attempts and self._ears.silent(votes.promised_to):
            self._through = ""  # its vote may have let a view begin: it answers for it now
        if self._over or self._through or formed is None:
            return
        if self.me not in self._known():  # a leaver that waits until the others are in
            if all(self._ears.silent(host) for host in formed.hosts):
                self._end(Left(), "left: the others have not been heard since")
            return
        clock = self._ears.clock
        if self._round and not self._nurse(self._round):
            return
        chosen, reason = self._choose()
        if self._leaving and chosen.hosts == (self.me,):
            stuck = self._witness is None and not formed.has_quorum(chosen.asked)
            if self._known() == [self.me] or stuck:
                self._end(Left(), "left: no host stays in the run")
                return
        leads = self.view is not None and self.view.leader == self.me
        if self.view and not leads and not self._ears.silent(self.view.leader):
            reason, self._since = False, clock
        elif not leads:
            reason = clock - self._since >= self._wait(chosen)
        if self._witness is None and not formed.has_quorum(chosen.asked):
            self._trouble = waiting_for(formed, chosen.asked)
        elif reason:
            self._begin(chosen)
        elif self.view:
            self._trouble = ""

    def _wait(self, chosen: Round) -> float:
        """Seconds before this host stands: by seniority, after who else is at it."""
        rank = chosen.asked.index(self.me)
        formed, candidate = self._votes.formed, self._votes.promised_to
        if self.view is None:
            if candidate == self.me:
                rank += 1
            elif not self._ears.silent(candidate):
                return self._rules.least_s + rank * self._rules.stagger_s
        if formed is not None and not formed.has_quorum(chosen.asked):
            rank += 1
        return rank * self._rules.stagger_s

    def _nurse(self, current: Round) -> bool:
        """Gives a round up when one of the asked is silent or slow; whether another may begin."""
        slow = self._ears.clock - current.began > 2 * self._rules.least_s
        others = [host for host in current.missing if host != self.me]
        bad = [host for host in others if slow or self._ears.silent(host)]
        self._circle.mute(bad, 2 * self._rules.least_s)
        if bad:
            self._round, self._since = None, float("-inf")
        return bool(bad)

    # A candidate's side of a round.

    def _begin(self, chosen: Round) -> None:
        self._top = max(self._top, self._votes.promised) + 1
        chosen.number, chosen.began = self._top, self._ears.clock
        self._round, self._since = chosen, self._ears.clock
        self._ask(chosen)

    def _ask(self, current: Round) -> None:
        formed = self._votes.formed_number
        message = current.accept() if current.view else current.propose(formed)
        for host in current.missing:
            self._send(host, message)

    def _give_up(self, trouble: str) -> None:
        self._round, self._since, self._trouble = None, self._ears.clock, trouble

    def _on_promise(self, sender: str, m: Message) -> None:
        current = self._round
        if current is None or current.number != m["number"] or current.view:
            return
        if sender in current.missing:
            current.promises[sender] = Promise.from_json(m)
        if current.missing:
            return
        blocked, vow = current.blocked(self.me, self._witness)
        if vow:
            self._top = max(self._top, vow.number)
        if blocked:
            self._give_up(blocked)
            if vow and vow.view and self._votes.formed_number > self._last:
                self._on_enter(self.me, {"view": vow.view.to_json()})
            return
        current.decide(self.me, self._assign)
        current.began = self._ears.clock
        self._ask(current)

    def _on_refuse(self, sender: str, m: Message) -> None:
        self._top = max(self._top, m["promised"])
        if self._round and self._round.number == m["number"]:
            self._give_up(f"waiting: {sender} follows another leader or candidate")
            if m["promised"] < m["number"]:  # its leader still seems well to it: ask again soon
                self._since -= self._rules.stagger_s - self._rules.beat_s

    def _on_accepted(self, sender: str, m: Message) -> None:
        current = self._round
        if current is None or current.view is None or current.number != m["number"]:
            return
        current.accepted.add(sender)
        if current.missing:
            return
        if self._witness and not self._witness.accept(current.view):
            self._give_up("waiting for the witness: it did not accept")
            return
        self._round = None
        self._votes.learn(current.view)
        for host in current.asked:
            self._send(host, {"kind": "enter", "view": current.view.to_json()})

    # Plumbing.

    def _pump(self) -> None:
        while self._local and not self._over:
            self._take(self.me, self._local.popleft())

    def _take(self, sender: str, message: Message) -> None:
        if message["kind"] == "beat":
            self._on_beat(sender, message)
            return
        if sender != self.me:
            self._ears.hear(sender, beat=False)
        takers = {
            "join": self._on_join,
            "refused": self._on_refused,
            "propose": self._on_propose,
            "promise": self._on_promise,
            "refuse": self._on_refuse,
            "accept": self._on_accept,
            "accepted": self._on_accepted,
            "enter": self._on_enter,
        }
        view = self.view
        takers[message["kind"]](sender, message)
        if self.view is not view and self.view:
            self._beat()
