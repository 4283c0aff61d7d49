"""The mesh: degrees of its axes, and ranks to coordinates and back.

An island is a set of ranks that holds one copy of the model (a replica group). Its ranks are
neighbours in rank order, so that fast links stay inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cordee.config.ranges import Auto
from cordee.config.run import LayoutSettings
from cordee.errors import LayoutError

AXES = ("island", "pipeline", "context", "expert", "shard", "tensor")
"""Mesh axes, outermost first: ranks that differ in the last axis are next to each other."""

MODEL_AXES = AXES[1:]
"""Axes inside an island."""

DATA_AXES = ("island", "expert", "shard")
"""Axes whose ranks compute different microbatches, in the order in which those are dealt."""

SEQUENCE_AXES = ("context", "tensor")
"""Axes whose ranks share the positions of a sequence."""

STAGE_AXES = tuple(axis for axis in AXES if axis != "pipeline")
"""Axes along which all ranks have the same layers."""


@dataclass(frozen=True)
class Layout:
    """The degree of every axis. Each method is O(axes) but `groups`."""

    island: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees in the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def size(self) -> int:
        return math.prod(self.degrees)

    @property
    def dp_size(self) -> int:
        """Workers, groups of ranks that compute different microbatches: island x expert x shard."""
        return math.prod(getattr(self, axis) for axis in DATA_AXES)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of `rank` on each axis."""
        if not 0 <= rank < self.size:
            values = {"rank": rank, "ranks": self.size}
            fix = f"rank {min(max(rank, 0), self.size - 1)}"
            raise LayoutError("no such rank", values=values, fix=fix)
        position = {}
        for axis in reversed(AXES):
            rank, position[axis] = divmod(rank, getattr(self, axis))
        return {axis: position[axis] for axis in AXES}

    def rank(self, coordinates: Mapping[str, int]) -> int:
        """The rank at these coordinates; axes that are not named are 0."""
        rank = 0
        for axis in AXES:
            rank = rank * getattr(self, axis) + coordinates.get(axis, 0)
        return rank

    def dp_rank(self, rank: int) -> int:
        """Which share of the microbatches `rank` computes: by island, then expert, then shard."""
        coords, dp_rank = self.coordinates(rank), 0
        for axis in DATA_AXES:
            dp_rank = dp_rank * getattr(self, axis) + coords[axis]
        return dp_rank

    def stride(self, axis: str) -> int:
        """Ranks from one to its next neighbour on `axis`."""
        return math.prod(self.degrees[AXES.index(axis) + 1 :])

    def groups(self, axis: str) -> Iterator[tuple[int, ...]]:
        """The groups of ranks that differ only in `axis`, each in order of that axis."""
        degree = getattr(self, axis)
        for rank in range(self.size):
            coords = self.coordinates(rank)
            if coords[axis] == 0:
                yield tuple(self.rank({**coords, axis: index}) for index in range(degree))

    def describe(self) -> str:
        """As a person writes it: `2 islands x shard 2`, `one process`."""
        if self.size == 1:
            return "one process"
        degrees = {axis: getattr(self, axis) for axis in MODEL_AXES}
        texts = [f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1]
        return " x ".join([f"{self.island} island{'s' if self.island > 1 else ''}", *texts])


def resolve_degrees(settings: LayoutSettings, processes: Auto) -> Layout:
    """Fills every "auto": axes are 1, islands = processes / product of the axes.

    `processes` may be "auto" when islands are given or everything is 1. Raises LayoutError when the
    degrees do not divide the processes, naming the nearest that do.
    """
    degrees = {axis: _degree(getattr(settings, axis), f"layout.{axis}") for axis in MODEL_AXES}
    explicit_degrees = {f"layout.{axis}": degree for axis, degree in degrees.items() if degree > 1}
    product = math.prod(degrees.values())
    if settings.islands == "auto":
        process_count = product if processes == "auto" else int(processes)
        if process_count % product:
            nearest_count = max(1, round(process_count / product)) * product
            raise LayoutError(
                "the axes do not divide the processes",
                values={"launch.processes": process_count, **explicit_degrees, "product": product},
                fix=f"launch.processes={nearest_count}",
            )
        islands = process_count // product
    else:
        islands = _degree(settings.islands, "layout.islands")
        if processes != "auto" and islands * product != processes:
            raise LayoutError(
                "the layout does not fill the processes",
                values={
                    "launch.processes": processes,
                    "layout.islands": islands,
                    **explicit_degrees,
                },
                fix=f"launch.processes={islands * product}, or leave layout.islands out",
            )
    return Layout(island=islands, **degrees)


def _degree(value: Auto, key: str) -> int:
    if value == "auto":
        return 1
    if int(value) < 1:
        raise LayoutError("a degree is at least 1", values={key: value}, fix=f"{key}=1")
    return int(value)
