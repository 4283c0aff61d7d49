"""What a caller may bring to a run instead of what is built from its configuration.

How these parts are wrapped is in `parallel/external.py`. Every rank must bring the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from cordee.config.run import MemorySettings, Run
from cordee.data.loader import MapDataset
from cordee.errors import ConfigError
from cordee.launcher.prepare import PartsInfo
from cordee.parallel.engine import MicrobatchLoader
from cordee.parallel.parallelize import LossFunction


@dataclass(frozen=True)
class Parts:
    """Parts of a run that a caller brings ready-made; None means that the house builds it.

    `model` is any module. Alone, `model(tokens, targets)` must return the summed loss in nats. With
    `loss`, `loss(model, *batch)` returns the summed loss of a batch, and `data` gives its samples
    (see data/loader.py; `held_out` those of the evaluation); the mean is over samples.
    `loader` gives microbatches of token ids.
    """

    model: nn.Module | None = None
    loader: MicrobatchLoader | None = None
    loss: LossFunction | None = None
    data: MapDataset | None = None
    held_out: MapDataset | None = None

    @property
    def has_any(self) -> bool:
        """Whether something was brought, which cannot travel to other processes."""
        return any(part is not None for part in vars(self).values())

    @property
    def model_name(self) -> str:
        """Type of the model that was brought; "" when the house builds it."""
        return "" if self.model is None else type(self.model).__name__

    @property
    def info(self) -> PartsInfo:
        """What the preparation of a run must know of them."""
        parameters = [] if self.model is None else list(self.model.parameters())
        count = sum(parameter.numel() for parameter in parameters)
        return PartsInfo(self.model_name, count, self.data is not None, self.has_any)

    def check(self, run: Run) -> None:
        """ConfigError for what `run` asks of a part that is not the house's own."""
        self._check_types()
        if (self.loss is None) != (self.data is None) or (self.loss and self.model is None):
            raise ConfigError(
                "a loss of your own needs your model and your data, and they need it",
                values={n: getattr(self, n) is not None for n in ("model", "loss", "data")},
                fix="cordee.train(run, model=module, loss=function, data=samples)",
            )
        if self.held_out is not None and self.data is None:
            raise ConfigError(
                "held-out samples of your own need samples of your own to train on",
                values={"held_out": type(self.held_out).__name__, "data": None},
                fix="cordee.train(run, model=module, loss=function, data=samples, held_out=others)",
            )
        if self.loader is not None and run.run.epochs:
            raise ConfigError(
                "a loader of your own does not say how long a pass over its samples is",
                values={"run.epochs": run.run.epochs},
                fix="run.steps=1000",
            )
        if self.model is None:
            return
        name = self.model_name
        if run.memory != MemorySettings():
            raise ConfigError(
                "memory.* is for the built-in model",
                values={"model": name, **asdict(run.memory)},
                fix="leave memory.* out, and checkpoint inside your module",
            )
        if run.run.compile != "none" or run.run.precision == "fp8":
            key_values = {"run.compile": run.run.compile, "run.precision": run.run.precision}
            raise ConfigError(
                "run.compile and fp8 are for the blocks of the built-in model",
                values={"model": name, **key_values},
                fix="run.compile=none run.precision=bf16, and compile inside your module",
            )
        for axis in ("tensor", "pipeline", "context", "expert"):
            degree = getattr(run.layout, axis)
            if degree not in (1, "auto"):
                raise ConfigError(
                    "a module of your own is replicated or sharded, not cut otherwise",
                    values={"model": name, f"layout.{axis}": degree},
                    fix=f"layout.{axis}=1, or layout.shard={degree}",
                )

    def _check_types(self) -> None:
        """ConfigError for a part that cannot be what its name says."""
        samples = ("__len__", "__getitem__")
        requirements: dict[str, tuple[str, Callable[[Any], bool]]] = {
            "model": ("a module, made", lambda part: isinstance(part, nn.Module)),
            "loss": ("a function: loss(model, *batch)", callable),
            "data": ("samples with len() and [i]", lambda part: _has_methods(part, samples)),
            "held_out": ("samples with len() and [i]", lambda part: _has_methods(part, samples)),
            "loader": (
                "what gives microbatches",
                lambda part: _has_methods(part, ("begin", "microbatch")),
            ),
        }
        for name, (requirement, is_valid) in requirements.items():
            part = getattr(self, name)
            if part is not None and not is_valid(part):
                raise ConfigError(
                    f"the {name} that was brought is not {requirement}",
                    values={name: repr(part)[:200]},
                    fix="cordee.train(run, model=module, loss=function, data=samples)",
                )
        for name in ("data", "held_out"):
            part = getattr(self, name)
            if part is not None and not len(part):
                raise ConfigError(
                    f"the {name} that was brought has no samples",
                    values={name: type(part).__name__},
                    fix=f"{name} with a sample, or leave held_out out",
                )


def _has_methods(part: Any, methods: Sequence[str]) -> bool:
    """Whether an instance (not a class) has these methods."""
    return not isinstance(part, type) and all(hasattr(type(part), name) for name in methods)
