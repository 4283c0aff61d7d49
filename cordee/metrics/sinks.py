"""Where records go: append-only JSON lines that survive any kill, and lines for a person.

One writer a file. A line is written whole and flushed; a disk that refuses keeps the line in memory
and is tried again with the next one, so that training never waits for a log. Not here: trackers;
they read these files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from cordee.config.paths import free_name

KEPT_LINES = 100_000


class JsonLines:
    """An append-only file of JSON objects. OSError never escapes; `failure` says what it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure = ""
        self._waiting: list[str] = []
        self._mended = False
        self._file: tuple[int, int] | None = None

    def take_over(self) -> None:
        """Makes this the only writer: path becomes another file with the same lines, and what a
        former writer still appends, frozen as it may be between opening and writing, goes nowhere.
        Only two sinks that both took the file over mind each other."""
        try:
            if self.path.exists() and self._file == _identity(os.stat(self.path)):
                return
            write_whole(self.path, self.path.read_bytes() if self.path.exists() else b"")
            self._file = _identity(os.stat(self.path))
        except OSError as error:
            self.failure = f"{self.path.name}: {error.strerror}"

    def keep(self, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drops all other records (`keep_lines`)."""
        keep_lines(self.path, keep)
        if self._file is not None:
            self._file = _identity(os.stat(self.path))

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record (kept in memory while the disk refuses, the newest 100,000)."""
        self._waiting.append(_line(record))
        del self._waiting[:-KEPT_LINES]
        self.flush()

    def flush(self) -> bool:
        """Writes what waits; False when the disk refuses."""
        data = "".join(self._waiting).encode()
        try:
            # Unbuffered: a buffer would be written again by close, after the cut.
            with open(self.path, "a+b", buffering=0) as stream:
                if self._file not in (None, _identity(os.fstat(stream.fileno()))):
                    self._waiting.clear()
                    self.failure = f"{self.path.name}: another host writes it now"
                    return False
                if not self._mended:
                    _cut_half_line(stream)
                    self._mended = True
                start = stream.seek(0, os.SEEK_END)
                try:
                    written = 0
                    while written < len(data):
                        written += stream.write(data[written:]) or 0
                except OSError:
                    os.ftruncate(stream.fileno(), start)
                    raise
        except OSError as error:
            self.failure = f"{self.path.name}: {error.strerror}"
            return False
        self._waiting.clear()
        self.failure = ""
        return True

    def sync(self) -> None:
        """Makes what was written survive a power cut, as far as the disk allows."""
        if not self.flush() or not self.path.exists():
            return
        try:
            with open(self.path, "ab") as stream:
                os.fsync(stream.fileno())
        except OSError as error:
            self.failure = f"{self.path.name}: {error.strerror}"


def _identity(known: os.stat_result) -> tuple[int, int]:
    return known.st_dev, known.st_ino


def _cut_half_line(stream: FileIO) -> None:
    """Drops what stands after the last line end: a writer was killed in the middle of a line."""
    end = stop = stream.seek(0, os.SEEK_END)
    while stop > 0:
        start = max(0, stop - 4096)
        stream.seek(start)
        newline = stream.read(stop - start).rfind(b"\n")
        if newline >= 0 or start == 0:
            whole = start + newline + 1
            if whole < end:
                os.ftruncate(stream.fileno(), whole)
            return
        stop = start


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a file; a half-written last line and a missing file are no error."""
    if not path.exists():
        return []
    records = []
    with open(path, encoding="utf-8-sig", errors="replace") as stream:
        for line in stream:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # no JSON; or thousands of digits, or of brackets
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def last_event(folder: Path) -> dict[str, Any]:
    """The newest record of a run folder's events.jsonl; empty when there is none."""
    events = read_lines(folder / "events.jsonl")
    return events[-1] if events else {}


def last_step(path: Path) -> int:
    """The step of a file's last whole record; 0 when it has none. Reads the file's end only."""
    if not path.exists():
        return 0
    with open(path, "rb") as stream:
        stop = stream.seek(0, os.SEEK_END)
        for length in (1 << 16, 1 << 22, stop):
            stream.seek(max(0, stop - length))
            for line in reversed(stream.read().splitlines()):
                # Whatever stands there instead of a record: no JSON, no object, no number.
                with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    return int(json.loads(line)["step"])
    return 0


def keep_lines(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> int:
    """Rewrites a file with the records that `keep` says, atomically; returns how many stayed."""
    if not path.exists():
        return 0
    records = [record for record in read_lines(path) if keep(record)]
    write_whole(path, "".join(map(_line, records)).encode())
    return len(records)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is seen whole or not at all."""
    part = free_name(path)
    try:
        with open(part, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def now() -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON, which has no number that is not finite: null in its place."""
    try:
        return json.dumps(record, allow_nan=False, default=_plain) + "\n"
    except ValueError:
        return json.dumps(_finite(record), allow_nan=False, default=_plain) + "\n"


def _finite(value: Any) -> Any:
    """A copy with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    plain = _plain(value) if not isinstance(value, str | int | float | None) else value
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def _plain(value: object) -> object:
    """Numbers of other libraries as plain ones."""
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)
