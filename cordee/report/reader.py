"""A run's folder in memory: its steps, layers, events, plan and configuration, read with patience.

PAPER: no torch, no numpy. A half-written last line, a missing file or a missing key is met in any
folder of a run that lives or was killed, so each is an absence and no error. Not here: what is made
of it (`report.py`, `report_page.py`).
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
from cordee.report.jsonl import iter_records, read_json_object, record_step

METRIC_COLUMNS = (
    "loss", "bits_per_byte", "grad_norm", "lr", "tokens", "tokens_per_s", "step_s", "data_s",
    "comm_s", "bytes_sent", "bytes_inside", "memory_bytes", "mfu", "islands", "skipped",
    "elapsed_s",
)  # fmt: skip

Column = list[float | None]

MIN_MAGNITUDE, MAX_MAGNITUDE = 1e-100, 1e100
"""What lies beyond is no measurement: products and quotients of such are no numbers, or 0."""


@dataclass(frozen=True)
class RunRecords:
    """A run's folder in memory; columns are as long as `run_steps`, None where nothing was
    written."""

    folder: Path
    steps: list[int]
    columns: Mapping[str, Column]
    layer_steps: list[int]
    layers: Mapping[str, Column]
    events: list[dict[str, Any]]
    prediction: Mapping[str, float]
    run: Run | None
    last_write_s: float
    """Time of the last write, in seconds since the epoch; 0 when there is none."""

    def column_values(self, name: str) -> list[float]:
        """The values of a column that were written, in order."""
        return [v for v in self.columns[name] if v is not None]

    def last_event(self, name: str) -> dict[str, Any] | None:
        """The last event of that name."""
        return next((e for e in reversed(self.events) if e.get("event") == name), None)


def read_run(folder: Path) -> RunRecords:
    """Reads a run's folder. A step written twice (a run that went back) counts as last written."""
    steps, layers = _StepTable(METRIC_COLUMNS), _StepTable(())
    for record in iter_records(folder / "metrics.jsonl"):
        steps.add(record_step(record), record)
    for record in iter_records(folder / "layers.jsonl"):
        layers.add(record_step(record), record.get("grad_norm"))
    files = [folder / n for n in ("metrics.jsonl", "events.jsonl", "layers.jsonl", "run.toml")]
    return RunRecords(
        folder=folder,
        steps=steps.steps,
        columns=steps.columns,
        layer_steps=layers.steps,
        layers=layers.columns,
        events=_read_events(folder / "events.jsonl"),
        prediction=_read_prediction(folder / "plan.json"),
        run=_read_run_settings(folder / "run.toml"),
        last_write_s=max((f.stat().st_mtime for f in files if f.is_file()), default=0.0),
    )


class _StepTable:
    """Columns over steps, filled line by line: the lines themselves are not kept."""

    def __init__(self, names: Sequence[str]) -> None:
        self.has_fixed_columns = bool(names)
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
        for name in () if self.has_fixed_columns else values:
            if name not in self.columns:
                self.columns[name] = [None] * len(self.steps)
        self.steps.append(step)
        for name, column in self.columns.items():
            value = values.get(name)
            # Nearly all are: numbers that need no second look.
            is_plain = value.__class__ is float and MIN_MAGNITUDE < value < MAX_MAGNITUDE
            column.append(value if is_plain else finite_number(value))


def finite_number(value: object) -> float | None:
    """A finite number, or the sum of numbers by name (bytes by axis); None for anything else."""
    if isinstance(value, dict):
        entries = (entry for entry in value.values() if not isinstance(entry, dict))
        return sum((finite_number(entry) or 0.0 for entry in entries), 0.0)
    if (
        isinstance(value, (int, float)) and -MAX_MAGNITUDE < value < MAX_MAGNITUDE
    ):  # neither is NaN there
        return float(value) if abs(value) > MIN_MAGNITUDE else 0.0
    return None


def _clean_event(record: dict[str, Any]) -> dict[str, Any]:
    """An event without the numbers in it that are none: NaN, infinities, a step that cannot be."""
    fields = {k: finite_number(v) if isinstance(v, float) else v for k, v in record.items()}
    bad_keys = [k for k, v in fields.items() if isinstance(v, int) and finite_number(v) is None]
    if record_step(record) is None:
        bad_keys.append("step")
    return {key: value for key, value in fields.items() if key not in bad_keys}


def _read_prediction(path: Path) -> dict[str, float]:
    prediction = read_json_object(path).get("predicted")
    prediction = prediction if isinstance(prediction, dict) else {}
    scalars = {k: v for k, v in prediction.items() if not isinstance(v, dict)}
    numbers = {k: finite_number(v) for k, v in scalars.items()}
    return {k: v for k, v in numbers.items() if v is not None}


def _read_events(path: Path) -> list[dict[str, Any]]:
    """Records that name an event; a step that is none is left out."""
    return [
        _clean_event(record)
        for record in iter_records(path)
        if isinstance(record.get("event"), str)
    ]


def _read_run_settings(path: Path) -> Run | None:
    """The run's configuration; None where it is missing or another version's."""
    if not path.is_file():
        return None
    try:
        return load(str(path)).run
    except ConfigError:
        return None
