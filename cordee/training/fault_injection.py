"""Drills: named points at which a rank kills itself, raises or spoils a gradient, when told to.

Unarmed, a point costs a comparison or two.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from cordee.config.run import FaultSettings

HANG_PREFIX = "!"
"""Before a point's name: the rank hangs there instead of dying."""


@dataclass(frozen=True)
class FaultInjector:
    """What to provoke on this rank. Steps are numbered from 1, as in metrics.jsonl. `on_point` is
    told of every point, for whoever watches this rank."""

    rank: int
    kill_point: tuple[str, int, int] | None
    crash_point: tuple[str, int, int] | None
    poison_steps: tuple[range, int] | None
    on_point: Callable[[str, int], None] | None = None

    def fault_point(self, name: str, step: int) -> None:
        """A fault point: kills this process, or raises RuntimeError, when the drill names it."""
        if self.on_point is not None:
            self.on_point(name, step)
        if self.kill_point is not None and self.kill_point == (name, step, self.rank):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kill_point is not None and self.kill_point == (HANG_PREFIX + name, step, self.rank):
            while True:  # its heart goes on beating
                time.sleep(1.0)
        if self.crash_point is not None and self.crash_point == (name, step, self.rank):
            raise RuntimeError(f"the drill fault.crash at {name} of step {step}")

    def corrupt_gradient(self, gradients: Sequence[Tensor], step: int) -> None:
        """Makes one element of the first gradient not a number when the drill says so."""
        if (
            self.poison_steps is not None
            and step in self.poison_steps[0]
            and self.rank == self.poison_steps[1]
        ):
            gradients[0].view(-1)[0] = float("nan")


def make_fault_injector(
    drill_text: str,
    fault: FaultSettings,
    rank: int,
    on_point: Callable[[str, int], None] | None = None,
) -> FaultInjector:
    """Reads `armed`, an entry of `fault.kill`, and the drills of every generation (checked before,
    config/validate.py)."""
    poison_steps = None
    if fault.poison:
        range_text, rank_text = fault.poison.rsplit(":", 1)
        first_step, _, last_step = range_text.partition("-")
        poison_steps = (range(int(first_step), int(last_step or first_step) + 1), int(rank_text))
    return FaultInjector(
        rank, _parse_point(drill_text), _parse_point(fault.crash), poison_steps, on_point
    )


def _parse_point(drill_text: str) -> tuple[str, int, int] | None:
    if not drill_text:
        return None
    name, step, rank_text = drill_text.rsplit(":", 2)
    return name, int(step), int(rank_text)
