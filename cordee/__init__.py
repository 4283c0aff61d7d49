"""Cordée: the same descent on any devices. `cordee.train(run)` is the one way in.

Names are looked up when they are used, so that paper verbs of the command line never import torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "train": "cordee.train",
    "Report": "cordee.train",
    "Parts": "cordee.parts",
    "Run": "cordee.config.run",
    "load": "cordee.config.load",
    "override": "cordee.config.load",
    "launch": "cordee.testing",
}
__all__ = ["Parts", "Report", "Run", "launch", "load", "override", "train"]


def _import_checked(module_name: str) -> ModuleType:
    """A module of the package; ConfigError on a system that it cannot run on."""
    importlib.import_module("cordee.system").check_system()
    return importlib.import_module(module_name)


class _LazyModule(ModuleType):
    """The package as a module whose names are looked up late.

    `train` is both a file and the function in it: importing the file would put the module in the
    function's place, so the name is a property that always gives the function.
    """

    @property
    def train(self) -> Any:
        """The function `cordee.train.train`."""
        return _import_checked("cordee.train").train

    @train.setter
    def train(self, _: Any) -> None:
        """The import system's own assignment is not wanted."""

    def __getattr__(self, name: str) -> Any:
        if name in _EXPORTS:
            return getattr(_import_checked(_EXPORTS[name]), name)
        raise AttributeError(f"module 'cordee' has no attribute {name!r}")


sys.modules[__name__].__class__ = _LazyModule
