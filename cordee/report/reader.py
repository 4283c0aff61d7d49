"""A run's folder as it is read: lines of JSON, and the columns, events and settings made of them.

Files of a run that lives, was killed or was damaged hold half lines, forged numbers or are no files
at all. What cannot be read is an absence and no error. No torch, no numpy.
"""

from __future__ import annotations

import io
import json
import os
import stat
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

from cordee.config.load import load
from cordee.config.run import Run
from cordee.errors import ConfigError

MAX_LINE_BYTES = 16 << 20
"""Longest line that is read; a longer one is no record of ours."""
MAX_DOCUMENT_BYTES = 64 << 20
"""Longest file that is read as one JSON object."""
MAX_STEP = 1 << 53
"""A step number beyond it is none: charts and counters hold all below exactly."""
MAX_DIGITS = 24
"""Longest whole number in a record (64 bits have 20); longer ones overflow what reads them."""
MIN_MAGNITUDE, MAX_MAGNITUDE = 1e-100, 1e100
"""What lies beyond is no measurement: products and quotients of such are no numbers, or 0."""
METRIC_COLUMNS = (
    "loss", "bits_per_byte", "grad_norm", "lr", "tokens", "tokens_per_s", "step_s", "data_s",
    "comm_s", "bytes_sent", "bytes_inside", "memory_bytes", "mfu", "islands", "skipped",
    "elapsed_s",
)  # fmt: skip

Column = list[float | None]


def open_regular_file(path: Path) -> io.BufferedReader:
    """Opens a regular file to read; a link to one is followed. OSError for all else: a pipe would
    be waited for, a device may have no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "not a regular file", str(path))
    return open(descriptor, "rb")


def lines_with_offsets(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of each line of a file up to the size that it had when it was opened; what is
    longer than MAX_LINE_BYTES is given as an empty line. OSError."""
    with open_regular_file(path) as stream:
        offset, end = 0, os.fstat(stream.fileno()).st_size
        while offset < end:
            line = stream.readline(min(MAX_LINE_BYTES, end - offset))
            if not line:
                return
            line_start, offset = offset, offset + len(line)
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_LINE_BYTES)
                    offset += len(line)
                line = b""
            yield line_start, line


def iter_records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file one by one: a long run's do not fit a small machine's memory."""
    with suppress(OSError):
        for _, line in lines_with_offsets(path):
            record = parse_record(line)
            if record is not None:
                yield record


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every record of a file that can be read; a missing file has none."""
    return list(iter_records(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """A file that is one JSON object; {} for any other."""
    with suppress(OSError), open_regular_file(path) as stream:
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
        return (parse_record(data) if len(data) <= MAX_DOCUMENT_BYTES else None) or {}
    return {}


def last_event(folder: Path) -> dict[str, Any]:
    """The newest record of a run folder's events.jsonl; empty when there is none."""
    return next(iter(deque(iter_records(folder / "events.jsonl"), maxlen=1)), {})


def last_step(path: Path) -> int:
    """The step of a file's last record that has one; 0 when none has. Reads the file's end, and all
    of it only when the end says nothing."""
    with suppress(OSError), open_regular_file(path) as stream:
        stop = stream.seek(0, os.SEEK_END)
        for length in (1 << 16, 1 << 22):
            stream.seek(max(0, stop - length))
            for line in reversed(stream.read(length).splitlines()):
                if (step := line_step(line)) is not None:
                    return step
    steps = (record_step(record) or 0 for record in iter_records(path))
    return max(deque(steps, maxlen=1), default=0)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None when it is none."""
    try:
        record = _DECODER.decode(line.decode("utf-8-sig", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def record_step(record: Mapping[str, Any]) -> int | None:
    """The step that a record is of; None when it says none."""
    return as_count(record.get("step"))


def line_step(line: bytes) -> int | None:
    """The step that a line's record is of; None when it says none."""
    return record_step(parse_record(line) or {})


def as_count(value: object) -> int | None:
    """A count as records hold them; None for anything else."""
    return value if type(value) is int and 0 <= value <= MAX_STEP else None


def _parse_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError("a number of no record")
    return int(text)


_DECODER = json.JSONDecoder(parse_int=_parse_int)


def finite_number(value: object) -> float | None:
    """A finite number, or the sum of numbers by name (bytes by axis); None for anything else."""
    if isinstance(value, dict):
        entries = (entry for entry in value.values() if not isinstance(entry, dict))
        return sum((finite_number(entry) or 0.0 for entry in entries), 0.0)
    # Neither comparison holds for NaN.
    if isinstance(value, (int, float)) and -MAX_MAGNITUDE < value < MAX_MAGNITUDE:
        return float(value) if abs(value) > MIN_MAGNITUDE else 0.0
    return None


@dataclass(frozen=True)
class RunRecords:
    """A run's folder in memory; columns are as long as `steps`, None where nothing was written."""

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
    events = [e for e in iter_records(folder / "events.jsonl") if isinstance(e.get("event"), str)]
    files = [folder / n for n in ("metrics.jsonl", "events.jsonl", "layers.jsonl", "run.toml")]
    return RunRecords(
        folder=folder,
        steps=steps.steps,
        columns=steps.columns,
        layer_steps=layers.steps,
        layers=layers.columns,
        events=[_clean_event(event) for event in events],
        prediction=_read_prediction(folder / "plan.json"),
        run=_read_run_settings(folder / "run.toml"),
        last_write_s=max((f.stat().st_mtime for f in files if f.is_file()), default=0.0),
    )


def read_metrics(run: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Columns of a run's metrics.jsonl, as `pandas.DataFrame` takes them: `step` (int) and, as long
    as it, every other number of a row as float, NaN where a step has none. A step that was done
    again counts once, as last written. `run`: its folder, or a name under runs/. ConfigError when
    neither holds metrics."""
    paths = [folder / "metrics.jsonl" for folder in (Path(run), Path("runs") / run)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ConfigError(
            "there are no metrics of such a run",
            values={"RUN": str(run)},
            fix="the folder of a run, which holds metrics.jsonl",
        )
    table = _StepTable(())
    for record in iter_records(path):
        numbers = {k: v for k, v in record.items() if not isinstance(v, str | list) and k != "step"}
        table.add(record_step(record), numbers)
    columns = {name: [nan if v is None else v for v in c] for name, c in table.columns.items()}
    return {"step": table.steps, **columns}


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
    numbers = {k: finite_number(v) for k, v in prediction.items() if not isinstance(v, dict)}
    return {k: v for k, v in numbers.items() if v is not None}


def _read_run_settings(path: Path) -> Run | None:
    """The run's configuration; None where it is missing or another version's."""
    if not path.is_file():
        return None
    try:
        return load(str(path)).run
    except ConfigError:
        return None
