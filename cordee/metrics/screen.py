"""What a person sees while a run runs: a bar on a terminal, plain lines anywhere else.

Everything goes to standard error; standard output belongs to --json. Not here: files. Ranks other
than 0 get a silent screen, so the loop never asks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cordee.dist.streams import say

LINE_EVERY_S = 5.0

WIDE = 116
"""Columns from which the bar has room beside a whole line."""


class Screen:
    """Lines and, on a terminal, a bar. `silent` shows nothing."""

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line = 0.0
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """One line."""
        if self._silent:
            return
        with suppress(OSError, ValueError):  # a closed terminal, a full disk: no reason to end
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                say(text)

    def step(self, row: Mapping[str, Any], done: float, left_s: float) -> None:
        """The state after a step: `done` in [0, 1], `left_s` seconds to go."""
        if not self._silent:
            with suppress(OSError, ValueError):
                self._step(row, done, left_s)

    def _step(self, row: Mapping[str, Any], done: float, left_s: float) -> None:
        if self._console.is_terminal:
            narrow = self._console.width < WIDE
            text = brief(row, left_s) if narrow else describe(row, left_s)
            if self._bar is None:
                self._bar = _make_bar(self._console, 8 if narrow else 24)
                self._bar.start()
                self._task = self._bar.add_task("", total=1.0, text=text)
            self._bar.update(self._task, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_S or row["step"] <= 1 or done >= 1:
            self._last_line = now
            say(describe(row, left_s))

    def close(self) -> None:
        """Takes the bar away; its last state stays on the screen."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with suppress(OSError, ValueError):
                bar.stop()


def describe(row: Mapping[str, Any], left_s: float) -> str:
    """A metrics row as one line."""
    mark = "  SKIPPED" if row.get("skipped") else ""
    return (
        f"step {row['step']:>5}  loss {_number(row['loss'])}{_bits(row, '  ')}"
        f"  gnorm {_number(row['grad_norm'])}"
        f"  lr {row['lr']:.2e}  {row['tokens_per_s'] / 1000:.1f}k tok/s"
        f"  {_clock(left_s)} left{mark}"
    )


def brief(row: Mapping[str, Any], left_s: float) -> str:
    """The same within 63 columns, for a terminal of 80."""
    mark = " SKIPPED" if row.get("skipped") else ""
    return (
        f"{row['step']} loss {_number(row['loss'])}{_bits(row, ' ')}"
        f" gnorm {_number(row['grad_norm'])} lr {row['lr']:.1e}"
        f" {row['tokens_per_s'] / 1000:.1f}k/s {_clock(left_s)}{mark}"
    )


def _make_bar(console: Console, width: int) -> Progress:
    return Progress(
        BarColumn(bar_width=width),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[text]}"),
        console=console,
        refresh_per_second=8,
    )


def _bits(row: Mapping[str, Any], space: str) -> str:
    """Bits per byte; nothing where a finite loss has none (classifiers)."""
    bits = row["bits_per_byte"]
    return "" if bits is None and row["loss"] is not None else f"{space}bpb {_number(bits)}"


def _number(value: float | None) -> str:
    return "  nan" if value is None else f"{value:.3f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"
