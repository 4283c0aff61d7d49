"""A Keras 3 model (torch backend) as a module that can be sharded: it owns all its numbers.

A Keras model is an nn.Module, but its layers keep the tensors they were built with; sharded, it
computes with stale ones and nothing says so. Here parameters and states (BatchNorm's statistics,
generators of dropout) are this module's own and are handed to Keras' `stateless_call`. Not here:
TensorFlow or JAX. Traded away: units within the model; only the whole can be sharded, because its
layers are not modules of it. Keras is imported here alone, late: it is an extra.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cordee.errors import ConfigError, LayoutError
from cordee.layout.axes import Layout


class KerasModel(nn.Module):
    """Adapter of a built Keras model; `forward(*inputs)` is the model's call in the present mode.

    Names are by position (Keras' own change when a model is made twice): `p003_kernel`,
    `s001_moving_mean`. In training mode a forward moves the states, as Keras does.
    """

    def __init__(self, model: Any) -> None:
        """`model` is a keras.Model whose variables exist. ConfigError when it cannot be used."""
        super().__init__()
        keras = _keras()
        if not isinstance(model, keras.Model) or not model.built:
            raise ConfigError(
                "that is no built Keras model",
                values={"model": type(model).__name__},
                fix="call it once on a batch, or give it an Input",
            )
        self._inside = (model,)
        self._trained = self._own("p", model.trainable_variables, True)
        self._moved = self._own("s", model.non_trainable_variables, False)

    def forward(self, *inputs: Tensor) -> Any:
        """The model's outputs."""
        trained = [getattr(self, name) for name in self._trained]
        states = [getattr(self, name) for name in self._moved]
        outputs, moved = self._inside[0].stateless_call(
            trained, states, *inputs, training=self.training
        )
        if self.training:
            with torch.no_grad():
                for state, new in zip(states, moved, strict=True):
                    state.copy_(new)
        return outputs

    def give_back(self) -> Any:
        """The Keras model itself, with this module's (whole) numbers in its variables."""
        model = self._inside[0]
        for names, variables in (
            (self._trained, model.trainable_variables),
            (self._moved, model.non_trainable_variables),
        ):
            for name, variable in zip(names, variables, strict=True):
                variable.assign(getattr(self, name).detach())
        return model

    def check(self, layout: Layout, exact: bool) -> None:
        """LayoutError for what cannot be done with a model whose inside is not known."""
        for axis in ("tensor", "pipeline", "context", "expert"):
            if getattr(layout, axis) > 1:
                raise LayoutError(
                    f"a Keras model is not cut by {axis}: its layers are not modules of it",
                    values={f"layout.{axis}": getattr(layout, axis)},
                    fix=f"layout.{axis}=1; layout.shard cuts the model as a whole",
                )
        if exact and layout.size > 1 and self._moved:
            raise LayoutError(
                "states that a forward moves (BatchNorm, dropout) depend on which rank computes "
                "which microbatch",
                values={"run.exact": True, "layout": layout.describe(), "states": len(self._moved)},
                fix="run.exact=false, or a model without them",
            )
        if exact and layout.shard > 1:
            raise LayoutError(
                "exact sums over shards need units to gather, and a Keras model is one",
                values={"run.exact": True, "layout.shard": layout.shard},
                fix="layout.shard=1",
            )

    def _own(self, letter: str, variables: Any, trained: bool) -> list[str]:
        names = []
        for place, variable in enumerate(variables):
            name = f"{letter}{place:03d}_{variable.name.replace('.', '_')}"
            value = variable.value.detach().clone()
            if trained:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
            names.append(name)
        return names


def _keras() -> ModuleType:
    """Keras on torch; ConfigError when it is missing or runs on something else."""
    fix = "KERAS_BACKEND=torch in the environment, before keras is imported for the first time"
    try:
        import keras
    except ImportError as error:
        missing = getattr(error, "name", None) == "keras"
        raise ConfigError(
            "Keras is not installed" if missing else "Keras cannot be imported on its backend",
            values={"error": str(error)},
            fix='pip install "cordee[keras]"' if missing else fix,
        ) from error
    backend = keras.config.backend()
    if backend != "torch":
        raise ConfigError("Keras runs on another backend", values={"backend": backend}, fix=fix)
    found: ModuleType = keras
    return found
