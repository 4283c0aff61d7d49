"""Membership: the hosts of a run agree on views, by number, whatever dies, freezes or is cut off.

A pure state machine: messages, seconds and calls go in, messages and changes come out; no socket,
thread, clock or randomness. Vertical Paxos in miniature, with dynamic voting. Why it is safe:

A host promises each number to one candidate, halts at the promise, and accepts nothing lower later.
A view is active only when all whom its candidate asked have accepted it, and a generation commits
only with all its hosts in it: so it is dead once one of its hosts promised more. A candidate goes on
only with a quorum (more than half, or half with the leader) of the newest view known to have been
active, and of every newer one that all its hosts present have accepted. Take an active view X and a
younger candidate Y that knows of it: Y holds a quorum of X, so a host of X is halted. If Y knew only
an older active view F: X (or, by induction, a view between them) needed a quorum of F as well, and
two quorums of F meet in a host that accepted X before it promised Y, and said so. With a witness the
argument is one line: it accepts after all hosts, and promises only to who brings a host of the
newest active view. Traded away: a view of two hosts cannot outlive its leader without a witness;
every host sends heartbeats to every other.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from cordee.errors import RunError
from cordee.fault.pace import Ears, Rules
from cordee.fault.rounds import Round
from cordee.fault.views import (
    Acceptor,
    Change,
    Entered,
    Fenced,
    Halted,
    Left,
    Promise,
    View,
    obstacle,
)
from cordee.fault.witness import Witness

Message = Mapping[str, Any]


class Member:
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
        self.me = me
        self.view: View | None = None
        self._rules, self._assign, self._report, self._witness = rules, assign, report, witness
        self._ears = Ears(rules)
        self._votes = Acceptor(last)
        self._top = last
        self._round: Round | None = None
        self._beats: dict[str, Message] = {}
        self._beat_number, self._beat_due = 0, 0.0
        self._joiners: list[str] = []
        self._mute: dict[str, float] = {}
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
        """The transport's connection to `host` was reset or refused: ask once more, then it is gone."""
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
        except (KeyError, TypeError, AttributeError) as error:
            values = {"sender": sender, "kind": message.get("kind")}
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

    def take_outbox(self) -> list[tuple[str, dict[str, Any]]]:
        """(destination, message) to be sent, in order; each is given once."""
        out, self._outbox = self._outbox, []
        return out

    def take_changes(self) -> list[Change]:
        """What changed here, in order; each is given once."""
        out, self._changes = self._changes, []
        return out

    # Heartbeats.

    def _known(self) -> list[str]:
        return self._votes.known_hosts()

    def _peers(self) -> list[str]:
        peers = dict.fromkeys(self._known() + self._joiners)
        if self._through:
            near = [host for host in self._beats if self._ears.knows(host)]
            peers |= dict.fromkeys(near)
            if not any(host.startswith(self._through) for host in near):
                peers[self._through] = None
        elif self.view and self.view.leader in self._beats:
            peers |= dict.fromkeys(self._beats[self.view.leader]["meet"])
        peers.pop(self.me, None)
        return list(peers)

    def _beat_message(self) -> dict[str, Any]:
        self._beat_number += 1
        return {
            "kind": "beat",
            "beat": self._beat_number,
            "view": self.view.number if self.view else 0,
            "formed": self._votes.formed_number,
            "promised": self._votes.promised,
            "hears": [host for host in self._peers() if self._ears.knows(host)],
            "meet": self._joiners,
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
        before = self._beats.get(sender)
        if before is not None and m["beat"] <= before["beat"]:
            return
        self._ears.hear(sender, beat=True)
        self._beats[sender] = m
        self._top = max(self._top, m["promised"], m["formed"])
        self._guide(sender, m)
        met = set(m["meet"]) - set(before["meet"] if before else ())
        if met or (before is None and self._through):
            self._beat()
        if self._handed_over(sender, m):
            self._end(Left(), f"left: generation {self._votes.formed_number} goes on")
        elif m["wants"] or m["leaving"] or self._joiners or m["promised"] > self._top_of_view():
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
        elif host not in self._joiners:
            self._joiners.append(host)
            self._beat()

    def _on_refused(self, sender: str, m: Message) -> None:
        self._trouble = str(m["says"]) if self._through else self._trouble

    # When to stand for a new view, and with whom.

    def _top_of_view(self) -> int:
        return self.view.number if self.view else self._top

    def _leaves(self, host: str) -> bool:
        if host == self.me:
            return self._leaving
        return host in self._beats and bool(self._beats[host]["leaving"])

    def _hears(self, listener: str, host: str) -> bool:
        """Whether `listener` said, in the present view if there is one, that it hears `host`."""
        m = self._beats.get(listener)
        if m is None or (self.view and m["view"] != self.view.number):
            return True
        return host in m["hears"]

    def _gone(self) -> list[str]:
        """Known hosts that this one cannot work with; a leader also parts pairs that are cut off."""
        others = [host for host in self._known() if host != self.me]
        gone = [
            host
            for host in others
            if self._ears.silent(host) or host in self._mute or not self._hears(host, self.me)
        ]
        here = [host for host in others if host not in gone]
        while self.view and self.view.leader == self.me:
            cuts = {
                host: sum(
                    not (self._hears(host, other) and self._hears(other, host))
                    for other in here
                    if other != host
                )
                for host in here
            }
            worst = max(reversed(here), key=lambda host: cuts[host], default="")
            if not worst or not cuts[worst]:
                break
            here.remove(worst)
            gone.append(worst)
        return gone

    def _choose(self) -> tuple[Round, bool]:
        """A round to come, and whether this host as a leader has a reason for it."""
        gone = self._gone()
        stays = [host for host in self._known() if host not in gone]
        leavers = tuple(host for host in stays if self._leaves(host))
        self._joiners = [host for host in self._joiners if not self._ears.silent(host)]
        fresh = [host for host in self._joiners if host not in stays and self._met(host, stays)]
        hosts = tuple(host for host in [*stays, *fresh] if host not in leavers)
        chosen = Round(0, hosts, leavers, self._ears.clock)
        chosen.verdicts = {host: self._ears.verdict(host) for host in gone}
        return chosen, bool(gone or leavers or fresh or self._calls or self._asked_for(stays))

    def _met(self, joiner: str, stays: list[str]) -> bool:
        """Whether `joiner` and all that stay have heard each other, so that it cannot do harm."""
        heard = self._beats[joiner]["hears"] if joiner in self._beats else ()
        return all(
            host in heard
            and (
                self._ears.knows(joiner)
                if host == self.me
                else host in self._beats and joiner in self._beats[host]["hears"]
            )
            for host in stays
        )

    def _asked_for(self, stays: list[str]) -> bool:
        """Whether a follower wants a new view, or has promised past this one and cannot enter it."""
        number = self._top_of_view()
        beats = [self._beats[host] for host in stays if host in self._beats]
        return any((m["wants"] and m["view"] == number) or m["promised"] > number for m in beats)

    def _act(self) -> None:
        """Begins a round when one is due here; nurses the one under way."""
        formed = self._votes.formed
        if self._over or self._through or formed is None:
            return
        if self.me not in self._known():  # a leaver that waits until the others are in
            if all(self._ears.silent(host) for host in formed.hosts):
                self._end(Left(), "left: the others have not been heard since")
            return
        clock = self._ears.clock
        self._mute = {host: until for host, until in self._mute.items() if until > clock}
        if self._round and not self._nurse(self._round):
            return
        chosen, reason = self._choose()
        if self._leaving and not chosen.hosts:
            self._end(Left(), "left: no host stays in the run")
            return
        leads = self.view is not None and self.view.leader == self.me
        if self.view and not leads and not self._leaderless(self.view):
            reason, self._since = False, clock
        elif not leads:
            reason = clock - self._since >= self._wait(chosen)
        if self._witness is None and not formed.has_quorum(chosen.asked):
            self._trouble = _waiting(formed, chosen.asked)
        elif reason:
            self._begin(chosen)
        elif self.view:
            self._trouble = ""

    def _leaderless(self, view: View) -> bool:
        return self._ears.silent(view.leader)

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
        bad = [host for host in current.missing if slow or self._ears.silent(host)]
        bad = [host for host in bad if host != self.me]
        for host in bad:
            self._mute[host] = self._ears.clock + 2 * self._rules.least_s
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
        blocked = self._blocked(current)
        if blocked:
            self._give_up(blocked)
            return
        current.decide(self.me, self._assign)
        current.began = self._ears.clock
        self._ask(current)

    def _blocked(self, current: Round) -> str:
        """Why this round, promised by all asked, must not go on; empty: it may."""
        if self._witness is None:
            lacking = obstacle(current.promises)
            return _waiting(lacking, current.asked) if lacking else ""
        vow = self._witness.promise(current.number, self.me, current.asked)
        if vow is None:
            return "waiting for the witness: it cannot be reached"
        self._top = max(self._top, vow.number)
        if vow.view is None and not set(self._known()) <= set(current.asked):
            return "waiting for all hosts: the witness has lost its memory"
        if not vow.granted and vow.view is not None:
            return f"waiting: {_listed(vow.view.hosts)} went on in generation {vow.view.number}"
        return "" if vow.granted else "waiting: another host asked the witness first"

    def _on_refuse(self, sender: str, m: Message) -> None:
        self._top = max(self._top, m["promised"])
        if self._round and self._round.number == m["number"]:
            self._give_up(f"waiting: {sender} follows another candidate")

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

    # An acceptor's side.

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
        if view is None or sender in (view.leader, self.me) or view.leader == self.me:
            return False
        m = self._beats.get(view.leader)
        well = m is not None and m["view"] == view.number and not m["leaving"]
        return well and not self._ears.silent(view.leader)

    def _halt(self) -> None:
        if self.view:
            self._changes.append(Halted(self.view.number))
            self.view = None

    def _on_accept(self, sender: str, m: Message) -> None:
        view = View.from_json(m["view"])
        base = None if m["base"] is None else View.from_json(m["base"])
        if self._votes.accept(view, base, sender):
            self._since = self._ears.clock
            self._send(sender, {"kind": "accepted", "number": view.number})
        else:
            answer = {"kind": "refuse", "number": view.number, "promised": self._votes.promised}
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
        self._changes.append(Entered(view))
        del self._calls[: self._offered]
        self._offered = 0
        self._mute.clear()
        self._joiners = [host for host in self._joiners if host not in view.hosts]
        self._ears.keep([*view.hosts, *self._joiners])
        self._ears.expect(view.hosts)
        kept = {*view.hosts, *self._joiners}
        self._beats = {host: m for host, m in self._beats.items() if host in kept}
        self._since = self._ears.clock
        self._beat()

    def _end(self, change: Change, says: str) -> None:
        self._halt()
        self._changes.append(change)
        self._over, self._round, self._trouble = True, None, says

    # Plumbing.

    def _send(self, host: str, message: Message) -> None:
        if host == self.me:
            self._local.append(message)
        else:
            self._outbox.append((host, dict(message)))

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
        takers[message["kind"]](sender, message)


def _listed(hosts: tuple[str, ...] | list[str]) -> str:
    return ", ".join(hosts)


def _waiting(view: View, answering: tuple[str, ...]) -> str:
    """A sentence on the quorum that is missing."""
    here = [host for host in view.hosts if host in answering]
    silent = [host for host in view.hosts if host not in answering]
    answers = "answers" if len(here) == 1 else "answer"
    return (
        f"waiting for a majority: {len(here)} of {len(view.hosts)} hosts {answers}"
        f" ({_listed(here)}; silent: {_listed(silent)})"
    )
