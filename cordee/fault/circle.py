"""Who is around, by their last heartbeats: who hears whom, who wants in, out or a new view.

Not here: silence and deadlines (`pace.py`), and what follows (`members.py`). Traded away: the best
set of hosts when many pairs are cut off from each other; the worst host goes first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cordee.fault.pace import Ears
from cordee.fault.views import View

Beat = Mapping[str, Any]


class Circle:
    """The latest heartbeat of each host, and the hosts that ask to join (kept by a leader)."""

    def __init__(self, me: str, ears: Ears) -> None:
        self.me, self.ears = me, ears
        self.joiners: list[str] = []
        self._beats: dict[str, Beat] = {}
        self._mute: dict[str, float] = {}

    def note(self, sender: str, beat: Beat) -> Beat | None:
        """Keeps `beat`; gives the one before ({}: the first), or None when this one is not news."""
        before = self._beats.get(sender, {})
        if before and beat["beat"] <= before["beat"]:
            return None
        self.ears.hear(sender, beat=True)
        self._beats[sender] = beat
        return before

    def peers(self, known: Sequence[str], view: View | None, through: str) -> list[str]:
        """Whom to send heartbeats: all known, those to be met, and while joining all who answer."""
        found = dict.fromkeys([*known, *self.joiners])
        if through:
            near = [host for host in self._beats if self.ears.knows(host)]
            found |= dict.fromkeys(near)
            if not any(host.startswith(through) for host in near):
                found[through] = None
        elif view and view.leader in self._beats:
            found |= dict.fromkeys(self._beats[view.leader]["meet"])
        found.pop(self.me, None)
        return list(found)

    def mute(self, hosts: Collection[str], for_s: float) -> None:
        """Counts `hosts` as gone for some time: they send heartbeats but do not answer."""
        self._mute |= dict.fromkeys(hosts, self.ears.clock + for_s)

    def leaves(self, host: str) -> bool:
        """Whether another host wants out."""
        return host != self.me and host in self._beats and bool(self._beats[host]["leaving"])

    def hears(self, listener: str, host: str, view: View | None) -> bool:
        """Whether `listener` said (in `view`, if there is one) that it hears `host`."""
        beat = self._beats.get(listener)
        if beat is None or (view and beat["view"] != view.number):
            return True
        return host in beat["hears"]

    def gone(self, known: Sequence[str], view: View | None) -> list[str]:
        """Known hosts that this one cannot work with; a leader also parts pairs cut apart."""
        others = [host for host in known if host != self.me]
        gone = [
            host
            for host in others
            if self.ears.silent(host)
            or self._mute.get(host, 0.0) > self.ears.clock
            or not self.hears(host, self.me, view)
        ]
        here = [host for host in others if host not in gone]
        while view and view.leader == self.me and here:
            cuts = {host: self._cuts(host, here, view) for host in here}
            worst = max(reversed(here), key=lambda host: cuts[host])
            if not cuts[worst]:
                break
            here.remove(worst)
            gone.append(worst)
        return gone

    def _cuts(self, host: str, here: Sequence[str], view: View) -> int:
        """With how many of `here` the way is not free in both directions."""
        return sum(
            not (self.hears(host, other, view) and self.hears(other, host, view))
            for other in here
            if other != host
        )

    def met(self, stays: Sequence[str]) -> list[str]:
        """Joiners that have heard all who stay and were heard by them: they can do no harm."""
        self.joiners = [host for host in self.joiners if not self.ears.silent(host)]
        return [joiner for joiner in self.joiners if all(self._met(joiner, h) for h in stays)]

    def _met(self, joiner: str, host: str) -> bool:
        if joiner not in self._beats or host not in self._beats[joiner]["hears"]:
            return False
        if host == self.me:
            return self.ears.knows(joiner)
        return host in self._beats and joiner in self._beats[host]["hears"]

    def wants(self, hosts: Sequence[str], number: int) -> bool:
        """Whether one of `hosts` wants a view after `number`, or promised past it and is stuck."""
        beats = [self._beats[host] for host in hosts if host in self._beats]
        return any((b["wants"] and b["view"] == number) or b["promised"] > number for b in beats)

    def is_well(self, view: View) -> bool:
        """Whether the leader of `view` is heard, works in it and stays."""
        beat = self._beats.get(view.leader)
        well = beat is not None and beat["view"] == view.number and not beat["leaving"]
        return well and not self.ears.silent(view.leader)

    def enter(self, view: View) -> None:
        """A new view: everybody in it is listened for from now on, all others are forgotten."""
        self.joiners = [host for host in self.joiners if host not in view.hosts]
        self._mute.clear()
        kept = {*view.hosts, *self.joiners}
        self.ears.keep(kept)
        self.ears.expect(view.hosts)
        self._beats = {host: beat for host, beat in self._beats.items() if host in kept}
