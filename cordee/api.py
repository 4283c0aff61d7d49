"""The library: a configuration, training, plans and trained models as Python calls.

torch is imported inside the functions that need it: `cordee --help` and a process that only starts
ranks never load it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cordee.config.from_hf import with_hub_shape
from cordee.config.load import load
from cordee.config.run import Run
from cordee.errors import ConfigError
from cordee.launcher.local_cluster import measure_cluster
from cordee.launcher.prepare import (
    PreparedRun,
    Report,
    launch_local_ranks,
    prepare_run,
    read_vocabulary_size,
    resolve_config,
)
from cordee.planner.plan import Plan, make_plan
from cordee.planner.recipe import resolve_for_machine
from cordee.report.reader import last_event

if TYPE_CHECKING:
    from torch import nn

    from cordee.data.loader import MapDataset
    from cordee.parallel.engine import MicrobatchLoader
    from cordee.parallel.parallelize import LossFunction
    from cordee.training.user_parts import Parts


@dataclass(frozen=True, kw_only=True)
class Config(Run):
    """A run's settings, checked: `config.optim.lr`, `config.run.dir`, `config.model.layers`."""

    @classmethod
    def load(cls, *words: str | os.PathLike[str], **sections: Mapping[str, Any]) -> Config:
        """`words` as on the command line: one TOML file, and `key=value` overrides. `sections` are
        tables of values, which precede over the file, as overrides do over both:
        `Config.load("run.toml", "run.seed=1", optim={"name": "adamw", "lr": 0.01})`. ConfigError
        for what cannot be obeyed."""
        overrides = [word for word in words if isinstance(word, str) and _is_override(word)]
        files = [os.fspath(word) for word in words if word not in overrides]
        if len(files) > 1:
            raise ConfigError(
                "a configuration is one file, and overrides",
                values={"files": files},
                fix='Config.load("run.toml", "optim.lr=0.01")',
            )
        file = files[0] if files else None
        run = resolve_config(load(file, overrides, sections).run)
        return cls(**{field.name: getattr(run, field.name) for field in fields(Run)})


def _is_override(word: str) -> bool:
    """Whether a word is `key=value`, and not the path of a file with `=` in its name."""
    return "=" in word and not (word.endswith(".toml") and os.path.isfile(word))


def train(
    config: Run,
    parts: Parts | None = None,
    *,
    model: nn.Module | None = None,
    loss: LossFunction | None = None,
    data: MapDataset | None = None,
    held_out: MapDataset | None = None,
    loader: MicrobatchLoader | None = None,
) -> Report:
    """Trains to the run's end, or on from where it stands.

    Parts of your own (`cordee.Parts` says what they are): a model, its loss(model, *batch), samples
    to train on and held out. Outside a launcher the plan's ranks are started on this machine; not
    with parts, which cannot travel: there is one rank, or those of torchrun, each with the same
    parts. Raises CordeeError with exit code 2 before anything is started or written when the
    configuration or its input is wrong.
    """
    named = {"model": model, "loss": loss, "data": data, "held_out": held_out, "loader": loader}
    own: dict[str, Any] = {name: part for name, part in named.items() if part is not None}
    if parts is None and not own:
        return run_prepared(prepare_run(config))
    from cordee.training.user_parts import Parts

    parts = replace(parts or Parts(), **own)
    parts.check(config)
    return run_prepared(prepare_run(config, parts.info), parts)


def run_prepared(prepared_run: PreparedRun, parts: Parts | None = None) -> Report:
    """Starts ranks here, or is one, as the preparation decided; nothing of a finished run."""
    folder, end_event = prepared_run.run.run.dir, prepared_run.status.end_event
    if end_event is not None:
        return Report(folder, 0, end_event)
    if prepared_run.is_launcher:
        exit_code = launch_local_ranks(prepared_run.run, prepared_run.plan)
        event = last_event(Path(folder))
        return Report(folder, exit_code, event if event.get("event") == "finished" else None)
    from cordee.training.user_parts import Parts
    from cordee.training.worker import run_worker

    return run_worker(prepared_run, parts or Parts())


def plan(config: Run) -> Plan:
    """The layout that this machine's devices would train in, and its predicted time, memory and
    traffic (`plan.why`, `plan.predicted`); what `cordee plan` prints as a table. Starts nothing."""
    run = with_hub_shape(resolve_config(config))
    cluster, profile = measure_cluster(run.launch.probe)
    vocabulary = read_vocabulary_size(run)
    run, _ = resolve_for_machine(run, cluster, vocabulary)
    return replace(make_plan(run, cluster, vocabulary), profile=profile)


def load_model(run: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The trained model of a run, by its folder, its name under runs/, or one of its checkpoints:
    a module on the CPU in eval mode, with the newest complete weights in fp32. A run of a module of
    your own needs that module as `model`, which is filled and returned. ConfigError, or
    CheckpointError: there are no weights of such a model."""
    from cordee.training.weights import load_trained_model

    return load_trained_model(os.fspath(run), model)[0]
