"""From a layout to torch's process groups: one for every set of axes that the house sums over.

A group holds the ranks that differ only in the named axes, in rank order. Only the groups that this
rank belongs to are made, so 16,384 ranks cost no more than two. Not here: how a model is cut
(`parallel/`). Traded away: axes of degree 1 get no group, because a collective of one is the
identity. Where devices are of different kinds, the groups that cross islands carry host memory only
(`devices.HOST_ONLY`), and those inside an island carry its devices' as ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cordee.devices import BACKENDS, HOST_ONLY
from cordee.layout.axes import AXES, INSIDE, Layout

WORKERS = ("island", "expert", "shard")
"""Axes whose ranks compute different microbatches."""

SETS = (
    *((axis,) for axis in AXES),
    WORKERS,
    AXES,
    INSIDE,
    ("context", "expert"),
    ("context", "tensor"),
    ("context", "expert", "tensor"),
    ("shard", "tensor"),
    ("island", "context", "expert"),
    ("island", "context", "tensor"),
    ("expert", "shard", "tensor"),
    ("context", "expert", "shard", "tensor"),
    ("island", "context", "expert", "shard", "tensor"),
)
"""Sets of axes that get a group."""


@dataclass(frozen=True)
class Mesh:
    """The groups of one rank. `at` are its coordinates."""

    layout: Layout
    rank: int
    at: Mapping[str, int]
    groups: Mapping[tuple[str, ...], dist.ProcessGroup]
    shard_mesh: DeviceMesh | None

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """Ranks that differ from this one only in `axes`; None stands for this rank alone."""
        named = tuple(axis for axis in AXES if axis in axes and getattr(self.layout, axis) > 1)
        return self.groups[named] if named else None

    def size(self, *axes: str) -> int:
        """How many ranks that group has."""
        found = 1
        for axis in axes:
            found *= getattr(self.layout, axis)
        return found

    def index(self, *axes: str) -> int:
        """This rank's place in that group."""
        place = 0
        for axis in AXES:
            if axis in axes:
                place = place * getattr(self.layout, axis) + self.at[axis]
        return place

    @property
    def worker(self) -> int:
        """Which share of the microbatches this rank computes."""
        return self.index(*WORKERS)


def make_mesh(layout: Layout, rank: int, device: str, shard_always: bool = False) -> Mesh:
    """Builds the groups; every rank must call it at the same point (torch's rule).

    `shard_always`: make the shard mesh also of one rank (FSDP2 is then used for what else it does).
    """
    at, kind = layout.coordinates(rank), device.split(":")[0]
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    groups: dict[tuple[str, ...], dist.ProcessGroup] = {}
    for axes in SETS:
        named = tuple(axis for axis in AXES if axis in axes and getattr(layout, axis) > 1)
        if not named or named in groups:
            continue
        ranks = members(layout, at, named)
        if ranks not in made:
            made[ranks] = _group(ranks, layout.size, None if "island" in named else kind)
        groups[named] = made[ranks]
    mesh = None
    if layout.shard > 1 or shard_always:
        shards = members(layout, at, ("shard",))
        group = groups[("shard",)] if layout.shard > 1 else _group(shards, layout.size, kind)
        mesh = DeviceMesh.from_group(group, kind, list(shards), mesh_dim_names=("shard",))
    return Mesh(layout, rank, at, groups, mesh)


def members(layout: Layout, at: Mapping[str, int], axes: Sequence[str]) -> tuple[int, ...]:
    """Ranks that share the coordinates `at` but for `axes`, in rank order."""
    return tuple(layout.rank({**at, **place}) for place in places(layout, axes))


def places(layout: Layout, axes: Sequence[str]) -> Iterator[dict[str, int]]:
    """All coordinates along `axes`, in rank order."""
    named = [axis for axis in AXES if axis in axes]
    spans = (range(getattr(layout, axis)) for axis in named)
    for place in itertools.product(*spans):
        yield dict(zip(named, place, strict=True))


def _group(ranks: tuple[int, ...], world: int, kind: str | None) -> dist.ProcessGroup:
    """`kind`: the device of all these ranks; None where they are on several islands."""
    if len(ranks) == world:
        whole = dist.group.WORLD
        assert whole is not None
        return whole
    alike = kind is not None and dist.get_backend_config() == HOST_ONLY
    backend = BACKENDS[kind] if alike and kind else None  # None: as all ranks' group
    made: dist.ProcessGroup = dist.new_group(
        list(ranks), backend=backend, use_local_synchronization=True
    )
    return made
