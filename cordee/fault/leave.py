"""The wish to leave: the first signal that asks for it is kept as one, a second SIGINT, SIGTERM or
SIGQUIT ends the process.

Not here: what is done about the wish (`desk.py` notes it in the tally, `train.py` acts on it).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from cordee.dist.line import Line
from cordee.fault.course import HURRY, SIGNALS, is_heeded


@dataclass
class Asked:
    """Whether this process was asked to leave together with all, and by which signal: its own, or
    its supervisor's."""

    own: int | None = None
    line: Line | None = None

    @property
    def number(self) -> int | None:
        """The signal; None while nobody asks."""
        return self.own if self.line is None else self.line.asked

    @property
    def by(self) -> str:
        """The signal's name, or "another rank"."""
        return signal.Signals(self.number).name if self.number else "another rank"

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell says it; SIGINT's when another rank was asked."""
        return 128 + (self.number or self.own or signal.SIGINT)


@contextmanager
def leaving(line: Line | None = None) -> Iterator[Asked]:
    """Turns the first of SIGNALS into a wish; a second one of HURRY ends the process at once.

    A worker that has a `line` and is told to go alone says so; its supervisor decides who goes.
    """
    asked = Asked(line=line)

    def on_signal(number: int, _: FrameType | None) -> None:
        if asked.own is None:
            asked.own = number
            if line is not None:
                line.leave(number)
        if number in HURRY:
            for hurry in HURRY:
                signal.signal(hurry, signal.SIG_DFL)

    try:
        before = {s: signal.signal(s, on_signal) for s in SIGNALS if is_heeded(s)}
    except ValueError:  # not the main thread: signals are somebody else's business
        before = {}
    try:
        yield asked
    finally:
        if line is not None:
            line.hush()
        for number, action in before.items():
            signal.signal(number, action)
