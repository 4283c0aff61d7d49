"""Where records go: append-only JSON lines that survive any kill, and lines for a person.

One writer a file. A line is written whole and flushed; a disk that refuses keeps the line in memory
and is tried again with the next one, so that training never waits for a log. Not here: trackers;
they read these files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

KEPT_LINES = 100_000


class JsonLines:
    """An append-only file of JSON objects. OSError never escapes; `failure` says what it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure = ""
        self._waiting: list[str] = []

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record (kept in memory while the disk refuses, the newest 100,000)."""
        self._waiting.append(json.dumps(record, allow_nan=False, default=_plain) + "\n")
        del self._waiting[:-KEPT_LINES]
        self.flush()

    def flush(self) -> bool:
        """Writes what waits; False when the disk refuses."""
        data = "".join(self._waiting).encode()
        try:
            with open(self.path, "ab") as stream:
                start = stream.tell()
                try:
                    stream.write(data)
                    stream.flush()
                except OSError:
                    os.ftruncate(stream.fileno(), start)  # no half lines
                    raise
        except OSError as error:
            self.failure = f"{self.path.name}: {error.strerror}"
            return False
        self._waiting.clear()
        self.failure = ""
        return True

    def sync(self) -> None:
        """Makes what was written survive a power cut, as far as the disk allows."""
        if self.flush() and self.path.exists():
            with open(self.path, "ab") as stream:
                os.fsync(stream.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a file; a half-written last line and a missing file are no error."""
    if not path.exists():
        return []
    records = []
    with open(path, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def last_event(folder: Path) -> dict[str, Any]:
    """The newest record of a run folder's events.jsonl; empty when there is none."""
    events = read_lines(folder / "events.jsonl")
    return events[-1] if events else {}


def keep_lines(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> int:
    """Rewrites a file with the records that `keep` says, atomically; returns how many stayed."""
    if not path.exists():
        return 0
    records = [record for record in read_lines(path) if keep(record)]
    beside = path.with_name(path.name + ".part")
    with open(beside, "w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)
    return len(records)


def now() -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _plain(value: object) -> object:
    """Numbers of other libraries as plain ones."""
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)
