"""How long is too long: deadlines from what was observed, and who has been silent beyond one.

Everything counts on the observer's own monotonic seconds, and only while the observer was awake: a
host that was frozen or starved itself must not find that all the others were silent. Not here: what
a silence leads to (`members.py`). Traded away: the newest trend; the median of 64 gaps is slow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

SPREAD = 1.4826
"""From a median absolute deviation to a standard deviation, for normal noise."""
KEPT, ENOUGH = 64, 5
TIMES_LONGEST = 2.0
"""A host that was unheard for so long, and lived, may be unheard for that many times as long."""


@dataclass(frozen=True)
class Rules:
    """Seconds by which hosts judge each other. A heartbeat deadline lies in [least_s, silence_s].

    `beat_s` is the time between heartbeats and between retries; `stagger_s` is how much later the
    next host by seniority stands for election.
    """

    silence_s: float = 5.0
    least_s: float = 1.0
    beat_s: float = 0.2
    stagger_s: float = 0.4


class Pace:
    """A deadline in seconds for something that recurs: median + `k` deviations of the last 64.

    The deviation is the median absolute one, so that a few outliers (a freeze, a pause) move
    nothing; unless the deadline is not to be less than `longest` times the longest of them.
    """

    def __init__(
        self, least_s: float, most_s: float = float("inf"), k: float = 10.0, longest: float = 0.0
    ) -> None:
        self._least_s, self._most_s, self._k, self._longest = least_s, most_s, k, longest
        self._seen: deque[float] = deque(maxlen=KEPT)
        self._deadline_s: float | None = None

    def feed(self, duration_s: float) -> None:
        """One more observation: a gap between two heartbeats, or how long a phase took."""
        self._seen.append(duration_s)
        self._deadline_s = None

    @property
    def deadline_s(self) -> float | None:
        """None before 5 observations."""
        if self._deadline_s is None and len(self._seen) >= ENOUGH:
            middle = median(self._seen)
            spread = SPREAD * median(abs(seen - middle) for seen in self._seen)
            usual_s = max(middle + self._k * spread, self._longest * max(self._seen))
            self._deadline_s = min(max(usual_s, self._least_s), self._most_s)
        return self._deadline_s


class Ears:
    """When each host was last heard, on a clock that stands still while this host sleeps."""

    def __init__(self, rules: Rules) -> None:
        self.clock = 0.0
        self._rules = rules
        self._now: float | None = None
        self._heard: dict[str, float] = {}
        self._beats: dict[str, float] = {}
        self._paces: dict[str, Pace] = {}
        self._lost: dict[str, float] = {}

    def advance(self, now: float) -> None:
        """Moves the clock to `now`; a jump counts for no more than half the shortest deadline."""
        if self._now is not None:
            self.clock += min(max(now - self._now, 0.0), self._rules.least_s / 2)
        self._now = now

    def hear(self, host: str, beat: bool) -> None:
        """Something came from `host`; heartbeats also teach how far apart they come."""
        self._heard[host] = self.clock
        self._lost.pop(host, None)
        if beat:
            before = self._beats.get(host)
            self._beats[host] = self.clock
            if before is not None:
                rules, longest = self._rules, TIMES_LONGEST
                fresh = Pace(rules.least_s, rules.silence_s, longest=longest)
                pace = self._paces.setdefault(host, fresh)
                pace.feed(self.clock - before)

    def expect(self, hosts: Iterable[str]) -> None:
        """From now on `hosts` are listened for: their silence counts from here."""
        self._heard |= dict.fromkeys(hosts, self.clock)

    def lose(self, host: str) -> bool:
        """The transport lost `host`; True: ask again (the second time it is gone)."""
        if host in self._lost:
            self._heard[host] = self._lost[host] = float("-inf")
            return False
        self._lost[host] = self.clock
        return True

    def knows(self, host: str) -> bool:
        """Whether `host` was heard (or is expected) and not too long ago."""
        return host in self._heard and not self.silent(host)

    def deadline_s(self, host: str) -> float:
        """How long `host` may be silent: two beats once its connection is lost.

        Before its own gaps say, twice the least: beats are sent every `beat_s`, and a host that
        was given up too early comes back.
        """
        if host in self._lost:
            return 2 * self._rules.beat_s
        pace = self._paces.get(host)
        observed_s = pace.deadline_s if pace else None
        return observed_s or min(2 * self._rules.least_s, self._rules.silence_s)

    def silence_s(self, host: str) -> float:
        """For how long nothing came from `host` (since its connection was lost, if it was)."""
        return self.clock - max(self._heard.get(host, 0.0), self._lost.get(host, 0.0))

    def silent(self, host: str) -> bool:
        """Whether `host` has been silent beyond its deadline."""
        return self.silence_s(host) > self.deadline_s(host)

    def verdict(self, host: str) -> str:
        """The end of a sentence about `host`'s silence."""
        if host in self._lost:
            return "connection lost and not taken up again"
        if self.silent(host):
            return (
                f"silent for {self.silence_s(host):.1f} s, deadline {self.deadline_s(host):.1f} s"
            )
        return f"no answer or no way back within {self.deadline_s(host):.1f} s"

    def keep(self, hosts: Iterable[str]) -> None:
        """Forgets all but `hosts`."""
        kept = set(hosts)
        for table in (self._heard, self._beats, self._paces, self._lost):
            for host in [host for host in table if host not in kept]:
                del table[host]
