"""From a layout to torch's DeviceMesh and the groups that the house uses.

Not here: how a model is cut (`parallel/`). Traded away: axes of degree 1 get no group of their own,
because a collective of one is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cordee.layout.axes import Layout


@dataclass(frozen=True)
class Mesh:
    """The groups of one rank; None stands for a group of one.

    `workers` are all ranks (each computes its own microbatches); `islands` the ranks at the same
    place of every island; `shards` the ranks of this island.
    """

    layout: Layout
    rank: int
    workers: dist.ProcessGroup | None
    islands: dist.ProcessGroup | None
    shards: dist.ProcessGroup | None
    shard_mesh: DeviceMesh | None

    @property
    def island(self) -> int:
        """Number of this rank's island."""
        return self.layout.coordinates(self.rank)["island"]

    @property
    def shard(self) -> int:
        """Place of this rank in its island."""
        return self.layout.coordinates(self.rank)["shard"]

    @property
    def worker(self) -> int:
        """Which share of the microbatches this rank computes."""
        return self.layout.worker(self.rank)


def make_mesh(layout: Layout, rank: int, device: str, shard_always: bool = False) -> Mesh:
    """Builds the groups; every rank must call it at the same point (torch's rule).

    `shard_always`: make the shard mesh also of one rank (FSDP2 is then used for what else it does).
    """
    if layout.size == 1 and not shard_always:
        return Mesh(layout, rank, None, None, None, None)
    kind = device.split(":")[0]
    mesh = init_device_mesh(
        kind, (layout.island, layout.shard), mesh_dim_names=("island", "shard")
    )
    return Mesh(
        layout,
        rank,
        dist.group.WORLD if layout.size > 1 else None,
        mesh.get_group("island") if layout.island > 1 else None,
        mesh.get_group("shard") if layout.shard > 1 else None,
        mesh["shard"] if layout.shard > 1 or shard_always else None,
    )
