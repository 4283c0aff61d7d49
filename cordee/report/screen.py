"""What a person sees while a run runs: a bar on a terminal, plain lines anywhere else.

Everything goes to standard error; standard output belongs to --json. Ranks other than 0 get a
silent screen, so that the loop never asks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cordee.dist.streams import print_to_stderr

LINE_INTERVAL_S = 5.0

MIN_WIDE_COLUMNS = 116
"""Columns from which the bar has room beside a whole line."""


class Screen:
    """Lines and, on a terminal, a bar. `silent` shows nothing."""

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line_s = 0.0
        self._start_s = time.monotonic()

    def print_line(self, text: str) -> None:
        if self._silent:
            return
        with suppress(OSError, ValueError):  # a closed terminal, a full disk: no reason to end
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                print_to_stderr(text)

    def show_step(self, row: Mapping[str, Any], fraction_done: float, remaining_s: float) -> None:
        """The state after a step: `fraction_done` in [0, 1], `remaining_s` seconds to go."""
        if not self._silent:
            with suppress(OSError, ValueError):
                self._show_step(row, fraction_done, remaining_s)

    def _show_step(self, row: Mapping[str, Any], fraction_done: float, remaining_s: float) -> None:
        if self._console.is_terminal:
            is_narrow = self._console.width < MIN_WIDE_COLUMNS
            text = format_short_row(row, remaining_s) if is_narrow else format_row(row, remaining_s)
            if self._bar is None:
                self._bar = _make_bar(self._console, 8 if is_narrow else 24)
                self._bar.start()
                self._task = self._bar.add_task("", total=1.0, text=text)
            self._bar.update(self._task, completed=fraction_done, text=text)
            return
        now_s = time.monotonic()
        if now_s - self._last_line_s >= LINE_INTERVAL_S or row["step"] <= 1 or fraction_done >= 1:
            self._last_line_s = now_s
            print_to_stderr(format_row(row, remaining_s))

    def close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with suppress(OSError, ValueError):
                bar.stop()


def format_row(row: Mapping[str, Any], remaining_s: float) -> str:
    """A metrics row as one line."""
    skip_suffix = "  SKIPPED" if row.get("skipped") else ""
    return (
        f"step {row['step']:>5}  loss {_format_number(row['loss'])}{_format_bits(row, '  ')}"
        f"  gnorm {_format_number(row['grad_norm'])}"
        f"  lr {row['lr']:.2e}  {row['tokens_per_s'] / 1000:.1f}k tok/s"
        f"  {_format_clock(remaining_s)} left{skip_suffix}"
    )


def format_short_row(row: Mapping[str, Any], remaining_s: float) -> str:
    """The same within 63 columns, for a terminal of 80."""
    skip_suffix = " SKIPPED" if row.get("skipped") else ""
    return (
        f"{row['step']} loss {_format_number(row['loss'])}{_format_bits(row, ' ')}"
        f" gnorm {_format_number(row['grad_norm'])} lr {row['lr']:.1e}"
        f" {row['tokens_per_s'] / 1000:.1f}k/s {_format_clock(remaining_s)}{skip_suffix}"
    )


def _make_bar(console: Console, width: int) -> Progress:
    columns = TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[text]}")
    return Progress(BarColumn(bar_width=width), *columns, console=console, refresh_per_second=8)


def _format_bits(row: Mapping[str, Any], separator: str) -> str:
    """Bits per byte; nothing where a finite loss has none (a caller's samples)."""
    if row["bits_per_byte"] is None and row["loss"] is not None:
        return ""
    return f"{separator}bpb {_format_number(row['bits_per_byte'])}"


def _format_number(value: float | None) -> str:
    return "  nan" if value is None else f"{value:.3f}"


def _format_clock(time_s: float) -> str:
    minutes, seconds = divmod(max(0, round(time_s)), 60)
    return f"{minutes}:{seconds:02d}"
