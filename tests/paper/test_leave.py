"""The wish to leave, by every signal that asks for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from cordee.fault.course import ASKED, HURRY, SIGNALS, Course
from cordee.fault.leave import leaving


@pytest.fixture(autouse=True)
def own_actions() -> Iterator[None]:
    """This process's actions, put back afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, action in before.items():
        signal.signal(number, action)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_wish(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with leaving() as asked:
        assert asked.number is None
        os.kill(os.getpid(), number)
        assert (asked.number, asked.exit_code, asked.by) == (number, 128 + number, number.name)
        assert asked.exit_code in ASKED
        hurried = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert hurried == (number in HURRY)
        for gentle in set(SIGNALS) - set(HURRY):
            os.kill(os.getpid(), gentle)  # ends nothing, and changes no wish
        assert asked.number == number
    assert signal.getsignal(number) is before


def test_what_a_sender_was_told_to_ignore_is_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with leaving() as asked:
        os.kill(os.getpid(), signal.SIGHUP)
        assert asked.number is None


def test_two_of_a_kind_that_hurries_are_a_hurry() -> None:
    gentle, hurry = signal.SIGUSR1, signal.SIGTERM
    for told, hurries in (
        ((gentle, gentle), False), ((gentle, hurry), False), ((hurry,), False),
        ((hurry, gentle), False), ((hurry, signal.SIGINT), True), ((gentle, hurry, hurry), True),
    ):  # fmt: skip
        assert Course(signals=[int(number) for number in told]).hurries == hurries
