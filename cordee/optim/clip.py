"""Norms of gradients, clipping, and limits on parameters: in place, without host syncs.

All functions take this rank's own parts. `unshard_rows` and `norm_sums`, which the caller brings,
complete a norm over the ranks of an island.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cordee.config.run import ClipSettings
from cordee.hardware.devices import DEVICES

UnshardRows = Callable[[Tensor], Tensor] | None
"""Numbers per row of this rank's shards, one tensor after another -> those of the whole tensors."""


class NormSums(Protocol):
    """Sums over the parts of tensors; every rank of an island asks at the same points."""

    @property
    def names(self) -> Sequence[str]:
        """All tensors of the model."""
        ...

    def sum_all(self, names: Sequence[str], numbers: Tensor) -> Tensor:
        """Sums of all tensors of the model, given `numbers` of the tensors `names` here."""
        ...

    def sum_local(self, names: Sequence[str], numbers: Tensor) -> Tensor:
        """Sums of the tensors `names`, in their order."""
        ...


NORM_EPS = 1e-6
"""Added to a norm before it divides (as torch.nn.utils.clip_grad_norm_ does)."""

AGC_EPS = 1e-3
"""Least parameter norm in AGC, so that zero rows can grow (Brock et al. 2021)."""

AGC_SKIP_PREFIXES = ("embed.", "head.")
"""Not clipped by AGC: the paper leaves out the last layer, whose shape the embedding has."""

NORM_GRID = 2.0**32
"""Steps to which a squared norm is rounded, per squared limit, where its sum must be exact."""


def row_squares(tensor: Tensor) -> Tensor:
    """Squared norm of each row of dim 0, fp32 [rows]; of a vector, of each element."""
    return tensor.square() if tensor.ndim < 2 else tensor.flatten(1).square().sum(1)


def global_norm(
    grads: Mapping[str, Tensor],
    exact: bool,
    unshard_rows: UnshardRows = None,
    norm_sums: NormSums | None = None,
) -> Tensor:
    """Norm of all gradients together, 0-d: fp32, or fp64 when exact. Give them in model order.

    exact: squared norms of rows, then one fp64 sum over the vector of all rows. A row's own sum
    does not depend on who holds the row, and `unshard_rows` brings the rows of all shards into one
    order, so the bits are those of one process (0.42 ms for 1.9 M elements on one CPU thread, else
    0.26). Not exact: the library's norms, completed by `norm_sums` (less traffic, bits that depend
    on the layout).
    """
    if exact:
        rows = torch.cat([row_squares(grad) for grad in grads.values()])
        return (unshard_rows(rows) if unshard_rows else rows).double().sum().sqrt()
    norms = torch.stack(torch._foreach_norm(list(grads.values())))
    if norm_sums is None:
        norm: Tensor = torch.linalg.vector_norm(norms)
        return norm
    return norm_sums.sum_all(list(grads), norms.square()).sum().sqrt()


def clip_gradients(
    named_gradients: Sequence[tuple[str, Tensor, Tensor]], settings: ClipSettings, norm: Tensor
) -> None:
    """Clips gradients in place; `named_gradients` are (name, parameter, gradient), this rank's
    parts.

    norm: all times min(1, limit / norm). normalise: all divided by the norm. value: elements to
    [-limit, limit]. agc: see `clip_units`. `norm` is `global_norm` of the gradients as they come;
    where it is not finite, the guard has dropped the step before.
    """
    grads = [grad for _, _, grad in named_gradients]
    if not grads:
        return
    match settings.kind:
        case "norm":
            coefficient = (settings.limit / (norm + NORM_EPS)).clamp(max=1.0)
            torch._foreach_mul_(grads, coefficient.to(grads[0].dtype))
        case "normalise":
            torch._foreach_mul_(grads, (1.0 / (norm + NORM_EPS)).to(grads[0].dtype))
        case "value":
            torch._foreach_clamp_min_(grads, -settings.limit)
            torch._foreach_clamp_max_(grads, settings.limit)
        case "agc":
            for (name, parameter, _), grad in zip(named_gradients, grads, strict=True):
                if not name.startswith(AGC_SKIP_PREFIXES):
                    # A stack of experts is as many matrices.
                    is_stacked = grad.ndim == 3 and ".moe." in name
                    last_dim = 1 if is_stacked else 0
                    weight = parameter.detach().flatten(0, last_dim)
                    clip_units(weight, grad.flatten(0, last_dim), settings.limit)
        case "none":
            pass


def clip_units(parameter: Tensor, grad: Tensor, limit: float) -> None:
    """AGC (Brock et al. 2021), in place: |g_i| <= limit x max(|w_i|, 1e-3) for every unit i.

    A unit is what makes one output: a row of a matrix, an element of a vector. (The authors' code
    takes a whole vector as a unit; elements keep the bits independent of how rows are cut.)
    """
    w_norm, g_norm = row_squares(parameter).sqrt_(), row_squares(grad).sqrt_()
    max_norm = w_norm.clamp(min=AGC_EPS).mul_(limit)
    scale = torch.where(g_norm > max_norm, max_norm / g_norm.clamp(min=NORM_EPS), 1.0)
    grad.mul_(scale.view(-1, *[1] * (grad.ndim - 1)))


@torch.no_grad()
def limit_parameters(
    groups: Mapping[str, Sequence[tuple[str, Tensor]]],
    settings: ClipSettings,
    norm_sums: NormSums | None = None,
) -> None:
    """After an update, in place: clamps elements and scales tensors down to their group's limits.

    `groups` are matrices, embeddings and vectors, with this rank's parts of parameters; a
    group without limits costs nothing. Norms have the same bits for any number of shards: squares
    are rounded to a grid on which their sums are exact (up to 1,400 times the limit).
    """
    for group, named_tensors in groups.items():
        limit = getattr(settings, group)
        tensors = [tensor for _, tensor in named_tensors]
        if limit.value and tensors:
            torch._foreach_clamp_min_(tensors, -limit.value)
            torch._foreach_clamp_max_(tensors, limit.value)
        if limit.norm and (tensors or norm_sums):
            grid_steps = NORM_GRID / limit.norm**2
            squares = [(_to_float64(row_squares(t)) * grid_steps).round_().sum() for t in tensors]
            counts = torch.stack(squares) if squares else torch.zeros(0)
            if norm_sums:  # also by ranks that have none of these tensors
                counts = norm_sums.sum_local([name for name, _ in named_tensors], counts)
        if limit.norm and tensors:
            scale = (NORM_GRID / counts.clamp(min=1.0)).sqrt_().clamp(max=1.0)
            torch._foreach_mul_(tensors, list(scale.to(tensors[0]).unbind()))


def _to_float64(numbers: Tensor) -> Tensor:
    """In fp64, on the host if the device has no such numbers."""
    return (numbers if DEVICES[numbers.device.type].float64 else numbers.cpu()).double()


def layer_of(name: str) -> str:
    """The layer of a parameter: 'blocks.3' for a block's, else the first part of its name."""
    parts = name.split(".")
    has_index = len(parts) > 2 and parts[1].isdigit()
    return ".".join(parts[:2]) if has_index else parts[0]


def layer_norms(
    named_grads: Iterable[tuple[str, Tensor]], norm_sums: NormSums | None = None
) -> dict[str, float]:
    """Gradient norm of each layer ('embed', 'blocks.0', ..., 'norm', 'head'), of this rank's parts
    or, with `norm_sums`, of the whole model; one host sync."""
    grads = dict(named_grads)
    if not grads:
        return {}
    names: Sequence[str] = list(grads)
    squares = torch.stack(torch._foreach_norm(list(grads.values()))).square()
    if norm_sums is not None:
        names, squares = norm_sums.names, norm_sums.sum_all(names, squares)
    sums: dict[str, float] = {}
    for name, square in zip(names, squares.tolist(), strict=True):
        sums[layer_of(name)] = sums.get(layer_of(name), 0.0) + square
    return {layer: square**0.5 for layer, square in sums.items()}
