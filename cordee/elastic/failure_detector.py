"""Who is around: deadlines from what was observed, who is silent beyond one, and who hears whom.

Everything counts on the observer's own monotonic seconds, and only while the observer was awake: a
host that was frozen or starved itself must not find that all the others were silent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from cordee.elastic.views import View

Heartbeat = Mapping[str, Any]

MAD_TO_STD = 1.4826
"""From a median absolute deviation to a standard deviation, for normal noise."""
WINDOW_SIZE, MIN_SAMPLES = 64, 5
LONGEST_GAP_FACTOR = 2.0
"""A host that was unheard for so long, and lived, may be unheard for that many times as long."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds by which hosts judge each other. A heartbeat deadline lies in [least_s, silence_s].

    `heartbeat_interval_s` is the time between heartbeats and between retries; `election_stagger_s`
    is how much later the next host by seniority stands for election.
    """

    max_silence_s: float = 5.0
    min_silence_s: float = 1.0
    heartbeat_interval_s: float = 0.2
    election_stagger_s: float = 0.4


class AdaptiveTimeout:
    """A deadline in seconds for something that recurs: median + `k` deviations of the last 64.

    The deviation is the median absolute one, so that a few outliers (a freeze, a pause) move
    nothing; unless the deadline is not to be less than `longest_factor` times the longest of them.
    """

    def __init__(
        self,
        min_s: float,
        max_s: float = float("inf"),
        k: float = 10.0,
        longest_factor: float = 0.0,
    ) -> None:
        self._min_s, self._max_s, self._k, self._longest_factor = min_s, max_s, k, longest_factor
        self._samples: deque[float] = deque(maxlen=WINDOW_SIZE)
        self._deadline_s: float | None = None

    def add_sample(self, duration_s: float) -> None:
        """One more observation: a gap between two heartbeats, or how long a phase took."""
        self._samples.append(duration_s)
        self._deadline_s = None

    @property
    def deadline_s(self) -> float | None:
        """None before 5 observations."""
        if self._deadline_s is None and len(self._samples) >= MIN_SAMPLES:
            median_s = median(self._samples)
            deviation_s = MAD_TO_STD * median(abs(sample - median_s) for sample in self._samples)
            estimate_s = max(
                median_s + self._k * deviation_s, self._longest_factor * max(self._samples)
            )
            self._deadline_s = min(max(estimate_s, self._min_s), self._max_s)
        return self._deadline_s


class FailureDetector:
    """When each host was last heard, on a clock that stands still while this host sleeps."""

    def __init__(self, timeouts: Timeouts) -> None:
        self.clock_s = 0.0
        self._timeouts = timeouts
        self._last_now_s: float | None = None
        self._last_heard_s: dict[str, float] = {}
        self._last_heartbeat_s: dict[str, float] = {}
        self._gap_timeouts: dict[str, AdaptiveTimeout] = {}
        self._connection_lost_s: dict[str, float] = {}

    def advance(self, now: float) -> None:
        """Moves the clock to `now`; a jump counts for no more than half the shortest
        deadline."""
        if self._last_now_s is not None:
            self.clock_s += min(max(now - self._last_now_s, 0.0), self._timeouts.min_silence_s / 2)
        self._last_now_s = now

    def on_message(self, host: str, is_heartbeat: bool) -> None:
        """Something came from `host`; heartbeats also teach how far apart they come."""
        self._last_heard_s[host] = self.clock_s
        self._connection_lost_s.pop(host, None)
        if is_heartbeat:
            previous_s = self._last_heartbeat_s.get(host)
            self._last_heartbeat_s[host] = self.clock_s
            if previous_s is not None:
                timeouts, longest_factor = self._timeouts, LONGEST_GAP_FACTOR
                new_timeout = AdaptiveTimeout(
                    timeouts.min_silence_s, timeouts.max_silence_s, longest_factor=longest_factor
                )
                gap_timeout = self._gap_timeouts.setdefault(host, new_timeout)
                gap_timeout.add_sample(self.clock_s - previous_s)

    def expect(self, hosts: Iterable[str]) -> None:
        """From now on `hosts` are listened for: their silence counts from here."""
        self._last_heard_s |= dict.fromkeys(hosts, self.clock_s)

    def on_connection_lost(self, host: str) -> bool:
        """The transport lost `host`; True: ask again (the second time it is gone)."""
        if host in self._connection_lost_s:
            self._last_heard_s[host] = self._connection_lost_s[host] = float("-inf")
            return False
        self._connection_lost_s[host] = self.clock_s
        return True

    def is_alive(self, host: str) -> bool:
        """Whether `host` was heard (or is expected) and not too long ago."""
        return host in self._last_heard_s and not self.is_silent(host)

    def deadline_s(self, host: str) -> float:
        """How long `host` may be silent: two beats once its connection is lost.

        Before its own gaps say, twice the least: beats are sent every `beat_s`, and a host that
        was given up too early comes back.
        """
        if host in self._connection_lost_s:
            return 2 * self._timeouts.heartbeat_interval_s
        gap_timeout = self._gap_timeouts.get(host)
        observed_deadline_s = gap_timeout.deadline_s if gap_timeout else None
        return observed_deadline_s or min(
            2 * self._timeouts.min_silence_s, self._timeouts.max_silence_s
        )

    def silence_s(self, host: str) -> float:
        """For how long nothing came from `host` (since its connection was lost, if it was)."""
        return self.clock_s - max(
            self._last_heard_s.get(host, 0.0), self._connection_lost_s.get(host, 0.0)
        )

    def is_silent(self, host: str) -> bool:
        """Whether `host` has been silent beyond its deadline."""
        return self.silence_s(host) > self.deadline_s(host)

    def silence_reason(self, host: str) -> str:
        """The end of a sentence about `host`'s silence."""
        if host in self._connection_lost_s:
            return "connection lost and not taken up again"
        if self.is_silent(host):
            return (
                f"silent for {self.silence_s(host):.1f} s, deadline {self.deadline_s(host):.1f} s"
            )
        return f"no answer or no way back within {self.deadline_s(host):.1f} s"

    def retain_only(self, hosts: Iterable[str]) -> None:
        """Forgets all but `hosts`."""
        host_set = set(hosts)
        for table in (
            self._last_heard_s,
            self._last_heartbeat_s,
            self._gap_timeouts,
            self._connection_lost_s,
        ):
            for host in [host for host in table if host not in host_set]:
                del table[host]


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
        """Whether one of `hosts` wants a view after `number`, or has ended that one and waits."""
        heartbeats = [self._heartbeats[host] for host in hosts if host in self._heartbeats]
        return any(
            (heartbeat["wants"] and heartbeat["view"] == number) or heartbeat["halted"] >= number
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
