"""The wish to leave, by every signal that asks for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from cordee.elastic.run_progress import ABORT_SIGNALS, STOP_EXIT_CODES, STOP_SIGNALS, RunProgress
from cordee.training.stop_request import catch_stop_signals


@pytest.fixture(autouse=True)
def restore_signal_handlers() -> Iterator[None]:
    """This process's actions, put back afterwards."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_requests_a_stop(number: signal.Signals) -> None:
    previous_handler = signal.getsignal(number)
    with catch_stop_signals() as stop_request:
        assert stop_request.signal_number is None
        os.kill(os.getpid(), number)
        assert (stop_request.signal_number, stop_request.exit_code, stop_request.signal_name) == (
            number,
            128 + number,
            number.name,
        )
        assert stop_request.exit_code in STOP_EXIT_CODES
        is_default_handler = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert is_default_handler == (number in ABORT_SIGNALS)
        for other_signal in set(STOP_SIGNALS) - set(ABORT_SIGNALS):
            os.kill(os.getpid(), other_signal)  # ends nothing, and changes no wish
        assert stop_request.signal_number == number
    assert signal.getsignal(number) is previous_handler


def test_what_a_sender_was_told_to_ignore_is_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with catch_stop_signals() as stop_request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop_request.signal_number is None


def test_two_abort_signals_stop_at_once() -> None:
    usr1, term = signal.SIGUSR1, signal.SIGTERM
    for signals, expected in (
        ((usr1, usr1), False), ((usr1, term), False), ((term,), False),
        ((term, usr1), False), ((term, signal.SIGINT), True), ((usr1, term, term), True),
    ):  # fmt: skip
        assert (
            RunProgress(received_signals=[int(number) for number in signals]).must_stop_now
            == expected
        )
