"""Parameters, gradients and optimiser sharded over an island with FSDP2.

Each block and the rest are one unit. What is kept whole between uses is the level of ZeRO
(Rajbhandari et al. 2020): 1 parameters and gradients, 2 parameters, 3 nothing. Or (canonical) whole
gradients are taken after each microbatch and added by the exchange: the same bits as unsharded, at
the price of whole gradients in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from cordee.dist.exchange import gather_flat


@dataclass(frozen=True)
class Sharding:
    """How a model is sharded: level of ZeRO, whether gradients stay whole (canonical), whether
    shards and their gradients live in the host's memory (offload)."""

    zero: int = 1
    canonical: bool = False
    offload: bool = False


def shard(
    model: nn.Module, mesh: DeviceMesh, units: Sequence[nn.Module], dims: Mapping[str, int | None],
    how: Sharding,
) -> None:  # fmt: skip
    """Shards every parameter over `mesh`, in dim 0 or the one that `dims` names; `units` are
    wrapped one by one, then the root."""
    pinned = mesh.device_type != "cpu"
    policy = CPUOffloadPolicy(pin_memory=pinned) if how.offload else OffloadPolicy()
    placed = {p: Shard(dims.get(name) or 0) for name, p in model.named_parameters()}
    for module in (*units, model):
        fully_shard(
            module, mesh=mesh, reshard_after_forward=how.zero == 3,
            shard_placement_fn=placed.__getitem__, offload_policy=policy,
        )  # fmt: skip
    for unit in fsdp_modules(model):
        # Losses are divided by the global token count, so sums must not be divided again; gloo
        # has no pre-multiplied sum either.
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
        if how.canonical:
            unit.set_requires_gradient_sync(False)
        if how.canonical or how.zero < 3:
            unit.set_reshard_after_backward(False)


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Every unit that FSDP2 manages."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def before_microbatch(units: Sequence[FSDPModule], last: bool, how: Sharding) -> None:
    """Tells all `units` whether the coming backward reduces; before it, gradients only add up."""
    if how.canonical:
        return
    for module in units:
        module.set_requires_gradient_sync(last or how.zero > 1, recurse=False)
        module.set_is_last_backward(last)


def reshard(model: nn.Module) -> None:
    """Back to shards: `model.parameters()` are the optimiser's tensors again."""
    for module in fsdp_modules(model):
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, in the same memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole_rows(part: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All shards' vectors of `counts[i]` elements each, in shard order (counts may differ)."""
    most = max(counts)
    padded = part.new_zeros(most)
    padded[: part.numel()] = part
    gathered = part.new_empty(most * len(counts))
    gather_flat(gathered, padded, group=group)
    pieces = gathered.view(len(counts), most)
    return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])
