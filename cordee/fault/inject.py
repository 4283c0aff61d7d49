"""Drills: named points at which a rank kills itself or spoils a gradient, when told to.

Not here: faults from outside (tests send real signals). Unarmed, a point costs a
comparison or two.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Drill:
    """What to provoke on this rank. Steps are numbered from 1, as in metrics.jsonl. `mark` is told
    of every point, for whoever watches this rank."""

    rank: int
    kill: tuple[str, int, int] | None
    poison: tuple[range, int] | None
    mark: Callable[[str, int], None] | None = None

    def point(self, name: str, step: int) -> None:
        """A fault point: kills this process when the drill names it."""
        if self.mark is not None:
            self.mark(name, step)
        if self.kill is not None and self.kill == (name, step, self.rank):
            os.kill(os.getpid(), signal.SIGKILL)

    def spoil(self, gradients: Sequence[Tensor], step: int) -> None:
        """Makes one element of the first gradient not a number when the drill says so."""
        if self.poison is not None and step in self.poison[0] and self.rank == self.poison[1]:
            gradients[0].view(-1)[0] = float("nan")


def make_drill(
    armed: str, poisoned: str, rank: int, mark: Callable[[str, int], None] | None = None
) -> Drill:
    """Reads one entry of `fault.kill` and `fault.poison` (checked before, config/check.py)."""
    kill = poison = None
    if armed:
        name, step, who = armed.rsplit(":", 2)
        kill = (name, int(step), int(who))
    if poisoned:
        steps, who = poisoned.rsplit(":", 1)
        first, _, last = steps.partition("-")
        poison = (range(int(first), int(last or first) + 1), int(who))
    return Drill(rank, kill, poison, mark)
