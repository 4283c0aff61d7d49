"""From a layout to torch's process groups: one for each set of axes that is summed over.

A group holds the ranks that differ only in the named axes, in rank order; a rank makes only its own
groups, and none of size one. With unlike devices, groups across islands use host memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cordee.hardware.devices import BACKENDS, HOST_GLOO
from cordee.layout.axes import AXES, DATA_AXES, Layout
from cordee.layout.tensors import group_axes


@dataclass(frozen=True)
class Mesh:
    """The groups of one rank. `coords` are its coordinates."""

    layout: Layout
    rank: int
    coords: Mapping[str, int]
    groups: Mapping[tuple[str, ...], dist.ProcessGroup]
    shard_mesh: DeviceMesh | None

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """Ranks that differ from this one only in `axes`; None stands for this rank alone."""
        active_axes = tuple(
            axis for axis in AXES if axis in axes and getattr(self.layout, axis) > 1
        )
        return self.groups[active_axes] if active_axes else None

    def size(self, *axes: str) -> int:
        """How many ranks that group has."""
        rank_count = 1
        for axis in axes:
            rank_count *= getattr(self.layout, axis)
        return rank_count

    def index(self, *axes: str) -> int:
        """This rank's place in that group."""
        position = 0
        for axis in AXES:
            if axis in axes:
                position = position * getattr(self.layout, axis) + self.coords[axis]
        return position

    @property
    def worker_index(self) -> int:
        """Which share of the microbatches this rank computes."""
        return self.index(*DATA_AXES)


def make_mesh(layout: Layout, rank: int, device: str, force_shard_mesh: bool = False) -> Mesh:
    """Builds the groups; every rank must call it at the same point (torch's rule).

    `force_shard_mesh`: make the shard mesh also of one rank (FSDP2 is then used for what else it
    does).
    """
    coords, device_type = layout.coordinates(rank), device.split(":")[0]
    group_by_ranks: dict[tuple[int, ...], dist.ProcessGroup] = {}
    groups: dict[tuple[str, ...], dist.ProcessGroup] = {}
    for axes in group_axes():
        active_axes = tuple(axis for axis in AXES if axis in axes and getattr(layout, axis) > 1)
        if not active_axes or active_axes in groups:
            continue
        ranks = ranks_along(layout, coords, active_axes)
        if ranks not in group_by_ranks:
            group_by_ranks[ranks] = _make_group(
                ranks, layout.size, None if "island" in active_axes else device_type
            )
        groups[active_axes] = group_by_ranks[ranks]
    shard_mesh = None
    if layout.shard > 1 or force_shard_mesh:
        shard_ranks = ranks_along(layout, coords, ("shard",))
        group = (
            groups[("shard",)]
            if layout.shard > 1
            else _make_group(shard_ranks, layout.size, device_type)
        )
        shard_mesh = DeviceMesh.from_group(
            group, device_type, list(shard_ranks), mesh_dim_names=("shard",)
        )
    return Mesh(layout, rank, coords, groups, shard_mesh)


def ranks_along(layout: Layout, coords: Mapping[str, int], axes: Sequence[str]) -> tuple[int, ...]:
    """Ranks that share the coordinates `coords` but for `axes`, in rank order."""
    return tuple(layout.rank({**coords, **position}) for position in axis_coordinates(layout, axes))


def axis_coordinates(layout: Layout, axes: Sequence[str]) -> Iterator[dict[str, int]]:
    """All coordinates along `axes`, in rank order."""
    ordered_axes = [axis for axis in AXES if axis in axes]
    index_ranges = (range(getattr(layout, axis)) for axis in ordered_axes)
    for indices in itertools.product(*index_ranges):
        yield dict(zip(ordered_axes, indices, strict=True))


def _make_group(
    ranks: tuple[int, ...], world_size: int, device_type: str | None
) -> dist.ProcessGroup:
    """`device_type`: the device of all these ranks; None where they are on several islands."""
    if len(ranks) == world_size:
        world_group = dist.group.WORLD
        assert world_group is not None
        return world_group
    needs_own_backend = device_type is not None and dist.get_backend_config() == HOST_GLOO
    backend = (
        BACKENDS[device_type] if needs_own_backend and device_type else None
    )  # None: as all ranks' group
    group: dist.ProcessGroup = dist.new_group(
        list(ranks), backend=backend, use_local_synchronization=True
    )
    return group
