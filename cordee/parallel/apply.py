"""THE recipe: how a plain model becomes this rank's part of it.

Order: build -> initialise -> place -> shard. Every parameter's numbers depend on (seed, name)
alone, so they are the same whatever comes after. Tensor, expert, context and pipeline cuts will
stand between place and shard; their layouts are refused on paper until then.
"""

from __future__ import annotations

from torch import nn

from cordee.dist.mesh import Mesh
from cordee.parallel.shard import shard


def apply(model: nn.Module, mesh: Mesh, device: str, canonical: bool) -> nn.Module:
    """Moves `model` (initialised, whole, on CPU) to `device` and cuts it for this rank."""
    model.to(device)
    if mesh.shard_mesh is not None:
        blocks = getattr(model, "blocks", None)
        shard(model, mesh.shard_mesh, list(blocks) if blocks is not None else [], canonical)
    return model
