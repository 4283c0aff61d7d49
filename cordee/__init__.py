"""Cordée: the same descent on any devices. `cordee.train(config)` is the one way in.

Names are looked up when they are used, so that verbs without torch never import it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cordee.api import Config, load_model, plan, train
    from cordee.config.load import load, override
    from cordee.config.run import Run
    from cordee.launcher.prepare import Report
    from cordee.launcher.run_ranks import launch
    from cordee.report.reader import read_metrics
    from cordee.training.local_trainer import LocalTrainer as Trainer
    from cordee.training.user_parts import Parts

__version__ = "0.1.0"

_EXPORTS = {
    "Config": "cordee.api.Config",
    "Trainer": "cordee.training.local_trainer.LocalTrainer",
    "train": "cordee.api.train",
    "plan": "cordee.api.plan",
    "load_model": "cordee.api.load_model",
    "Report": "cordee.launcher.prepare.Report",
    "Parts": "cordee.training.user_parts.Parts",
    "Run": "cordee.config.run.Run",
    "load": "cordee.config.load.load",
    "override": "cordee.config.load.override",
    "launch": "cordee.launcher.run_ranks.launch",
    "read_metrics": "cordee.report.reader.read_metrics",
}
__all__ = [
    "Config", "Parts", "Report", "Run", "Trainer", "launch", "load", "load_model", "override",
    "plan", "read_metrics", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The public name, of the module that defines it; ConfigError on a system without its calls."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'cordee' has no attribute {name!r}")
    importlib.import_module("cordee.hardware.system").check_system()
    module, _, attribute = _EXPORTS[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)
