"""Starts the ranks of one machine and watches them: no torch, no port, no orphan.

A rank is the same command again with a launcher's variables set, so a rank under torchrun and one
of ours run the same code. The first rank to fail ends the others, and its own words come last.
Not here: restarts and membership (`fault/`). Traded away: ranks on other machines; a scheduler or
torchrun starts those.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from cordee.dist.start import PLAN_FILE, rank_environment

GRACE_S = 10.0
"""How long ranks may take to leave after the first one failed."""


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    words: IO[bytes]
    descriptor: int


def launch(command: Sequence[str], processes: int, threads: int, plan: str) -> int:
    """Runs `command` (arguments after the interpreter) as `processes` ranks; returns exit code.

    `plan` is laid beside the ranks' store (PLAN_FILE): what was decided here is not decided again.

    Rank 0 keeps the terminal; what the others say on standard error is kept and shown only when
    one of them fails first. SIGINT and SIGTERM are passed on; the second one is passed on too.
    """
    folder = Path(tempfile.mkdtemp(prefix="cordee-"))
    (folder / PLAN_FILE).write_text(plan)
    ranks: list[_Rank] = []
    passed_on: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        passed_on.append(number)
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in range(processes):
            ranks.append(_start(command, number, processes, threads, folder))
        return _watch(ranks, passed_on)
    finally:
        _end(ranks, 0.0)
        for number, action in before.items():
            signal.signal(number, action)
        shutil.rmtree(folder, ignore_errors=True)


def _start(
    command: Sequence[str], number: int, processes: int, threads: int, folder: Path
) -> _Rank:
    words = open(folder / f"rank-{number}.txt", "w+b")  # noqa: SIM115 - lives as long as the rank
    process = subprocess.Popen(
        [sys.executable, *command],
        env=rank_environment(number, processes, str(folder / "store"), threads),
        stdin=subprocess.DEVNULL,
        stdout=None if number == 0 else subprocess.DEVNULL,
        stderr=None if number == 0 else words,
        # Its own group: the terminal's Ctrl-C reaches us alone, and we pass it on once.
        process_group=0,
    )
    return _Rank(number, process, words, os.pidfd_open(process.pid))


def _watch(ranks: list[_Rank], passed_on: Sequence[int]) -> int:
    """Waits for all ranks; the first that fails decides the exit code.

    A rank that died of a signal which we passed on did what it was told: 128 + its number.
    """
    left = {rank.number: rank for rank in ranks}
    with selectors.DefaultSelector() as selector:
        for one in ranks:
            selector.register(one.descriptor, selectors.EVENT_READ, one)
        while left:
            for key, _ in selector.select():
                rank: _Rank = key.data
                selector.unregister(rank.descriptor)
                code = rank.process.wait()
                del left[rank.number]
                if code != 0:
                    if -code in passed_on:
                        _end(list(left.values()), 0.0)
                        return 128 - code
                    _end(list(left.values()), GRACE_S)
                    _tell(rank, code)
                    return code if code > 0 else 1
    return 0


def _end(ranks: list[_Rank], grace_s: float) -> None:
    """Waits up to `grace_s`, then kills what is left, and closes what was open."""
    deadline = time.monotonic() + grace_s
    for rank in ranks:
        try:
            rank.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()
        if not rank.words.closed:
            rank.words.flush()


def _tell(rank: _Rank, code: int) -> None:
    """The first failing rank's own words, last on the screen."""
    rank.words.seek(0)
    said = rank.words.read().decode(errors="replace").strip()
    if code in (130, 143):
        return
    died = f"was killed by signal {-code}" if code < 0 else f"left with exit code {code}"
    print(f"\nrank {rank.number} (pid {rank.process.pid}) {died} first", file=sys.stderr)
    if said:
        print(said, file=sys.stderr)
