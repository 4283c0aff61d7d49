"""Update rules over parameter groups whose state exists from the start.

SGD, Adam, AdamW and Adafactor are torch.optim's, called in their functional form: its classes
import torch._dynamo when the first one is made, 1.4 s of processor time in every process. Kernels
are `fused`, or foreach: the bits of one tensor at a time in a tenth of the calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim._adafactor import adafactor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

OptimizerState = dict[str, Tensor]
ParamGroup = dict[str, Any]
"""A param group as torch.optim has it: "params", "lr" and the rule's options."""


class UpdateRule(ABC):
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
        """Forgets all gradients (or fills them with zeros)."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad.zero_()

    def _groups_with_grads(
        self,
    ) -> Iterator[tuple[ParamGroup, list[Tensor], list[Tensor], list[OptimizerState]]]:
        """Each group with its parameters that have a gradient, the gradients, the states."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                grads, states = [p.grad for p in parameters], [self.state[p] for p in parameters]
                yield group, parameters, grads, states


class SGD(UpdateRule):
    """Stochastic gradient descent, with momentum unless that is 0."""

    def __init__(
        self, groups: Iterable[ParamGroup], lr: float, momentum: float, fused: bool
    ) -> None:
        self._momentum, self._fused = momentum, fused
        super().__init__(groups, {"lr": lr})

    def init_state(self, parameter: Tensor) -> OptimizerState:
        """The momentum."""
        return {"momentum_buffer": torch.zeros_like(parameter)} if self._momentum else {}

    @torch.no_grad()
    def step(self) -> None:
        """m <- momentum m + g; p <- p - lr m."""
        for group, parameters, grads, states in self._groups_with_grads():
            momentum_buffers: list[Tensor | None] = [s["momentum_buffer"] for s in states if s]
            sgd(parameters, grads, momentum_buffers, weight_decay=group["weight_decay"],
                momentum=self._momentum, lr=group["lr"], dampening=0.0, nesterov=False,
                maximize=False, foreach=not self._fused, fused=self._fused)  # fmt: skip


class Adam(UpdateRule):
    """Adam (Kingma & Ba 2015), or AdamW (Loshchilov & Hutter 2019) where decay is
    `decoupled_decay`."""

    def __init__(
        self, groups: Iterable[ParamGroup], lr: float, betas: tuple[float, float], eps: float, *,
        decoupled_decay: bool, fused: bool,
    ) -> None:  # fmt: skip
        self._betas, self._eps, self._fused = betas, eps, fused
        self._update_fn = adamw if decoupled_decay else adam
        super().__init__(groups, {"lr": lr})

    def init_state(self, parameter: Tensor) -> OptimizerState:
        """Both moments and the count of steps, which fused kernels read on the device."""
        device = parameter.device if self._fused else "cpu"
        return {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    @torch.no_grad()
    def step(self) -> None:
        """p <- p - lr m / (sqrt(v) + eps), with moments m and v of the gradient, bias removed."""
        for group, parameters, grads, states in self._groups_with_grads():
            exp_avgs, exp_avg_sqs, steps = (
                [s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step")
            )
            self._update_fn(
                parameters, grads, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False,
                beta1=self._betas[0], beta2=self._betas[1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=self._eps, maximize=False,
                foreach=not self._fused, fused=self._fused,
            )  # fmt: skip


class Adafactor(UpdateRule):
    """Adafactor (Shazeer & Stern 2018) with the library's defaults."""

    def __init__(self, groups: Iterable[ParamGroup], lr: float) -> None:
        super().__init__(groups, {"lr": lr})

    def init_state(self, parameter: Tensor) -> OptimizerState:
        """Second moments by row and by column of the last two dims; of vectors whole."""
        step = torch.zeros(())
        if parameter.ndim < 2:
            return {"step": step, "variance": torch.zeros_like(parameter)}
        rows, columns = parameter[..., :1], parameter[..., :1, :]
        return {
            "step": step, "row_var": torch.zeros_like(rows), "col_var": torch.zeros_like(columns)
        }  # fmt: skip

    @torch.no_grad()
    def step(self) -> None:
        """p <- p - max(1e-3, rms(p)) min(lr, 1/sqrt(t)) g / sqrt(v), clipped to rms 1."""
        for group, parameters, grads, states in self._groups_with_grads():
            row_vars, col_vars, variances = (
                [s.get(name) for s in states] for name in ("row_var", "col_var", "variance")
            )
            adafactor(
                parameters,
                grads,
                row_vars,
                col_vars,
                variances,
                [s["step"] for s in states],
                d=1.0,
                lr=group["lr"],
                beta2_decay=-0.8,
                weight_decay=group["weight_decay"],
                eps1=None,  # type: ignore[arg-type]
                eps2=1e-3,
                maximize=False,
            )
