"""Which layouts of some devices are worth a prediction, and the others' reasons, grouped.

Degrees of each axis are tried alone first, so that what no combination repairs is dropped once and
named once. Not here: predictions and ranks (`search.py`). Traded away: a few layouts that run and
are never quick (tensor ranks on several hosts, short chunks of a sequence, cuts on a part of the
devices); a layout that the user gives is planned all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cordee.config.run import LayoutSettings, Run
from cordee.layout.axes import INSIDE, Layout
from cordee.layout.census import Census
from cordee.layout.legal import Broken, broken_alone
from cordee.plan.cluster import Cluster
from cordee.plan.devices import not_inside

ON_PAPER = 8
"""Numbers of processes up to this are in the table also where there are fewer cores."""

SHORT = 128
"""Positions that a chunk of a sequence should have at least: attention's own chunks."""


@dataclass(frozen=True)
class Rejected:
    """Layouts that are out for one reason, and that reason."""

    layout: str
    reason: str


@dataclass
class Reasons:
    """Collects why layouts are out: by rule and degree, or that they do not fit."""

    degrees: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    large: dict[int, list[tuple[int, str, str]]] = field(default_factory=dict)

    def note(self, rule: Broken, layout: Layout) -> None:
        """`layout` breaks `rule`."""
        degree = layout.workers if rule.axis == "workers" else getattr(layout, rule.axis)
        self.add(rule.axis, rule.why, degree)

    def add(self, axis: str, why: str, degree: int) -> None:
        """`degree` of `axis` is out."""
        self.degrees.setdefault((axis, why), set()).add(degree)

    def too_big(self, layout: Layout, reason: str, needed_bytes: int) -> None:
        """`layout` does not fit."""
        self.large.setdefault(layout.size, []).append((needed_bytes, layout.describe(), reason))

    def lines(self) -> Iterator[Rejected]:
        """One line for each rule, and for what does not fit one for each number of ranks."""
        for (axis, why), degrees in self.degrees.items():
            told = numbers(degrees)
            yield Rejected(f"{told} workers" if axis == "workers" else f"{axis} {told}", why)
        for size, found in sorted(self.large.items()):
            _, near, reason = min(found)
            if len(found) == 1:
                yield Rejected(near, reason)
            else:
                told = f"{len(found)} layouts of {size} rank{'s' if size > 1 else ''}"
                yield Rejected(told, f"the smallest, {near}, {reason}")


def candidates(
    wanted: LayoutSettings,
    domains: Mapping[str, Sequence[int]],
    counts: Sequence[int],
    everything: bool,
) -> Iterator[Layout]:
    """Layouts, fewest ranks first, consistent with the degrees given.

    Without degrees given, all axes are combined on up to ON_PAPER ranks and on the largest number,
    islands and shards on the others; `everything`: what that leaves out.
    """
    given = {axis: getattr(wanted, axis) for axis in INSIDE if getattr(wanted, axis) != "auto"}
    if given or wanted.islands != "auto":
        for count in counts if not everything else ():
            yield from _as_given(wanted.islands, given, count)
        return
    few = {**dict.fromkeys(INSIDE, (1,)), "shard": domains["shard"]}
    for count in counts:
        combined = count <= ON_PAPER or count == counts[-1]
        if not everything:
            yield from _combined(domains if combined else few, count)
        elif not combined:
            layouts = _combined(domains, count)
            yield from (made for made in layouts if made.island * made.shard < made.size)


def all_domains(
    run: Run, cluster: Cluster, counted: Census, counts: Sequence[int], reasons: Reasons
) -> dict[str, list[int]]:
    """Degrees of every axis inside an island that divide one of `counts`, are legal alone and worth
    a try."""
    degrees = sorted({d for count in counts for d in divisors(count)} - {1})
    found: dict[str, list[int]] = {}
    for axis in INSIDE:
        found[axis] = [1]
        for degree in degrees:
            layout = Layout(**{axis: degree})
            rules = [rule for rule in broken_alone(run, layout, counted) if rule.axis == axis]
            if why := rules[0].why if rules else _never_quick(run, cluster, axis, degree):
                reasons.add(axis, why, degree)
            else:
                found[axis].append(degree)
    return found


def rank_counts(cluster: Cluster) -> list[int]:
    """Numbers of ranks to consider: all small ones, powers of two, divisors of all devices."""
    slots = cluster.slots
    most = max(slots, ON_PAPER) if cluster.device == "cpu" else slots
    powers = {1 << k for k in range(most.bit_length())}
    found = set(range(1, min(most, ON_PAPER) + 1)) | powers | set(divisors(slots))
    return sorted(count for count in found if count <= most)


def divisors(count: int) -> list[int]:
    """All divisors of `count`, in order."""
    small = [d for d in range(1, int(count**0.5) + 1) if count % d == 0]
    return sorted({*small, *(count // d for d in small)})


def numbers(counts: set[int]) -> str:
    """Different numbers as text: all when they are few, else the first and last."""
    found = sorted(counts)
    if len(found) > 6:
        return f"{found[0]} to {found[-1]}"
    return ", ".join(map(str, found))


def _as_given(islands: int | str, given: Mapping[str, int], count: int) -> Iterator[Layout]:
    """The one layout of `count` ranks with these degrees, if there is one; others are 1."""
    inside = Layout(**given)
    copies, left = divmod(count, inside.size)
    if left == 0 and copies and islands in ("auto", copies):
        yield Layout(**{**given, "island": copies})


def _never_quick(run: Run, cluster: Cluster, axis: str, degree: int) -> str:
    """Why a legal degree is not tried."""
    if why := not_inside(cluster):
        return why
    if axis == "tensor" and cluster.device != "cpu" and degree > cluster.devices:
        return f"is never quick beyond the {cluster.devices} devices of a host: not tried"
    if axis == "context" and run.data.sequence < 2 * degree * SHORT:
        return f"is never quick in chunks below {SHORT} positions: not tried"
    return ""


def _combined(domains: Mapping[str, Sequence[int]], count: int) -> Iterator[Layout]:
    """Every product of degrees that divides `count`; islands are the rest."""
    chosen: list[dict[str, int]] = [{}]
    left = [count]
    for axis in reversed(INSIDE):
        grown: list[dict[str, int]] = []
        rest: list[int] = []
        for place, degrees in enumerate(chosen):
            for degree in domains[axis]:
                if left[place] % degree == 0:
                    rest.append(left[place] // degree)
                    grown.append({**degrees, axis: degree})
        chosen, left = grown, rest
    for place, degrees in enumerate(chosen):
        yield Layout(**{**degrees, "island": left[place]})
