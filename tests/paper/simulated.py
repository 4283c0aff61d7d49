"""A run of several hosts in virtual time: a bad network, hosts that die, freeze, leave and return.

One seed gives one schedule. `python -m tests.paper.simulated --seed N` replays it and tells what
happened. The workers are the obvious thing: a generation commits a step when all its hosts have
voted for it while in it. Every event is checked against what must never be.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cordee.fault.members import Member
from cordee.fault.pace import Rules
from cordee.fault.views import Entered, Fenced, Halted, Left, View, obstacle
from cordee.fault.witness import Slate, Vow

BOUND_S = 15.0
"""How long a whole network with a legitimate set of hosts may take to commit again."""

MOST_EVENTS = 200_000


class Wrong(AssertionError):
    """An invariant broke."""


@dataclass
class Host:
    """A place in the network and the process that lives there now."""

    world: World
    place: int
    nonce: int
    through: str
    start_s: float
    member: Member = field(init=False)
    alive: bool = True
    frozen: bool = False
    waiting: list[Callable[[], None]] = field(default_factory=list)
    step: int | None = None
    view: View | None = None
    done: set[str] = field(default_factory=set)
    fenced: int = 0

    def __post_init__(self) -> None:
        self.name = f"h{self.place}#{self.nonce}"
        self.offset = self.world.random.uniform(0.0, 1e5)
        witness = Reach(self.world, self) if self.world.slate else None
        self.member = Member(
            self.name, self.world.rules, assign=assign, report=lambda: self.step, witness=witness
        )

    @property
    def now(self) -> float:
        """The host's own clock, unlike all others."""
        return self.world.now + self.offset

    def flush(self) -> None:
        """Sends what the member wants sent and obeys its changes."""
        for to, message in self.member.take_outbox():
            self.world.post(self, to, json.loads(json.dumps(message)))
        for change in self.member.take_changes():
            self.world.note(f"{self.name} {change}")
            if isinstance(change, Entered):
                self.world.entered(self, change.view)
                self.view, self.done = change.view, set()
                self.vote()
            elif isinstance(change, Halted):
                self.view = None
            else:
                self.world.out(self, change)

    def vote(self) -> None:
        """Votes for the next step, or asks for the state when it has not got it."""
        if self.view is None or "none" in self.view.orders:
            return
        base = self.view.orders["step"]
        kind = "vote"
        if self.step is None or self.step < base:
            kind, number = "need", base
        else:
            number = self.step + 1
            self.world.voted(self, self.view, number)
            self.done.add(self.name)
        message = {"kind": kind, "generation": self.view.number, "step": number}
        for to in self.view.hosts:
            if to == self.name:
                continue
            self.world.post(self, to, message)
        self._commit()

    def take(self, sender: str, m: Mapping[str, Any]) -> None:
        """A message between workers; those of other generations are refused."""
        if self.view is None or m["generation"] != self.view.number:
            return
        if m["kind"] == "state":
            if self.step is None or self.step < m["step"]:
                self.step, self.done = m["step"], set()
                self.vote()
        elif self.step is None:
            return
        elif m["kind"] == "need":
            if self.step >= m["step"]:
                self.world.post(self, sender, {**m, "kind": "state"})
        elif m["step"] == self.step + 1:
            self.done.add(sender)
            self._commit()
        elif m["step"] <= self.step and m["kind"] == "vote":
            self.world.post(self, sender, {**m, "kind": "again"})

    def _commit(self) -> None:
        assert self.view is not None
        base = self.view.orders.get("step")
        ready = self.step is not None and base is not None and self.step >= base
        if ready and self.done >= set(self.view.hosts):
            assert self.step is not None
            self.step += 1
            self.done = set()
            self.world.learned(self)


def assign(reports: Mapping[str, Any]) -> dict[str, Any]:
    """The orders: from which step to go on; nothing when nobody has the state."""
    steps = [step for step in reports.values() if step is not None]
    return {"step": max(steps)} if steps else {"none": True}


class Reach:
    """A witness as one host reaches it: sometimes not."""

    def __init__(self, world: World, host: Host) -> None:
        self.world, self.host = world, host

    def promise(self, number: int, by: str, among: Collection[str]) -> Vow | None:
        """None while this place is cut off from the folder."""
        if self.host.place in self.world.blind:
            return None
        assert self.world.slate
        return self.world.slate.promise(number, by, among)

    def accept(self, view: View) -> bool:
        """False while cut off."""
        assert self.world.slate
        return self.host.place not in self.world.blind and self.world.slate.accept(view)


@dataclass
class World:
    """The network, the clock and what must hold."""

    seed: int
    hosts: int
    witness: bool = False
    rules: Rules = field(default_factory=Rules)
    delay_s: tuple[float, float] = (0.001, 0.05)
    loss: float = 0.01
    twice: float = 0.01
    told: float = 0.5
    loud: bool = False
    now: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.slate = Slate() if self.witness else None
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0
        self.places: dict[int, Host] = {}
        self.blind: set[int] = set()
        self.cuts: dict[tuple[int, int], int] = {}
        self.views: dict[int, View] = {}
        self.votes: dict[tuple[int, int], set[str]] = {}
        self.commits: list[tuple[float, int, int]] = []
        self.late = 0
        self.log: list[str] = []
        self.start(0, "").step = 0
        self.places[0].member.found(self.places[0].now)
        self.places[0].flush()
        for place in range(1, self.hosts):
            self.start(place, "h0")

    # Time.

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        """Does `act` in `delay_s`."""
        self.count += 1
        heapq.heappush(self.events, (self.now + delay_s, self.count, act))

    def run(self, until: float, stop: Callable[[], bool] = lambda: False) -> bool:
        """Goes on until then, or until `stop`; whether it stopped."""
        while self.events and self.events[0][0] <= until:
            self.now, _, act = heapq.heappop(self.events)
            act()
            if self.count > MOST_EVENTS:
                self.wrong("a storm: hosts answer each other without end")
            if stop():
                return True
        self.now = until
        return False

    def note(self, line: str) -> None:
        """Remembers a line of the story."""
        self.log.append(f"{self.now:8.3f} {line}")
        if self.loud:
            print(self.log[-1])

    # Hosts.

    def start(self, place: int, through: str) -> Host:
        """A new process at `place`."""
        nonce = self.places[place].nonce + 1 if place in self.places else 0
        host = self.places[place] = Host(self, place, nonce, through, self.now)
        if through:
            self.note(f"{host.name} starts, joins through {through}")
            host.member.join(through, host.now)
            host.flush()
        self.after(self.random.uniform(0, 0.1), lambda: self.tick(host))
        return host

    def tick(self, host: Host) -> None:
        """A host's own loop."""
        if not host.alive:
            return
        if host.frozen:
            host.waiting.insert(0, lambda: self.tick(host))
            return
        host.member.tick(host.now)
        host.flush()
        if self.random.random() < 0.4:
            host.vote()
        self.after(self.rules.beat_s / 2, lambda: self.tick(host))

    def kill(self, place: int) -> None:
        """The process is gone; some of the others' transports notice."""
        host = self.places[place]
        if not host.alive:
            return
        self.note(f"{host.name} dies")
        host.alive, host.view = False, None
        for other in self.places.values():
            if other.alive and self.random.random() < self.told:
                self._tell_lost(other, host)

    def _tell_lost(self, host: Host, gone: Host) -> None:
        if (gone.place, host.place) in self.cuts or (host.place, gone.place) in self.cuts:
            return

        def tell() -> None:
            host.member.lost(gone.name, host.now)
            host.flush()

        # A connection's end comes after what was sent on it.
        self.after(self.delay_s[1], lambda: self._reach(host, tell))

    def freeze(self, place: int) -> None:
        """The process stands still."""
        self.note(f"{self.places[place].name} freezes")
        self.places[place].frozen = True

    def wake(self, host: Host) -> None:
        """The process goes on, with all that came meanwhile."""
        if not host.frozen or not host.alive:
            return
        self.note(f"{host.name} wakes")
        host.frozen = False
        waiting, host.waiting = host.waiting, []
        if self.random.random() < 0.5:
            waiting = waiting[1:] + waiting[:1]
        for act in waiting:
            act()

    def out(self, host: Host, change: Fenced | Left) -> None:
        """A member that is out; a fenced one comes back as a new one."""
        host.alive, host.view = False, None
        if isinstance(change, Fenced):
            self.after(self.random.uniform(0.2, 1.0), lambda: self.restart(host.place))

    def restart(self, place: int) -> None:
        """A new process there, which asks some other place to be let in."""
        if self.places[place].alive:
            return
        others = [p for p, host in self.places.items() if p != place and host.alive]
        if others:
            host = self.start(place, f"h{self.random.choice(others)}")
            self.after(4.0, lambda: self.ask_another(host))

    def ask_another(self, host: Host) -> None:
        """A supervisor that is not let in asks somebody else, as a new member."""
        if host.alive and not host.frozen and not host.fenced and host.member.view is None:
            if host.member._through:
                host.alive = False
                self.restart(host.place)
            return

    # The network.

    def _reach(self, host: Host, act: Callable[[], None]) -> None:
        if host.alive and host.frozen:
            host.waiting.append(lambda: self._reach(host, act))
        elif host.alive:
            act()

    def post(self, sender: Host, to: str, message: dict[str, Any]) -> None:
        """A message on its way: late, lost, doubled or stopped by a cut."""
        place = int(to[1:].partition("#")[0])
        if (sender.place, place) in self.cuts or self.random.random() < self.loss:
            return
        for _ in range(1 + (self.random.random() < self.twice)):
            delay = self.random.uniform(*self.delay_s)
            self.after(delay, lambda: self.arrive(sender, to, place, message))

    def arrive(self, sender: Host, to: str, place: int, message: dict[str, Any]) -> None:
        """Takes a message in where it was sent to."""
        host = self.places[place]
        if (sender.place, place) in self.cuts:
            return
        if not host.alive or ("#" in to and host.name != to):
            if sender.alive and self.random.random() < self.told:
                gone = host if host.name == to else None
                if gone:
                    self._tell_lost(sender, gone)
            return

        def act() -> None:
            if "generation" in message:
                host.take(sender.name, message)
            else:
                host.member.hear(sender.name, message, host.now)
                host.flush()

        self._reach(host, act)

    def cut(self, pairs: list[tuple[int, int]], for_s: float | None) -> None:
        """Stops all messages from the first of each pair to the second."""
        self.note(f"cut {pairs} for {for_s} s")
        for pair in pairs:
            self.cuts[pair] = self.cuts.get(pair, 0) + 1
        if for_s is not None:
            self.after(for_s, lambda: self.heal(pairs))

    def heal(self, pairs: list[tuple[int, int]]) -> None:
        """Takes a cut back."""
        for pair in pairs:
            left = self.cuts.get(pair, 0) - 1
            if left > 0:
                self.cuts[pair] = left
            else:
                self.cuts.pop(pair, None)

    # What must hold.

    def wrong(self, what: str) -> None:
        """Stops the run: an invariant broke."""
        raise Wrong(f"seed {self.seed}, {self.now:.3f} s: {what}")

    def entered(self, host: Host, view: View) -> None:
        """(3) An active view's number is its own; who enters is in it."""
        known = self.views.setdefault(view.number, view)
        if known != view:
            self.wrong(f"two views of one number: {known} and {view}")
        if host.name not in view.hosts:
            self.wrong(f"{host.name} entered {view} without being in it")

    def voted(self, host: Host, view: View, step: int) -> None:
        """(1, 2) When the last host has voted: commits are in order of generation and step.

        A host that was frozen may add the last vote to those that the others gave before they went
        on: it alone learns, for a second time, a step that the younger generation has done again.
        """
        votes = self.votes.setdefault((view.number, step), set())
        if host.name in votes:
            return
        votes.add(host.name)
        if votes != set(view.hosts):
            return
        _, generation, last = self.commits[-1] if self.commits else (0.0, 0, 0)
        if view.number < generation and step <= last and not self.all_in(view):
            self.late += 1
            return
        if view.number < generation:
            self.wrong(
                f"generation {view.number} commits step {step} after {generation} did {last}"
            )
        redone = step == last and view.number > generation
        if step != last + 1 and not redone:
            self.wrong(f"generation {view.number} commits step {step} after step {last}")
        self.commits.append((self.now, view.number, step))

    def all_in(self, view: View) -> bool:
        """Whether every host of `view` is alive and works in it now."""
        here = [self.places[int(name[1:].partition("#")[0])] for name in view.hosts]
        return all(host.alive and host.name in view.hosts and host.view == view for host in here)

    def learned(self, host: Host) -> None:
        """Nobody knows a step that was not committed."""
        assert host.step is not None
        if not self.commits or host.step > self.commits[-1][2]:
            self.wrong(f"{host.name} learned step {host.step}, which is not committed")

    # How it ends.

    def alive(self) -> list[Host]:
        """Hosts whose process runs and is awake."""
        return [host for host in self.places.values() if host.alive and not host.frozen]

    def can_go_on(self) -> bool:
        """Whether those alive are a legitimate set and one of them has the state."""
        here = {host.name: host for host in self.alive()}
        last = self.commits[-1][2] if self.commits else 0
        steps = [host.step for host in here.values() if host.step is not None]
        if max(steps, default=-1) < last - 1:
            return False
        if self.slate:
            view = self.slate.view
            return view is not None and bool(set(view.hosts) & set(here))
        newest = self.views[max(self.views)]
        if not newest.has_quorum(here):
            return False
        promises: dict[str, Any] = {
            name: Told(host.member._votes.formed, tuple(host.member._votes.attempts.values()))
            for name, host in here.items()
        }
        return obstacle(promises) is None


@dataclass
class Told:
    """What the oracle reads off a host."""

    formed: View | None
    attempts: tuple[View, ...]


def pairs_between(some: Collection[int], others: Collection[int]) -> list[tuple[int, int]]:
    """Both directions between two sets of places."""
    return [(a, b) for a in some for b in others] + [(b, a) for a in some for b in others]


def inject(world: World) -> None:
    """One fault, at random."""
    draw = world.random
    places = list(world.places)
    place = draw.choice(places)
    host = world.places[place]
    kind = draw.choice(
        ["kill", "kill", "freeze", "freeze", "split", "split", "one way", "leave", "call", "call",
         "reset", "restart", "blind", "kill leader", "storm"]
    )  # fmt: skip
    if kind == "kill leader":
        leaders = [h.place for h in world.alive() if h.view and h.view.leader == h.name]
        place, kind = (leaders or [place])[0], "kill"
    if kind == "kill":
        world.kill(place)
        if draw.random() < 0.7:
            world.after(draw.choice([0.05, 1.0, 5.0]), lambda: world.restart(place))
    elif kind == "freeze" and host.alive:
        world.freeze(place)
        world.after(draw.choice([0.3, 1.2, 3.0, 8.0, 20.0]), lambda: world.wake(host))
    elif kind == "split":
        side = draw.sample(places, draw.randint(1, max(1, len(places) - 1)))
        others = [p for p in places if p not in side]
        world.cut(pairs_between(side, others), draw.choice([0.5, 3.0, 3.0, 30.0]))
    elif kind == "one way":
        pairs = [p for p in pairs_between(places, places) if p[0] != p[1] and draw.random() < 0.2]
        world.cut(list(dict.fromkeys(pairs)), draw.choice([0.5, 3.0, 30.0]))
    elif kind == "leave" and host.alive and not host.frozen:
        holders = [h for h in world.alive() if h.step is not None and h is not host and h.view]
        if holders:
            world.note(f"{host.name} wants to leave")
            host.member.leave(host.now)
            host.flush()
            world.after(draw.choice([3.0, 9.0]), lambda: world.restart(place))
    elif kind == "call" and host.alive and not host.frozen:
        host.member.call({"event": "worker_died", "host": host.name}, host.now)
        host.flush()
    elif kind == "reset":
        for other in world.alive():
            if other is not host and draw.random() < 0.5:
                world._tell_lost(other, host)
    elif kind == "restart":
        world.restart(place)
    elif kind == "blind":
        world.blind.add(place)
        world.after(draw.choice([1.0, 10.0]), lambda: world.blind.discard(place))
    elif kind == "storm":
        before, world.loss = world.loss, 0.3
        world.after(3.0, lambda: setattr(world, "loss", min(before, 0.05)))


def schedule(seed: int, loud: bool = False) -> tuple[World, str]:
    """Plays the seed's schedule; how it ended: on, blocked (rightly), or Wrong is raised."""
    draw = random.Random(~seed)
    world = World(
        seed, draw.randint(2, 7), witness=draw.random() < 0.4, loud=loud,
        delay_s=draw.choice([(0.0005, 0.002), (0.001, 0.05), (0.001, 0.3)]),
        loss=draw.choice([0.0, 0.01, 0.05]), told=draw.choice([0.0, 0.5, 1.0]),
    )  # fmt: skip
    time = draw.choice([0.0, 2.0, 4.0])
    for _ in range(draw.randint(1, 8)):
        time += draw.choice([0.02, 0.1, 0.5, 2.0, 5.0])
        world.after(time, lambda: inject(world))
    world.run(time + draw.choice([1.0, 4.0, 10.0]))
    world.cuts.clear()
    world.blind.clear()
    world.loss = min(world.loss, 0.01)
    for host in list(world.places.values()):
        world.wake(host)
    world.note("healed")
    had = len(world.commits)
    world.random = random.Random(seed ^ 0xABCD)
    for _ in range(int(BOUND_S / 0.5)):
        if world.run(world.now + 0.5, lambda: len(world.commits) >= had + 4):
            return world, "on"
        if not world.can_go_on():
            world.run(world.now + 3.0)
            if not world.can_go_on():
                return world, "blocked"
    says = {host.name: host.member.says for host in world.alive()}
    raise Wrong(f"seed {seed}: nothing was committed {BOUND_S} s after all was whole: {says}")


def main() -> None:
    """Replays one seed, or finds the first of many that fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=300)
    given = parser.parse_args()
    if given.seed is not None:
        world, end = schedule(given.seed, loud=True)
        print(end, {host.name: host.member.says for host in world.places.values()})
        return
    ends: dict[str, int] = {}
    for seed in range(given.seeds):
        try:
            end = schedule(seed)[1]
        except Wrong as error:
            print(error, f"\n  python -m tests.paper.simulated --seed {seed}")
            end = "wrong"
        ends[end] = ends.get(end, 0) + 1
    print(ends)


if __name__ == "__main__":
    main()
