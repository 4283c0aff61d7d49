"""A Keras 3 model (torch backend) as a module that can be sharded: it owns all its tensors.

A Keras model is an nn.Module, but its layers keep the tensors that they were built with; sharded,
it would compute with stale ones, without an error. So this module has copies of parameters and
states (BatchNorm's statistics, generators of dropout) and hands them to Keras' `stateless_call`.
Keras is an extra, and imported late.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cordee.errors import ConfigError, LayoutError
from cordee.layout.axes import Layout


class KerasModel(nn.Module):
    """Adapter of a built Keras model; `forward(*inputs)` returns the model's outputs.

    Names are by position, `p003_kernel`, `s001_moving_mean`: Keras' own change when a model is made
    twice. In training mode a forward updates the states, as Keras does.
    """

    def __init__(self, model: Any) -> None:
        """`model` is a keras.Model whose variables exist. ConfigError when it cannot be used."""
        super().__init__()
        keras = _import_keras()
        if not isinstance(model, keras.Model) or not model.built:
            raise ConfigError(
                "that is no built Keras model",
                values={"model": type(model).__name__},
                fix="call it once on a batch, or give it an Input",
            )
        self._keras_model = (model,)
        self._parameter_names = self._register("p", model.trainable_variables, True)
        self._state_names = self._register("s", model.non_trainable_variables, False)

    def forward(self, *inputs: Tensor) -> Any:
        parameters = [getattr(self, name) for name in self._parameter_names]
        states = [getattr(self, name) for name in self._state_names]
        outputs, new_states = self._keras_model[0].stateless_call(
            parameters, states, *inputs, training=self.training
        )
        if self.training:
            with torch.no_grad():
                for state, new_state in zip(states, new_states, strict=True):
                    state.copy_(new_state)
        return outputs

    def to_keras(self) -> Any:
        """The Keras model itself, with this module's (whole) values in its variables."""
        model = self._keras_model[0]
        for names, variables in (
            (self._parameter_names, model.trainable_variables),
            (self._state_names, model.non_trainable_variables),
        ):
            for name, variable in zip(names, variables, strict=True):
                variable.assign(getattr(self, name).detach())
        return model

    def check_layout(self, layout: Layout, exact: bool) -> None:
        """LayoutError for layouts that need to know the inside of the model."""
        for axis in ("tensor", "pipeline", "context", "expert"):
            if getattr(layout, axis) > 1:
                raise LayoutError(
                    f"a Keras model is not cut by {axis}: its layers are not modules of it",
                    values={f"layout.{axis}": getattr(layout, axis)},
                    fix=f"layout.{axis}=1; layout.shard cuts the model as a whole",
                )
        if exact and layout.size > 1 and self._state_names:
            raise LayoutError(
                "states that a forward moves (BatchNorm, dropout) depend on which rank computes "
                "which microbatch",
                values={
                    "run.exact": True,
                    "layout": layout.describe(),
                    "states": len(self._state_names),
                },
                fix="run.exact=false, or a model without them",
            )
        if exact and layout.shard > 1:
            raise LayoutError(
                "exact sums over shards need units to gather, and a Keras model is one",
                values={"run.exact": True, "layout.shard": layout.shard},
                fix="layout.shard=1",
            )

    def _register(self, prefix: str, variables: Any, is_trainable: bool) -> list[str]:
        names = []
        for index, variable in enumerate(variables):
            name = f"{prefix}{index:03d}_{variable.name.replace('.', '_')}"
            value = variable.value.detach().clone()
            if is_trainable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
            names.append(name)
        return names


def _import_keras() -> ModuleType:
    """Keras on torch; ConfigError when it is missing or runs on something else."""
    fix = "KERAS_BACKEND=torch in the environment, before keras is imported for the first time"
    try:
        import keras
    except ImportError as error:
        is_missing = getattr(error, "name", None) == "keras"
        raise ConfigError(
            "Keras is not installed" if is_missing else "Keras cannot be imported on its backend",
            values={"error": str(error)},
            fix='pip install "cordee[keras]"' if is_missing else fix,
        ) from error
    backend = keras.config.backend()
    if backend != "torch":
        raise ConfigError("Keras runs on another backend", values={"backend": backend}, fix=fix)
    module: ModuleType = keras
    return module
