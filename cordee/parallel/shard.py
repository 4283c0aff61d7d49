"""Parameters, gradients and optimiser sharded over an island with FSDP2.

Each block and the rest are one unit: gathered before use, freed after. Two ways to reduce: FSDP2's
own reduce-scatter (fast), or whole gradients taken after each microbatch and added by the exchange
(canonical order, the same bits as unsharded, at the price of whole gradients in memory).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from cordee.dist.exchange import gather_flat


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    units: Sequence[nn.Module],
    canonical: bool,
    offload: bool = False,
) -> None:
    """Shards dim 0 of every parameter over `mesh`; `units` are wrapped one by one, then the root.

    `canonical`: keep whole gradients on each rank (see the file's header). `offload`: shards and
    their gradients live in the host's memory (pinned, where the mesh is not the host's itself).
    """
    pinned = mesh.device_type != "cpu"
    policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    for module in (*units, model):
        fully_shard(module, mesh=mesh, offload_policy=policy)
    for unit in fsdp_modules(model):
        # Losses are divided by the global token count, so sums must not be divided again; gloo
        # has no pre-multiplied sum either.
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
        if canonical:
            unit.set_requires_gradient_sync(False)
            unit.set_reshard_after_backward(False)


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Every unit that FSDP2 manages."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def last_microbatch(model: nn.Module, last: bool) -> None:
    """Whether the coming backward reduces (fast mode); before it, gradients only add up."""
    for module in fsdp_modules(model):
        module.set_requires_gradient_sync(last)
        module.set_is_last_backward(last)


def reshard(model: nn.Module) -> None:
    """Back to shards: `model.parameters()` are the optimiser's tensors again."""
    for module in fsdp_modules(model):
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Sets `.grad` from this rank's part (a DTensor when the parameter is one), which is on the
    parameter's device."""
    if isinstance(parameter, DTensor):
        parameter.grad = DTensor.from_local(
            gradient,
            parameter.device_mesh,
            [Shard(0)],
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    else:
        parameter.grad = gradient


def whole_rows(part: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All shards' vectors of `counts[i]` elements each, in shard order (counts may differ)."""
    most = max(counts)
    padded = part.new_zeros(most)
    padded[: part.numel()] = part
    gathered = part.new_empty(most * len(counts))
    gather_flat(gathered, padded, group=group)
    pieces = gathered.view(len(counts), most)
    return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])
