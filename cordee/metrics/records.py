"""A run's folder in memory: its steps, layers, events, plan and configuration, read with patience.

PAPER: no torch, no numpy. A half-written last line, a missing file or a missing key is met in any
folder of a run that lives or was killed, so each is an absence and no error. Not here: what is made
of it (`report.py`, `page.py`).
"""

from __future__ import annotations

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

SMALLEST, LARGEST = 1e-100, 1e100
"""What lies beyond is no measurement: products and quotients of such are no numbers, or 0."""


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

    def add(self, step: int | None, values: object) -> None:
        """One step's values. A step that is not later than the last one takes back what came after:
        the run had gone back to a checkpoint."""
        if step is None or not isinstance(values, dict):
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
            # Nearly all are: numbers that need no second look.
            short = value.__class__ is float and SMALLEST < value < LARGEST
            column.append(value if short else number(value))


def number(value: object) -> float | None:
    """A finite number, or the sum of numbers by name (bytes by axis); None for anything else."""
    if isinstance(value, dict):
        parts = (part for part in value.values() if not isinstance(part, dict))
        return sum((number(part) or 0.0 for part in parts), 0.0)
    if isinstance(value, (int, float)) and -LARGEST < value < LARGEST:  # neither is NaN there
        return float(value) if abs(value) > SMALLEST else 0.0
    return None


def _event(record: dict[str, Any]) -> dict[str, Any]:
    """An event without the numbers in it that are none: NaN, infinities, a step that cannot be."""
    found = {k: number(v) if isinstance(v, float) else v for k, v in record.items()}
    odd = [k for k, v in found.items() if isinstance(v, int) and number(v) is None]
    if step_of(record) is None:
        odd.append("step")
    return {key: value for key, value in found.items() if key not in odd}


def _predicted(path: Path) -> dict[str, float]:
    found = document(path).get("predicted")
    found = found if isinstance(found, dict) else {}
    plain = {k: v for k, v in found.items() if not isinstance(v, dict)}
    numbers = {k: number(v) for k, v in plain.items()}
    return {k: v for k, v in numbers.items() if v is not None}


def _events(path: Path) -> list[dict[str, Any]]:
    """Records that name an event; a step that is none is left out."""
    return [_event(record) for record in records(path) if isinstance(record.get("event"), str)]


def _run_of(path: Path) -> Run | None:
    """The run's configuration; None where it is missing or another version's."""
    if not path.is_file():
        return None
    try:
        return load(str(path)).run
    except ConfigError:
        return None
