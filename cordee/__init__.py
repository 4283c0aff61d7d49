"""Cordée: the same descent on any devices. `cordee.train(run)` is the one way in.

Names are looked up when they are used, so that verbs without torch never import it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "train": "cordee.training.worker",
    "Report": "cordee.training.worker",
    "Parts": "cordee.training.user_parts",
    "Run": "cordee.config.run",
    "load": "cordee.config.load",
    "override": "cordee.config.load",
    "launch": "cordee.launcher.run_ranks",
    "read_metrics": "cordee.report.reader",
}
__all__ = ["Parts", "Report", "Run", "launch", "load", "override", "read_metrics", "train"]


def __getattr__(name: str) -> Any:
    """The public name, of the module that defines it; ConfigError on a system without its calls."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'cordee' has no attribute {name!r}")
    importlib.import_module("cordee.hardware.system").check_system()
    return getattr(importlib.import_module(_EXPORTS[name]), name)
