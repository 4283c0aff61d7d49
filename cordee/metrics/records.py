"""A run's folder in memory: its steps, layers, events, plan and configuration, read with patience.

PAPER: no torch, no numpy. A half-written last line, a missing file or a missing key is met in any
folder of a run that lives or was killed, so each is an absence and no error. Not here: what is made
of it (`report.py`, `page.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee.config.load import load
from cordee.config.run import Run
from cordee.errors import ConfigError
from cordee.metrics.lines import document, records, step_of

COLUMNS = (
    "loss", "bits_per_byte", "grad_norm", "lr", "tokens", "tokens_per_s", "step_s", "data_s",
    "comm_s", "bytes_sent", "bytes_inside", "memory_bytes", "mfu", "islands", "skipped",
    "elapsed_s",
)  # fmt: skip

Column = list[float | None]


@dataclass(frozen=True)
class Records:
    """A run's folder in memory; columns are as long as `steps`, None where nothing was written."""

    folder: Path
    steps: list[int]
    columns: Mapping[str, Column]
    layer_steps: list[int]
    layers: Mapping[str, Column]
    events: list[dict[str, Any]]
    predicted: Mapping[str, float]
    run: Run | None
    written: float
    """Time of the last write, in seconds since the epoch; 0 when there is none."""

    def seen(self, name: str) -> list[float]:
        """The values of a column that were written, in order."""
        return [v for v in self.columns[name] if v is not None]

    def event(self, name: str) -> dict[str, Any] | None:
        """The last event of that name."""
        return next((e for e in reversed(self.events) if e.get("event") == name), None)


def read_run(folder: Path) -> Records:
    """Reads a run's folder. A step written twice (a run that went back) counts as last written."""
    steps, layers = _Table(COLUMNS), _Table(())
    for record in records(folder / "metrics.jsonl"):
        steps.add(step_of(record), record)
    for record in records(folder / "layers.jsonl"):
        layers.add(step_of(record), record.get("grad_norm"))
    files = [folder / n for n in ("metrics.jsonl", "events.jsonl", "layers.jsonl", "run.toml")]
    return Records(
        folder=folder,
        steps=steps.steps,
        columns=steps.columns,
        layer_steps=layers.steps,
        layers=layers.columns,
        events=_events(folder / "events.jsonl"),
        predicted=_predicted(folder / "plan.json"),
        run=_run_of(folder / "run.toml"),
        written=max((f.stat().st_mtime for f in files if f.is_file()), default=0.0),
    )


class _Table:
    """Columns over steps, filled line by line: the lines themselves are not kept."""

    def __init__(self, names: Sequence[str]) -> None:
        self.fixed = bool(names)
        self.steps: list[int] = []
        self.columns: dict[str, Column] = {name: [] for name in names}

    def add(self, step: object, values: object) -> None:
        """One step's values. A step that is not later than the last one takes back what came after:
        the run had gone back to a checkpoint."""
        if not isinstance(step, int) or not isinstance(values, dict):
            return
        if self.steps and step <= self.steps[-1]:
            del self.steps[bisect_left(self.steps, step) :]
            for column in self.columns.values():
                del column[len(self.steps) :]
        for name in () if self.fixed else values:
            if name not in self.columns:
                self.columns[name] = [None] * len(self.steps)
        self.steps.append(step)
        for name, column in self.columns.items():
            value = values.get(name)
            short = value.__class__ is float and value - value == 0  # nearly all: a finite float
            column.append(value if short else number(value))


def number(value: object) -> float | None:
    """A finite number, or the sum of numbers by name (bytes by axis); None for anything else."""
    if isinstance(value, dict):
        return sum((number(part) or 0.0 for part in value.values()), 0.0)
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _predicted(path: Path) -> dict[str, float]:
    found = document(path).get("predicted")
    found = found if isinstance(found, dict) else {}
    plain = {k: v for k, v in found.items() if not isinstance(v, dict)}
    numbers = {k: number(v) for k, v in plain.items()}
    return {k: v for k, v in numbers.items() if v is not None}


def _events(path: Path) -> list[dict[str, Any]]:
    """Records that name an event; a step that is none is left out."""
    named = [e for e in records(path) if isinstance(e.get("event"), str)]
    return [{k: v for k, v in e.items() if k != "step" or step_of(e) is not None} for e in named]


def _run_of(path: Path) -> Run | None:
    """The run's configuration; None where it is missing or another version's."""
    if not path.is_file():
        return None
    try:
        return load(str(path)).run
    except ConfigError:
        return None
