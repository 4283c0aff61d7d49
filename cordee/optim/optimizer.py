"""The optimiser of a run: groups of parameters, the update rules over them, the learning rate's
schedule and fp16's loss scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cordee.config.run import OptimSettings
from cordee.errors import CheckpointError
from cordee.layout.tensors import parameter_group
from cordee.optim.muon import MatrixSpec, Muon, MuonUpdate, product_dtype
from cordee.optim.update_rules import LOCAL_OPTIMIZERS, Adam, Optimizer

PARAMETER_GROUPS = ("matrices", "embeddings", "vectors")
"""Kinds of parameters; ClipSettings has limits for each."""

MIN_WARMUP_FACTOR = 0.01
"""Least factor during warm-up: a first step of length zero would be a step thrown away."""

INITIAL_SCALE = 2.0**16
MIN_SCALE = 1.0
MAX_SCALE = 2.0**24
GROWTH_INTERVAL = 2000
"""Good steps in a row after which the scale doubles."""

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
    """One or two optimisers as one: step, rates, state by name. `parameters` maps 'group/name' to
    the parameter; the rates that param groups come with become the peaks."""

    def __init__(self, rules: Sequence[Optimizer], parameters: dict[str, Tensor]) -> None:
        self.rules = rules
        self._parameters = parameters
        self._rates = [_GroupRate(g, float(g["lr"])) for rule in rules for g in rule.param_groups]
        self._state: dict[str, dict[str, Tensor]] = {}
        rule_of = {p: rule for rule in rules for g in rule.param_groups for p in g["params"]}
        for key, parameter in parameters.items():
            self._state[key] = rule_of[parameter].state[parameter]

    @property
    def peak_lr(self) -> float:
        """Peak learning rate, with muon that of the matrices."""
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
        """What `step` needs of other ranks: collective when muon shares its work. Changes neither
        parameters, state nor gradients."""
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
        for rule in self.rules:
            rule.zero_grad(set_to_none=set_to_none)

    def set_lr(self, factor: float) -> None:
        """Sets every group's rate to factor x its peak."""
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
    if settings.name != "muon":
        local_class = LOCAL_OPTIMIZERS[settings.name]
        rules: list[Optimizer] = [
            local_class(_param_groups(groups, settings), settings.peak_lr, settings, fused=fused)
        ]
        return Optimizers(rules, parameters)
    rules = []
    if named_tensors := groups["matrices"]:
        tensors, decay = [p for _, p in named_tensors], settings.weight_decay
        matrix_specs = None if matrices is None else [matrices[name] for name, _ in named_tensors]
        dtype = muon_dtype or product_dtype(tensors[0].device)
        rules.append(
            Muon(tensors, settings.peak_lr, momentum=settings.momentum, weight_decay=decay,
                 dtype=dtype, matrices=matrix_specs)
        )  # fmt: skip
    if groups["embeddings"] or groups["vectors"]:
        other_groups = _param_groups({**groups, "matrices": []}, settings)
        rules.append(Adam(other_groups, settings.adam_lr, settings, fused=fused))
    return Optimizers(rules, parameters)


def _param_groups(groups: dict[str, NamedTensors], settings: OptimSettings) -> list[dict[str, Any]]:
    """Torch param groups: matrices with weight decay, the rest without."""
    matrices = [p for _, p in groups["matrices"]]
    others = [p for group in PARAMETER_GROUPS[1:] for _, p in groups[group]]
    params_and_decay = ((matrices, settings.weight_decay), (others, 0.0))
    return [
        {"params": params, "weight_decay": decay} for params, decay in params_and_decay if params
    ]


def lr_factor(settings: OptimSettings, progress: float, step: int) -> float:
    """Factor on the peak rate for `step` (from 0), which starts at `progress` (0 to 1) of the run.

    Warm-up rises to 1 at `settings.warmup` and is read at the end of the step (from the average
    length of the steps so far), so that it is never 0. Then, down to `settings.final`: constant
    stays; cosine (Loshchilov & Hutter 2017) and linear fall from the end of the warm-up to the end
    of the run; wsd (Hu et al. 2024) is flat and falls linearly over the last `settings.decay`.
    """
    progress = min(max(progress, 0.0), 1.0)
    return _warmup_factor(settings, progress, step) * _decay_factor(settings, progress)


def _warmup_factor(settings: OptimSettings, progress: float, step: int) -> float:
    if progress >= settings.warmup:
        return 1.0
    end = progress * (step + 1) / max(step, 1)
    return min(1.0, max(MIN_WARMUP_FACTOR, end / settings.warmup))


def _decay_factor(settings: OptimSettings, progress: float) -> float:
    if settings.schedule == "constant":
        return 1.0
    start = settings.warmup
    if settings.schedule == "wsd":
        start = max(start, 1.0 - settings.decay)
    if progress <= start:
        return 1.0
    decay_progress = (progress - start) / (1.0 - start)
    remainder = 1.0 - decay_progress
    if settings.schedule == "cosine":
        remainder = 0.5 + 0.5 * math.cos(math.pi * decay_progress)
    return settings.final + (1.0 - settings.final) * remainder


class LossScaler:
    """fp16's factor on the loss, so that small gradients do not become zero (Micikevicius et al.
    2018): it multiplies the loss before backward and divides the summed gradient. Powers of two, so
    that both are exact. `fixed_scale` throughout unless `is_dynamic`.

    `value` and `good_steps` survive a restart. All ranks pass the same summed numbers, so all have
    the same scale (torch's GradScaler would decide on one rank's gradients).
    """

    def __init__(self, is_dynamic: bool, fixed_scale: float = MIN_SCALE) -> None:
        self.is_dynamic = is_dynamic
        self.value = INITIAL_SCALE if is_dynamic else fixed_scale
        self.good_steps = 0

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divides gradients by the scale, in place; exact but for values below 2^-102."""
        if self.value != 1.0:
            torch._foreach_mul_(list(gradients), 1.0 / self.value)

    def update(self, losses: Sequence[float], grad_norm: float) -> str:
        """Adapts to a step; says why it is dropped when its gradient overflowed, else "".

        Doubles after `GROWTH_INTERVAL` good steps, halves at an overflow. A loss that is not finite
        is no overflow of the gradient, and at a scale of 1 there is nothing left to halve: both are
        left to the guard.
        """
        if not self.is_dynamic or not all(map(math.isfinite, losses)):
            return ""
        old_value = self.value
        if math.isfinite(grad_norm):
            self.good_steps += 1
            if self.good_steps >= GROWTH_INTERVAL and old_value < MAX_SCALE:
                self.value, self.good_steps = 2 * old_value, 0
            return ""
        self.good_steps = 0
        if old_value <= MIN_SCALE:
            return ""
        self.value = old_value / 2
        return f"fp16 overflow; loss scale {old_value:.0f} -> {self.value:.0f}"
