"""Who is updated by what: groups of parameters, and one object over their optimisers.

Not here: update rules (torch.optim's, and `muon.py`), the schedule's shape, files. State exists
from the start, not from the first step, so that saving and loading have one case. Traded away:
param groups of the user's own; a rule has one rate, and weight decay is on matrices only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cordee.config.presets import DEFAULT_LR
from cordee.config.run import OptimSettings
from cordee.errors import CheckpointError, ConfigError
from cordee.layout.tensors import group_of
from cordee.optim.muon import Matrix, Muon, Update, product_dtype
from cordee.optim.rules import SGD, Adafactor, Adam, UpdateRule

GROUPS = ("matrices", "embeddings", "vectors")
"""Kinds of parameters; ClipSettings has limits for each."""

Named = list[tuple[str, Tensor]]


def split_groups(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Named]:
    """Parameters by group, in the order they came; all three keys are always there."""
    groups: dict[str, Named] = {group: [] for group in GROUPS}
    for name, parameter in named_parameters:
        groups[group_of(name, parameter.ndim)].append((name, parameter))
    return groups


@dataclass(frozen=True)
class _Rate:
    """A torch param group and its peak learning rate."""

    group: dict[str, Any]
    peak: float


class Optimizers:
    """One or two update rules as one: step, rates, state by name. Made by `make_optimizer`."""

    def __init__(self, parts: Sequence[UpdateRule], names: dict[str, Tensor]) -> None:
        """`names` maps 'group/name' to the parameter; rates so far become the peaks."""
        self.parts = parts
        self._names = names
        self._rates = [_Rate(g, float(g["lr"])) for part in parts for g in part.param_groups]
        self._state: dict[str, dict[str, Tensor]] = {}
        part_of = {p: part for part in parts for g in part.param_groups for p in g["params"]}
        for key, parameter in names.items():
            self._state[key] = part_of[parameter].state[parameter]

    @property
    def peak_lr(self) -> float:
        """The rule's peak learning rate (with muon: that of the matrices)."""
        return self._rates[0].peak

    @property
    def sent_bytes(self) -> int:
        """Bytes this rank sent to share work, since the start."""
        return sum(getattr(part, "sent_bytes", 0) for part in self.parts)

    @property
    def shared_s(self) -> float:
        """Seconds this rank spent in exchanging shared work, since the start."""
        return float(sum(getattr(part, "shared_s", 0.0) for part in self.parts))

    def prepare(self) -> list[Update]:
        """What `step` needs of other ranks: collective when muon shares its work. Parameters, state
        and gradients stay as they are."""
        return [u for part in self.parts if isinstance(part, Muon) for u in part.prepare()]

    def step(self, prepared: list[Update] | None = None) -> None:
        """Updates every parameter that has a gradient; on this rank alone when given what `prepare`
        returned for these gradients."""
        for part in self.parts:
            if isinstance(part, Muon):
                part.step(prepared=prepared)
            else:
                part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients (or fills them with zeros)."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def set_lr(self, factor: float) -> None:
        """Every group's rate becomes factor x its peak."""
        for rate in self._rates:
            rate.group["lr"] = rate.peak * factor

    def tensors(self) -> dict[str, Tensor]:
        """State by name ('matrices/blocks.0.mlp.up.weight/momentum_buffer'): live local tensors.

        A tensor that has as many dims as its parameter is cut like it; a 0-d one is the same on
        every rank. The keys are the same before and after the first step.
        """
        return {f"{key}/{kind}": tensor for key, kind, tensor in self._each()}

    def load(self, read: Callable[[str], Tensor | None]) -> None:
        """Fills the state from `read(key)`, a tensor of the local shape; None means as new."""
        with torch.no_grad():
            for key, kind, tensor in self._each():
                stored = read(f"{key}/{kind}")
                if stored is None:
                    tensor.zero_()
                elif stored.shape != tensor.shape:
                    raise CheckpointError(
                        "optimiser state of another shape",
                        values={"tensor": f"{key}/{kind}", "stored": tuple(stored.shape),
                                "wanted": tuple(tensor.shape)},
                        fix="load a checkpoint of the same model and optim.name",
                    )  # fmt: skip
                else:
                    tensor.copy_(stored)

    def adopt(self, other: Optimizers) -> None:
        """Takes on the state of an optimiser of the same parameters, without a copy."""
        for key, state in self._state.items():
            state.update(other._state[key])

    def _each(self) -> Iterator[tuple[str, str, Tensor]]:
        for key, state in self._state.items():
            for kind, tensor in state.items():
                yield key, kind, tensor


def make_optimizer(
    settings: OptimSettings,
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    fused: bool,
    matrices: Mapping[str, Matrix] | None = None,
    muon_dtype: torch.dtype | None = None,
) -> Optimizers:
    """The optimiser that `settings` names, over this rank's parts of the parameters.

    fused: use the library's fused kernels where they exist. Their last bits depend on where a
    tensor is cut; without them (exact) every element is computed alike. `matrices`: how muon's
    parameters are held, by name (None: whole, alone); `muon_dtype`: what it multiplies in (None is
    what the device is quick at).
    """
    groups = split_groups(named_parameters)
    names = {f"{group}/{name}": p for group, named in groups.items() for name, p in named}
    lr = float(DEFAULT_LR[settings.name] if settings.lr == "auto" else settings.lr)
    if settings.name != "muon":
        return Optimizers([_library(settings, groups, lr, fused)], names)
    parts: list[UpdateRule] = []
    if named := groups["matrices"]:
        tensors, decay = [p for _, p in named], settings.weight_decay
        told = None if matrices is None else [matrices[name] for name, _ in named]
        dtype = muon_dtype or product_dtype(tensors[0].device)
        parts.append(
            Muon(tensors, lr, momentum=settings.momentum, weight_decay=decay, dtype=dtype,
                 matrices=told)
        )  # fmt: skip
    if groups["embeddings"] or groups["vectors"]:
        rest = {**groups, "matrices": []}
        parts.append(_adam(settings, rest, settings.adam_lr, fused, decoupled=True))
    return Optimizers(parts, names)


def _library(
    settings: OptimSettings, groups: dict[str, Named], lr: float, fused: bool
) -> UpdateRule:
    match settings.name:
        case "sgd" | "momentum":
            momentum = settings.momentum if settings.name == "momentum" else 0.0
            return SGD(_decayed(groups, settings), lr, momentum, fused)
        case "adam" | "adamw":
            return _adam(settings, groups, lr, fused, decoupled=settings.name == "adamw")
        case "adafactor":
            return Adafactor(_decayed(groups, settings), lr)
    raise ConfigError(
        "no such update rule", values={"optim.name": settings.name}, fix="optim.name=muon"
    )


def _adam(
    settings: OptimSettings, groups: dict[str, Named], lr: float, fused: bool, *, decoupled: bool
) -> Adam:
    betas, parts = (settings.beta1, settings.beta2), _decayed(groups, settings)
    return Adam(parts, lr, betas, settings.eps, decoupled=decoupled, fused=fused)


def _decayed(groups: dict[str, Named], settings: OptimSettings) -> list[dict[str, Any]]:
    """Torch param groups: matrices with weight decay, the rest without."""
    matrices = [p for _, p in groups["matrices"]]
    rest = [p for group in GROUPS[1:] for _, p in groups[group]]
    split = ((matrices, settings.weight_decay), (rest, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in split if params]
