"""Which layouts of some devices are worth a prediction, and the others' reasons, grouped.

Degrees of each axis are tried alone first, so that what no combination repairs is dropped once and
named once. Not here: predictions and ranks (`run_search.py`). Traded away: a few layouts that run
and are never quick (tensor ranks on several hosts, short chunks of a sequence, cuts on a part of
the devices); a layout that the user gives is planned all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cordee.config.run import LayoutSettings, Run
from cordee.layout.axes import MODEL_AXES, Layout
from cordee.layout.counts import TensorCounts
from cordee.layout.validate import Violation, degree_violations
from cordee.planner.cluster import Cluster
from cordee.planner.devices import single_device_reason

FULL_SEARCH_SIZE = 8
"""Numbers of processes up to this are in the table also where there are fewer cores."""

MIN_CONTEXT_CHUNK = 128
"""Positions that a chunk of a sequence should have at least: attention's own chunks."""


@dataclass(frozen=True)
class Rejection:
    """Layouts that are out for one reason, and that reason."""

    layout: str
    reason: str


@dataclass
class Rejections:
    """Collects why layouts are out: by rule and degree, or that they do not fit."""

    degrees_by_rule: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    misfits_by_size: dict[int, list[tuple[int, str, str]]] = field(default_factory=dict)

    def add_violation(self, violation: Violation, layout: Layout) -> None:
        """`make_file_layout` breaks `violation`."""
        degree = layout.dp_size if violation.axis == "workers" else getattr(layout, violation.axis)
        self.add_degree(violation.axis, violation.clause, degree)

    def add_degree(self, axis: str, clause: str, degree: int) -> None:
        """`degree` of `axis` is out."""
        self.degrees_by_rule.setdefault((axis, clause), set()).add(degree)

    def add_misfit(self, layout: Layout, reason: str, needed_bytes: int) -> None:
        """`layout` does not fit."""
        self.misfits_by_size.setdefault(layout.size, []).append(
            (needed_bytes, layout.describe(), reason)
        )

    def summarize(self) -> Iterator[Rejection]:
        """One line for each rule, and for what does not fit one for each number of ranks."""
        for (axis, clause), degrees in self.degrees_by_rule.items():
            text = numbers_text(degrees)
            yield Rejection(f"{text} workers" if axis == "workers" else f"{axis} {text}", clause)
        for size, misfits in sorted(self.misfits_by_size.items()):
            _, smallest, reason = min(misfits)
            if len(misfits) == 1:
                yield Rejection(smallest, reason)
            else:
                text = f"{len(misfits)} layouts of {size} rank{'s' if size > 1 else ''}"
                yield Rejection(text, f"the smallest, {smallest}, {reason}")


def candidate_layouts(
    settings: LayoutSettings,
    domains: Mapping[str, Sequence[int]],
    sizes: Sequence[int],
    is_second_pass: bool,
) -> Iterator[Layout]:
    """Layouts, fewest ranks first, consistent with the degrees given.

    Without degrees given, all axes are combined on up to ON_PAPER ranks and on the largest number,
    islands and shards on the others; `is_second_pass`: what that leaves out.
    """
    degrees = {
        axis: getattr(settings, axis) for axis in MODEL_AXES if getattr(settings, axis) != "auto"
    }
    if degrees or settings.islands != "auto":
        for size in sizes if not is_second_pass else ():
            yield from _requested_layout(settings.islands, degrees, size)
        return
    shard_domains = {**dict.fromkeys(MODEL_AXES, (1,)), "shard": domains["shard"]}
    for size in sizes:
        is_full_search = size <= FULL_SEARCH_SIZE or size == sizes[-1]
        if not is_second_pass:
            yield from _degree_products(domains if is_full_search else shard_domains, size)
        elif not is_full_search:
            layouts = _degree_products(domains, size)
            yield from (layout for layout in layouts if layout.island * layout.shard < layout.size)


def axis_domains(
    run: Run,
    cluster: Cluster,
    tensor_counts: TensorCounts,
    sizes: Sequence[int],
    rejections: Rejections,
) -> dict[str, list[int]]:
    """Degrees of every axis inside an island that divide one of `sizes`, are legal alone and worth
    a try."""
    degrees = sorted({d for size in sizes for d in divisors(size)} - {1})
    domains: dict[str, list[int]] = {}
    for axis in MODEL_AXES:
        domains[axis] = [1]
        for degree in degrees:
            layout = Layout(**{axis: degree})
            rules = [
                rule for rule in degree_violations(run, layout, tensor_counts) if rule.axis == axis
            ]
            if clause := rules[0].clause if rules else _slow_reason(run, cluster, axis, degree):
                rejections.add_degree(axis, clause, degree)
            else:
                domains[axis].append(degree)
    return domains


def world_sizes(cluster: Cluster) -> list[int]:
    """Numbers of ranks to consider: all small ones, powers of two, divisors of all devices."""
    slots = cluster.slots
    max_size = max(slots, FULL_SEARCH_SIZE) if cluster.device == "cpu" else slots
    powers = {1 << k for k in range(max_size.bit_length())}
    sizes = set(range(1, min(max_size, FULL_SEARCH_SIZE) + 1)) | powers | set(divisors(slots))
    return sorted(size for size in sizes if size <= max_size)


def divisors(count: int) -> list[int]:
    """All divisors of `count`, in order."""
    small_divisors = [d for d in range(1, int(count**0.5) + 1) if count % d == 0]
    return sorted({*small_divisors, *(count // d for d in small_divisors)})


def numbers_text(values: set[int]) -> str:
    """Different numbers as text: all when they are few, else the first and last."""
    numbers = sorted(values)
    if len(numbers) > 6:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _requested_layout(
    islands: int | str, degrees: Mapping[str, int], size: int
) -> Iterator[Layout]:
    """The one layout of `size` ranks with these degrees, if there is one; others are 1."""
    island_layout = Layout(**degrees)
    island_count, remainder = divmod(size, island_layout.size)
    if remainder == 0 and island_count and islands in ("auto", island_count):
        yield Layout(**{**degrees, "island": island_count})


def _slow_reason(run: Run, cluster: Cluster, axis: str, degree: int) -> str:
    """Why a legal degree is not tried."""
    if reason := single_device_reason(cluster):
        return reason
    if axis == "tensor" and cluster.device != "cpu" and degree > cluster.devices:
        return f"is never quick beyond the {cluster.devices} devices of a host: not tried"
    if axis == "context" and run.data.sequence < 2 * degree * MIN_CONTEXT_CHUNK:
        return f"is never quick in chunks below {MIN_CONTEXT_CHUNK} positions: not tried"
    return ""


def _degree_products(domains: Mapping[str, Sequence[int]], size: int) -> Iterator[Layout]:
    """Every product of degrees that divides `size`; islands are the rest."""
    choices: list[dict[str, int]] = [{}]
    quotients = [size]
    for axis in reversed(MODEL_AXES):
        next_choices: list[dict[str, int]] = []
        next_quotients: list[int] = []
        for index, degrees in enumerate(choices):
            for degree in domains[axis]:
                if quotients[index] % degree == 0:
                    next_quotients.append(quotients[index] // degree)
                    next_choices.append({**degrees, axis: degree})
        choices, quotients = next_choices, next_quotients
    for index, degrees in enumerate(choices):
        yield Layout(**{**degrees, "island": quotients[index]})
