"""Drills: named points at which a rank kills itself, raises or spoils a gradient, when told to.

Not here: faults from outside (tests send real signals). Unarmed, a point costs a
comparison or two.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from cordee.config.run import FaultSettings

HANG = "!"
"""Before a point's name: the rank hangs there instead of dying."""


@dataclass(frozen=True)
class Drill:
    """What to provoke on this rank. Steps are numbered from 1, as in metrics.jsonl. `mark` is told
    of every point, for whoever watches this rank."""

    rank: int
    kill: tuple[str, int, int] | None
    crash: tuple[str, int, int] | None
    poison: tuple[range, int] | None
    mark: Callable[[str, int], None] | None = None

    def point(self, name: str, step: int) -> None:
        """A fault point: kills this process, or raises RuntimeError, when the drill names it."""
        if self.mark is not None:
            self.mark(name, step)
        if self.kill is not None and self.kill == (name, step, self.rank):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kill is not None and self.kill == (HANG + name, step, self.rank):
            while True:  # its heart goes on beating
                time.sleep(1.0)
        if self.crash is not None and self.crash == (name, step, self.rank):
            raise RuntimeError(f"the drill fault.crash at {name} of step {step}")

    def spoil(self, gradients: Sequence[Tensor], step: int) -> None:
        """Makes one element of the first gradient not a number when the drill says so."""
        if self.poison is not None and step in self.poison[0] and self.rank == self.poison[1]:
            gradients[0].view(-1)[0] = float("nan")


def make_drill(
    armed: str, fault: FaultSettings, rank: int, mark: Callable[[str, int], None] | None = None
) -> Drill:
    """Reads `armed`, an entry of `fault.kill`, and the drills of every generation (checked before,
    config/check.py)."""
    poison = None
    if fault.poison:
        steps, who = fault.poison.rsplit(":", 1)
        first, _, last = steps.partition("-")
        poison = (range(int(first), int(last or first) + 1), int(who))
    return Drill(rank, _parse(armed), _parse(fault.crash), poison, mark)


def _parse(armed: str) -> tuple[str, int, int] | None:
    if not armed:
        return None
    name, step, who = armed.rsplit(":", 2)
    return name, int(step), int(who)
