"""A request to stop: the first signal that asks for it is kept as one, a second SIGINT, SIGTERM or
SIGQUIT ends the process.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from cordee.dist.worker_channel import SupervisorClient
from cordee.elastic.run_progress import ABORT_SIGNALS, STOP_SIGNALS, is_signal_handled


@dataclass
class StopRequest:
    """Whether this process was asked to leave together with all, and by which signal: its own, or
    its supervisor's."""

    own_signal: int | None = None
    channel: SupervisorClient | None = None

    @property
    def signal_number(self) -> int | None:
        """The signal; None while nobody asks."""
        return self.own_signal if self.channel is None else self.channel.stop_signal

    @property
    def signal_name(self) -> str:
        """The signal's name, or "another rank"."""
        return signal.Signals(self.signal_number).name if self.signal_number else "another rank"

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell says it; SIGINT's when another rank was asked."""
        return 128 + (self.signal_number or self.own_signal or signal.SIGINT)


@contextmanager
def catch_stop_signals(channel: SupervisorClient | None = None) -> Iterator[StopRequest]:
    """Turns the first of SIGNALS into a wish; a second one of HURRY ends the process at once.

    A worker that has a `channel` and is told to go alone says so; its supervisor decides who goes.
    """
    request = StopRequest(channel=channel)

    def on_signal(signal_number: int, _: FrameType | None) -> None:
        if request.own_signal is None:
            request.own_signal = signal_number
            if channel is not None:
                channel.report_preemption(signal_number)
        if signal_number in ABORT_SIGNALS:
            for abort_signal in ABORT_SIGNALS:
                signal.signal(abort_signal, signal.SIG_DFL)

    try:
        previous_actions = {
            s: signal.signal(s, on_signal) for s in STOP_SIGNALS if is_signal_handled(s)
        }
    except ValueError:  # not the main thread: signals are somebody else's business
        previous_actions = {}
    try:
        yield request
    finally:
        if channel is not None:
            channel.release_terminal()
        for signal_number, action in previous_actions.items():
            signal.signal(signal_number, action)
