"""Update rules over parameter groups whose state exists from the start.

SGD, Adam, AdamW and Adafactor are torch.optim's, called in their functional form: its classes
import torch._dynamo when the first one is made, 1.4 s of processor time in every process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim._adafactor import adafactor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from cordee.config.run import OptimSettings

OptimizerState = dict[str, Tensor]
States = list[OptimizerState]
Tensors = list[Tensor]
ParamGroup = dict[str, Any]
"""A param group as torch.optim has it: "params", "lr" and the rule's options."""


class Optimizer(ABC):
    """Param groups and state by parameter, as in torch.optim.Optimizer."""

    def __init__(
        self, parameters: Iterable[Tensor] | Iterable[ParamGroup], defaults: dict[str, Any]
    ) -> None:
        items: list[Any] = list(parameters)
        groups = items if items and isinstance(items[0], dict) else [{"params": items}]
        self.param_groups: list[ParamGroup] = [{**defaults, **group} for group in groups]
        with torch.no_grad():
            self.state: dict[Tensor, OptimizerState] = {
                p: self.init_state(p) for group in self.param_groups for p in group["params"]
            }

    @abstractmethod
    def init_state(self, parameter: Tensor) -> OptimizerState:
        """A parameter's state before its first step: zeros."""

    @abstractmethod
    def step(self) -> None:
        """Updates every parameter that has a gradient."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients, or fills them with zeros."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad.zero_()


class LocalOptimizer(Optimizer):
    """A rule that updates this rank's part of a tensor by itself.

    fused: one kernel, whose last bits depend on where a tensor is cut. Otherwise the `_foreach_`
    operators, which give the bits of one tensor at a time in a tenth of the calls.
    """

    def __init__(
        self, groups: Iterable[ParamGroup], lr: float, settings: OptimSettings, *, fused: bool
    ) -> None:
        self.settings, self.fused = settings, fused
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                states = [self.state[p] for p in parameters]
                self.update(group, parameters, [p.grad for p in parameters], states)

    @abstractmethod
    def update(self, group: ParamGroup, params: Tensors, grads: Tensors, states: States) -> None:
        """Updates `params` and `states` in place; `group` has "lr" and "weight_decay"."""


class SGD(LocalOptimizer):
    """m <- momentum m + g; p <- p - lr m; without m when optim.name=sgd."""

    def init_state(self, parameter: Tensor) -> OptimizerState:
        return {"momentum_buffer": torch.zeros_like(parameter)} if self.momentum else {}

    @property
    def momentum(self) -> float:
        return self.settings.momentum if self.settings.name == "momentum" else 0.0

    def update(self, group: ParamGroup, params: Tensors, grads: Tensors, states: States) -> None:
        momentum_buffers: list[Tensor | None] = [s["momentum_buffer"] for s in states if s]
        sgd(params, grads, momentum_buffers, weight_decay=group["weight_decay"],
            momentum=self.momentum, lr=group["lr"], dampening=0.0, nesterov=False,
            maximize=False, foreach=not self.fused, fused=self.fused)  # fmt: skip


class Adam(LocalOptimizer):
    """p <- p - lr m / (sqrt(v) + eps), with moments m and v of the gradient, bias removed (Kingma &
    Ba 2015). optim.name=adam adds the decay to the gradient; adamw, and muon for vectors and
    embeddings, take it from the parameter (Loshchilov & Hutter 2019)."""

    def init_state(self, parameter: Tensor) -> OptimizerState:
        return {
            # Fused kernels read the count of steps on the device.
            "step": torch.zeros((), device=parameter.device if self.fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def update(self, group: ParamGroup, params: Tensors, grads: Tensors, states: States) -> None:
        update_fn = adam if self.settings.name == "adam" else adamw
        exp_avgs, exp_avg_sqs, steps = (
            [s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        update_fn(params, grads, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False,
                  beta1=self.settings.beta1, beta2=self.settings.beta2, lr=group["lr"],
                  weight_decay=group["weight_decay"], eps=self.settings.eps, maximize=False,
                  foreach=not self.fused, fused=self.fused)  # fmt: skip


class Adafactor(LocalOptimizer):
    """p <- p - max(1e-3, rms(p)) min(lr, 1/sqrt(t)) g / sqrt(v), clipped to rms 1 (Shazeer & Stern
    2018), with the library's defaults."""

    def init_state(self, parameter: Tensor) -> OptimizerState:
        """Second moments by row and by column of the last two dims; of vectors, of each element."""
        step = torch.zeros(())
        if parameter.ndim < 2:
            return {"step": step, "variance": torch.zeros_like(parameter)}
        rows, columns = parameter[..., :1], parameter[..., :1, :]
        return {
            "step": step, "row_var": torch.zeros_like(rows), "col_var": torch.zeros_like(columns)
        }  # fmt: skip

    def update(self, group: ParamGroup, params: Tensors, grads: Tensors, states: States) -> None:
        row_vars, col_vars, variances = (
            [s.get(name) for s in states] for name in ("row_var", "col_var", "variance")
        )
        adafactor(params, grads, row_vars, col_vars, variances, [s["step"] for s in states],
                  d=1.0, lr=group["lr"], beta2_decay=-0.8, weight_decay=group["weight_decay"],
                  eps1=None, eps2=1e-3, maximize=False)  # type: ignore[arg-type]  # fmt: skip


LOCAL_OPTIMIZERS: Mapping[str, type[LocalOptimizer]] = {
    "sgd": SGD, "momentum": SGD, "adam": Adam, "adamw": Adam, "adafactor": Adafactor,
}  # fmt: skip
"""The class of every rule of `config/update_rules.py` but muon (`muon.py`)."""
