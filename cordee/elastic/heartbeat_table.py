"""Who is around, by their last heartbeats: who hears whom, who wants in, out or a new view.

Not here: silence and deadlines (`pace.py`), and what follows (`members.py`). Traded away: the best
set of hosts when many pairs are cut off from each other; the worst host goes first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cordee.elastic.failure_detector import FailureDetector
from cordee.elastic.views import View

Heartbeat = Mapping[str, Any]


class HeartbeatTable:
    """The latest heartbeat of each host, and the hosts that ask to join (kept by a leader)."""

    def __init__(self, own_id: str, detector: FailureDetector) -> None:
        self.own_id, self.detector = own_id, detector
        self.joiners: list[str] = []
        self._heartbeats: dict[str, Heartbeat] = {}
        self._muted_until_s: dict[str, float] = {}

    def record(self, sender: str, heartbeat: Heartbeat) -> Heartbeat | None:
        """Keeps `heartbeat`; gives the one before ({}: the first), or None when this one is not
        news."""
        previous = self._heartbeats.get(sender, {})
        if previous and heartbeat["beat"] <= previous["beat"]:
            return None
        self.detector.on_message(sender, is_heartbeat=True)
        self._heartbeats[sender] = heartbeat
        return previous

    def peers(self, known_hosts: Sequence[str], view: View | None, join_address: str) -> list[str]:
        """Whom to send heartbeats: all known, those to be met, and while joining all who answer."""
        targets = dict.fromkeys([*known_hosts, *self.joiners])
        if join_address:
            responders = [host for host in self._heartbeats if self.detector.is_alive(host)]
            targets |= dict.fromkeys(responders)
            if not any(host.startswith(join_address) for host in responders):
                targets[join_address] = None
        elif view and view.leader in self._heartbeats:
            targets |= dict.fromkeys(self._heartbeats[view.leader]["meet"])
        targets.pop(self.own_id, None)
        return list(targets)

    def mute(self, hosts: Collection[str], for_s: float) -> None:
        """Counts `hosts` as gone for some time: they send heartbeats but do not answer."""
        self._muted_until_s |= dict.fromkeys(hosts, self.detector.clock_s + for_s)

    def is_leaving(self, host: str) -> bool:
        """Whether another host wants out."""
        return (
            host != self.own_id
            and host in self._heartbeats
            and bool(self._heartbeats[host]["leaving"])
        )

    def can_hear(self, listener: str, host: str, view: View | None) -> bool:
        """Whether `listener` said (in `view`, if there is one) that it hears `host`."""
        heartbeat = self._heartbeats.get(listener)
        if heartbeat is None or (view and heartbeat["view"] != view.number):
            return True
        return host in heartbeat["hears"]

    def unreachable_hosts(self, known_hosts: Sequence[str], view: View | None) -> list[str]:
        """Known hosts that this one cannot work with; a leader also parts pairs cut apart."""
        other_hosts = [host for host in known_hosts if host != self.own_id]
        lost_hosts = [
            host
            for host in other_hosts
            if self.detector.is_silent(host)
            or self._muted_until_s.get(host, 0.0) > self.detector.clock_s
            or not self.can_hear(host, self.own_id, view)
        ]
        remaining_hosts = [host for host in other_hosts if host not in lost_hosts]
        while view and view.leader == self.own_id and remaining_hosts:
            cut_counts = {
                host: self._count_cut_links(host, remaining_hosts, view) for host in remaining_hosts
            }
            worst_host = max(reversed(remaining_hosts), key=lambda host: cut_counts[host])
            if not cut_counts[worst_host]:
                break
            remaining_hosts.remove(worst_host)
            lost_hosts.append(worst_host)
        return lost_hosts

    def _count_cut_links(self, host: str, remaining_hosts: Sequence[str], view: View) -> int:
        """With how many of `remaining_hosts` the way is not free in both directions."""
        return sum(
            not (self.can_hear(host, other, view) and self.can_hear(other, host, view))
            for other in remaining_hosts
            if other != host
        )

    def admissible_joiners(self, staying_hosts: Sequence[str]) -> list[str]:
        """Joiners that have heard all who stay and were heard by them: they can do no harm."""
        self.joiners = [host for host in self.joiners if not self.detector.is_silent(host)]
        return [
            joiner
            for joiner in self.joiners
            if all(self._is_admissible(joiner, h) for h in staying_hosts)
        ]

    def _is_admissible(self, joiner: str, host: str) -> bool:
        if joiner not in self._heartbeats or host not in self._heartbeats[joiner]["hears"]:
            return False
        if host == self.own_id:
            return self.detector.is_alive(joiner)
        return host in self._heartbeats and joiner in self._heartbeats[host]["hears"]

    def needs_new_view(self, hosts: Sequence[str], number: int) -> bool:
        """Whether one of `hosts` wants a view after `number`, or promised past it and is
        stuck."""
        heartbeats = [self._heartbeats[host] for host in hosts if host in self._heartbeats]
        return any(
            (heartbeat["wants"] and heartbeat["view"] == number) or heartbeat["promised"] > number
            for heartbeat in heartbeats
        )

    def is_leader_healthy(self, view: View) -> bool:
        """Whether the leader of `view` is heard, works in it and stays."""
        heartbeat = self._heartbeats.get(view.leader)
        is_healthy = (
            heartbeat is not None and heartbeat["view"] == view.number and not heartbeat["leaving"]
        )
        return is_healthy and not self.detector.is_silent(view.leader)

    def install_view(self, view: View) -> None:
        """A new view: everybody in it is listened for from now on, all others are forgotten."""
        self.joiners = [host for host in self.joiners if host not in view.hosts]
        self._muted_until_s.clear()
        host_set = {*view.hosts, *self.joiners}
        self.detector.retain_only(host_set)
        self.detector.expect(view.hosts)
        self._heartbeats = {
            host: heartbeat for host, heartbeat in self._heartbeats.items() if host in host_set
        }
