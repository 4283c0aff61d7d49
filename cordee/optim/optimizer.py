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
from cordee.layout.tensors import parameter_group
from cordee.optim.muon import MatrixSpec, Muon, MuonUpdate, product_dtype
from cordee.optim.update_rules import SGD, Adafactor, Adam, UpdateRule

PARAMETER_GROUPS = ("matrices", "embeddings", "vectors")
"""Kinds of parameters; ClipSettings has limits for each."""

NamedTensors = list[tuple[str, Tensor]]


def split_groups(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, NamedTensors]:
    """Parameters by group, in the order they came; all three keys are always there."""
    groups: dict[str, NamedTensors] = {group: [] for group in PARAMETER_GROUPS}
    for name, parameter in named_parameters:
        groups[parameter_group(name, parameter.ndim)].append((name, parameter))
    return groups


@dataclass(frozen=True)
class _GroupRate:
    """A torch param group and its peak learning rate."""

    group: dict[str, Any]
    peak: float


class Optimizers:
    """One or two update rules as one: step, rates, state by name. Made by `make_optimizer`."""

    def __init__(self, rules: Sequence[UpdateRule], parameters: dict[str, Tensor]) -> None:
        """`parameters` maps 'group/name' to the parameter; rates so far become the peaks."""
        self.rules = rules
        self._parameters = parameters
        self._rates = [_GroupRate(g, float(g["lr"])) for rule in rules for g in rule.param_groups]
        self._state: dict[str, dict[str, Tensor]] = {}
        rule_of = {p: rule for rule in rules for g in rule.param_groups for p in g["params"]}
        for key, parameter in parameters.items():
            self._state[key] = rule_of[parameter].state[parameter]

    @property
    def peak_lr(self) -> float:
        """The rule's peak learning rate (with muon: that of the matrices)."""
        return self._rates[0].peak

    @property
    def sent_bytes(self) -> int:
        """Bytes this rank sent to share work, since the start."""
        return sum(getattr(rule, "sent_bytes", 0) for rule in self.rules)

    @property
    def exchange_s(self) -> float:
        """Seconds this rank spent in exchanging shared work, since the start."""
        return float(sum(getattr(rule, "exchange_s", 0.0) for rule in self.rules))

    def prepare(self) -> list[MuonUpdate]:
        """What `step` needs of other ranks: collective when muon shares its work. Parameters, state
        and gradients stay as they are."""
        return [u for rule in self.rules if isinstance(rule, Muon) for u in rule.prepare()]

    def step(self, updates: list[MuonUpdate] | None = None) -> None:
        """Updates every parameter that has a gradient; on this rank alone when given what `prepare`
        returned for these gradients."""
        for rule in self.rules:
            if isinstance(rule, Muon):
                rule.step(updates=updates)
            else:
                rule.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients (or fills them with zeros)."""
        for rule in self.rules:
            rule.zero_grad(set_to_none=set_to_none)

    def set_lr(self, factor: float) -> None:
        """Every group's rate becomes factor x its peak."""
        for rate in self._rates:
            rate.group["lr"] = rate.peak * factor

    def state_tensors(self) -> dict[str, Tensor]:
        """State by name ('matrices/blocks.0.mlp.up.weight/momentum_buffer'): live local tensors.

        A tensor that has as many dims as its parameter is cut like it; a 0-d one is the same on
        every rank. The keys are the same before and after the first step.
        """
        return {f"{key}/{slot}": tensor for key, slot, tensor in self._iter_state()}

    def load_state(self, read: Callable[[str], Tensor | None]) -> None:
        """Fills the state from `read(key)`, a tensor of the local shape; None means as new."""
        with torch.no_grad():
            for key, slot, tensor in self._iter_state():
                value = read(f"{key}/{slot}")
                if value is None:
                    tensor.zero_()
                elif value.shape != tensor.shape:
                    raise CheckpointError(
                        "optimiser state of another shape",
                        values={"tensor": f"{key}/{slot}", "stored": tuple(value.shape),
                                "wanted": tuple(tensor.shape)},
                        fix="load a checkpoint of the same model and optim.name",
                    )  # fmt: skip
                else:
                    tensor.copy_(value)

    def adopt_state(self, other: Optimizers) -> None:
        """Takes on the state of an optimiser of the same parameters, without a copy."""
        for key, state in self._state.items():
            state.update(other._state[key])

    def _iter_state(self) -> Iterator[tuple[str, str, Tensor]]:
        for key, state in self._state.items():
            for slot, tensor in state.items():
                yield key, slot, tensor


def make_optimizer(
    settings: OptimSettings,
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    fused: bool,
    matrices: Mapping[str, MatrixSpec] | None = None,
    muon_dtype: torch.dtype | None = None,
) -> Optimizers:
    """The optimiser that `settings` names, over this rank's parts of the parameters.

    fused: use the library's fused kernels where they exist. Their last bits depend on where a
    tensor is cut; without them (exact) every element is computed alike. `matrices`: how muon's
    parameters are held, by name (None: whole, alone); `muon_dtype`: what it multiplies in (None is
    what the device is quick at).
    """
    groups = split_groups(named_parameters)
    parameters = {
        f"{group}/{name}": p for group, named_tensors in groups.items() for name, p in named_tensors
    }
    lr = float(DEFAULT_LR[settings.name] if settings.lr == "auto" else settings.lr)
    if settings.name != "muon":
        return Optimizers([_make_torch_rule(settings, groups, lr, fused)], parameters)
    rules: list[UpdateRule] = []
    if named_tensors := groups["matrices"]:
        tensors, decay = [p for _, p in named_tensors], settings.weight_decay
        matrix_specs = None if matrices is None else [matrices[name] for name, _ in named_tensors]
        dtype = muon_dtype or product_dtype(tensors[0].device)
        rules.append(
            Muon(tensors, lr, momentum=settings.momentum, weight_decay=decay, dtype=dtype,
                 matrices=matrix_specs)
        )  # fmt: skip
    if groups["embeddings"] or groups["vectors"]:
        other_groups = {**groups, "matrices": []}
        rules.append(
            _make_adam(settings, other_groups, settings.adam_lr, fused, decoupled_decay=True)
        )
    return Optimizers(rules, parameters)


def _make_torch_rule(
    settings: OptimSettings, groups: dict[str, NamedTensors], lr: float, fused: bool
) -> UpdateRule:
    match settings.name:
        case "sgd" | "momentum":
            momentum = settings.momentum if settings.name == "momentum" else 0.0
            return SGD(_param_groups(groups, settings), lr, momentum, fused)
        case "adam" | "adamw":
            return _make_adam(settings, groups, lr, fused, decoupled_decay=settings.name == "adamw")
        case "adafactor":
            return Adafactor(_param_groups(groups, settings), lr)
    raise ConfigError(
        "no such update rule", values={"optim.name": settings.name}, fix="optim.name=muon"
    )


def _make_adam(
    settings: OptimSettings,
    groups: dict[str, NamedTensors],
    lr: float,
    fused: bool,
    *,
    decoupled_decay: bool,
) -> Adam:
    betas, param_groups = (settings.beta1, settings.beta2), _param_groups(groups, settings)
    return Adam(param_groups, lr, betas, settings.eps, decoupled_decay=decoupled_decay, fused=fused)


def _param_groups(groups: dict[str, NamedTensors], settings: OptimSettings) -> list[dict[str, Any]]:
    """Torch param groups: matrices with weight decay, the rest without."""
    matrices = [p for _, p in groups["matrices"]]
    others = [p for group in PARAMETER_GROUPS[1:] for _, p in groups[group]]
    params_and_decay = ((matrices, settings.weight_decay), (others, 0.0))
    return [
        {"params": params, "weight_decay": decay} for params, decay in params_and_decay if params
    ]
