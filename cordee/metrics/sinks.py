"""Where records go: append-only JSON lines that survive any kill, and lines for a person.

One writer a file. A line is written whole and flushed; a disk that refuses keeps the line in memory
and is tried again with the next one, so that training never waits for a log. Not here: trackers;
they read these files.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from cordee.config.paths import free_name
from cordee.metrics.lines import open_plain, record_of, records, step_of, whole_lines

KEPT_LINES = 100_000


class JsonLines:
    """An append-only file of JSON objects. OSError never escapes; `failure` says what it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure = ""
        self._waiting: list[str] = []
        self._mended = False
        self._file: tuple[int, int] | None = None
        self._cut: int | None = None

    def set_aside(self) -> str:
        """Moves what is no file (a folder, a pipe, a device) out of this sink's way; its new name,
        "" when there was nothing to move."""
        try:
            if stat.S_ISREG(os.stat(self.path).st_mode):
                return ""
        except OSError as error:
            if error.errno != errno.ELOOP:  # links in a circle; else it is missing, or not known
                return ""
        number = 1
        while os.path.lexists(aside := self.path.with_name(f"{self.path.name}.aside-{number}")):
            number += 1
        try:
            os.rename(self.path, aside)
        except OSError as error:
            self.failure = f"{self.path.name}: {error.strerror}"
            return ""
        return aside.name

    def take_over(self) -> None:
        """Makes this the only writer: path becomes another file with the same lines, and what a
        former writer still appends, frozen as it may be between opening and writing, goes nowhere.
        Only two sinks that both took the file over mind each other."""
        try:
            if self.path.exists() and self._file == _identity(os.stat(self.path)):
                return
            write_whole(self.path, _content(self.path))
            self._file = _identity(os.stat(self.path))
        except OSError as error:
            self.failure = f"{self.path.name}: {error.strerror}"

    def cut(self, step: int) -> None:
        """Drops records of later steps, now or as soon as the disk lets; what is written meanwhile
        waits."""
        self._cut = step
        self._waiting = [line for line in self._waiting if (_step_in(line) or 0) <= step]
        self.flush()

    def last_step(self) -> int:
        """The step of the last record, written or waiting; 0 when there is none."""
        waiting = (_step_in(line) for line in reversed(self._waiting))
        found = next((step for step in waiting if step is not None), None)
        return last_step(self.path) if found is None else found

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record (kept in memory while the disk refuses, the newest 100,000)."""
        self._waiting.append(_line(record))
        del self._waiting[:-KEPT_LINES]
        self.flush()

    def flush(self) -> bool:
        """Writes what waits; False when the disk refuses."""
        data = "".join(self._waiting).encode()
        try:
            self._do_cut()
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

    def _do_cut(self) -> None:
        if self._cut is None:
            return
        there = self.path.is_file()
        if there and self._file in (None, _identity(os.stat(self.path))):
            cut_after(self.path, self._cut)
            if self._file is not None:
                self._file = _identity(os.stat(self.path))
        self._cut = None

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


def _step_in(line: str) -> int | None:
    return step_of(record_of(line.encode()) or {})


def _content(path: Path) -> bytes:
    if not path.exists():
        return b""
    with open_plain(path) as stream:
        return stream.read()


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
    """Every record of a file that can be read (`lines.py`); a missing file has none."""
    return list(records(path))


def last_event(folder: Path) -> dict[str, Any]:
    """The newest record of a run folder's events.jsonl; empty when there is none."""
    return next(iter(deque(records(folder / "events.jsonl"), maxlen=1)), {})


def last_step(path: Path) -> int:
    """The step of a file's last record that has one; 0 when none has. Reads the file's end, and all
    of it only when the end says nothing."""
    with suppress(OSError), open_plain(path) as stream:
        stop = stream.seek(0, os.SEEK_END)
        for length in (1 << 16, 1 << 22):
            stream.seek(max(0, stop - length))
            for line in reversed(stream.read(length).splitlines()):
                step = step_of(record_of(line) or {})
                if step is not None:
                    return step
    return max(deque((step_of(record) or 0 for record in records(path)), maxlen=1), default=0)


def cut_after(path: Path, step: int) -> None:
    """Drops the records of later steps than `step`, and what stands between them. OSError.

    They are a file's end, as a rule, and cutting that needs no room on a disk; a file whose steps
    go back and forth is written anew.
    """
    cut, again = -1, False
    kept: list[bytes] = []
    for start, line in whole_lines(path):
        at = step_of(record_of(line) or {})
        if at is not None and at > step and cut < 0:
            cut = start
        elif at is not None and at <= step and cut >= 0:
            again = True
        if at is not None and at <= step:
            kept.append(line)
    if again:
        write_whole(path, b"".join(line.rstrip(b"\n") + b"\n" for line in kept))
    elif cut >= 0:
        os.truncate(path, cut)


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
