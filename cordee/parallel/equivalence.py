"""The guard of foreign models: before training, the cut model must be the whole one.

Wrapping can go wrong without an error: a library that keeps stale tensors trains nothing, a seam in
the wrong place trains something else. So a small batch is tried: the loss cut over ranks equals
that of the whole model, and one small step moves parameters and the loss, of both models alike.
Parameters are put back bit for bit. Not here: what a model is (all is written against callables).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cordee.dist.autograd_collectives import AxisComm
from cordee.errors import RunError

MAX_FULL_MODEL_BYTES = 1 << 30
"""Largest model (parameters, fp32) that every rank builds whole to compare with."""

LOSS_TOLERANCE = 1e-5
"""Largest relative difference of two losses that are one in exact arithmetic, in fp32."""


@dataclass(frozen=True)
class ModelProbe:
    """A model under the probe. `loss()` is the loss of the probe's batch, the same batch on every
    rank; `step()` is its backward and one step of plain SGD, with gradients made complete. Both
    leave parameters sharded (`apply_fsdp.reshard`): after a forward without a backward FSDP2 keeps
    the root's gathered, and an optimiser made then would hold the wrong tensors."""

    loss: Callable[[], Tensor]
    step: Callable[[], object]


def compare_probes(
    local_probe: ModelProbe,
    parameters: Sequence[Tensor],
    comm: AxisComm,
    full_probe: ModelProbe | None = None,
    tolerance: float = LOSS_TOLERANCE,
) -> None:
    """Raises RunError on every rank of `comm` when the cut model does not do what `full_probe`
    does.

    `parameters` are this rank's parts of the parameters (local memory), which `local_probe.step`
    changes. They are back bit for bit afterwards, also when it raises. `full_probe` may be None
    where it is too large.
    """
    old_values = [parameter.detach().clone() for parameter in parameters]
    try:
        loss_before = _loss_value(local_probe.loss)
        if _any_rank(not math.isfinite(loss_before), comm):
            raise RunError(
                "the loss of the run's first microbatch is not finite",
                values={"loss": loss_before},
                fix="look for NaN and infinities in the data, in the parameters and in the loss",
            )
        if full_probe is not None:
            _check_same("the cut model's loss is not that of the whole one",
                  loss_before, _loss_value(full_probe.loss), comm, tolerance)  # fmt: skip
        local_probe.step()
        has_moved = any(
            not torch.equal(a, b.detach()) for a, b in zip(old_values, parameters, strict=True)
        )
        loss_after = _loss_value(local_probe.loss)
        if full_probe is not None:
            full_probe.step()
            _check_same("a step does not move the cut model as it moves the whole one",
                  loss_after, _loss_value(full_probe.loss), comm, tolerance)  # fmt: skip
        if _any_rank(not has_moved, comm):
            raise RunError(
                "a step of the wrapped model changes no parameter on some rank",
                values={"this rank's changed": has_moved},
                fix="layout.shard=1, or another way to wrap the model",
            )
        if _any_rank(loss_before == loss_after, comm):
            raise RunError(
                "a step changes the parameters but not the loss: the model reads stale tensors",
                values={"loss": loss_before},
                fix="layout.shard=1, or a module whose forward reads its own parameters",
            )
    finally:
        with torch.no_grad():
            for parameter, old_value in zip(parameters, old_values, strict=True):
                parameter.copy_(old_value)


def sgd_step(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], lr: float) -> None:
    """One step of plain SGD, in place; a gradient of None leaves its part."""
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.sub_(gradient.to(parameter.dtype), alpha=lr)


def _loss_value(loss: Callable[[], Tensor]) -> float:
    return float(loss().detach())


def _check_same(
    message: str, local_loss: float, full_loss: float, comm: AxisComm, tolerance: float
) -> None:
    # Written so that a NaN on either side counts as a difference.
    differs = not abs(local_loss - full_loss) <= tolerance * abs(full_loss)
    if _any_rank(differs, comm):
        raise RunError(
            message,
            values={"cut": local_loss, "whole": full_loss, "tolerance": tolerance},
            fix="all degrees of layout at 1 for this model",
        )


def _any_rank(condition: bool, comm: AxisComm) -> bool:
    """Whether it is so on any rank; every rank must ask."""
    return bool(comm.max_no_grad(torch.tensor(float(condition))))
