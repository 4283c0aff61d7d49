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

from cordee.dist.wire import Wire
from cordee.errors import RunError

WHOLE_BYTES = 1 << 30
"""Largest model (parameters, fp32) that every rank builds whole to compare with."""

TOLERANCE = 1e-5
"""Largest relative difference of two losses that are one in exact arithmetic, in fp32."""


@dataclass(frozen=True)
class Tried:
    """A model under the probe. `loss()` is the loss of the probe's batch, the same batch on every
    rank; `step()` is its backward and one step of plain SGD, with gradients made complete. Both
    leave parameters sharded (`shard.reshard`): after a forward without a backward FSDP2 keeps the
    root's gathered, and an optimiser made then would hold the wrong tensors."""

    loss: Callable[[], Tensor]
    step: Callable[[], object]


def probe(
    cut: Tried,
    parts: Sequence[Tensor],
    wire: Wire,
    whole: Tried | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Raises RunError on every rank of `wire` when the cut model does not do what `whole` does.

    `parts` are this rank's parts of the parameters (local memory), which `cut.step` changes. They
    are back bit for bit afterwards, also when it raises. `whole` may be None where it is too large.
    """
    held = [part.detach().clone() for part in parts]
    try:
        before = _number(cut.loss)
        if _anywhere(not math.isfinite(before), wire):
            raise RunError(
                "the loss of the run's first microbatch is not finite",
                values={"loss": before},
                fix="look for NaN and infinities in the data, in the parameters and in the loss",
            )
        if whole is not None:
            _same("the cut model's loss is not that of the whole one",
                  before, _number(whole.loss), wire, tolerance)  # fmt: skip
        cut.step()
        moved = any(not torch.equal(a, b.detach()) for a, b in zip(held, parts, strict=True))
        after = _number(cut.loss)
        if whole is not None:
            whole.step()
            _same("a step does not move the cut model as it moves the whole one",
                  after, _number(whole.loss), wire, tolerance)  # fmt: skip
        if _anywhere(not moved, wire):
            raise RunError(
                "a step of the wrapped model changes no parameter on some rank",
                values={"this rank's changed": moved},
                fix="layout.shard=1, or another way to wrap the model",
            )
        if _anywhere(before == after, wire):
            raise RunError(
                "a step changes the parameters but not the loss: the model reads stale tensors",
                values={"loss": before},
                fix="layout.shard=1, or a module whose forward reads its own parameters",
            )
    finally:
        with torch.no_grad():
            for part, old in zip(parts, held, strict=True):
                part.copy_(old)


def descend(parts: Sequence[Tensor], gradients: Sequence[Tensor | None], rate: float) -> None:
    """One step of plain SGD, in place; a gradient of None leaves its part."""
    with torch.no_grad():
        for part, gradient in zip(parts, gradients, strict=True):
            if gradient is not None:
                part.sub_(gradient.to(part.dtype), alpha=rate)


def _number(loss: Callable[[], Tensor]) -> float:
    return float(loss().detach())


def _same(what: str, cut: float, whole: float, wire: Wire, tolerance: float) -> None:
    # Written so that a NaN on either side counts as a difference.
    apart = not abs(cut - whole) <= tolerance * abs(whole)
    if _anywhere(apart, wire):
        raise RunError(
            what,
            values={"cut": cut, "whole": whole, "tolerance": tolerance},
            fix="all degrees of layout at 1 for this model",
        )


def _anywhere(bad: bool, wire: Wire) -> bool:
    """Whether it is so on any rank; every rank must ask."""
    return bool(wire.most_now(torch.tensor(float(bad))))
