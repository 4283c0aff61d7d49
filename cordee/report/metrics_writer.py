"""Append-only files of JSON lines that survive any kill.

One writer a file. A line is written whole and flushed; a disk that refuses keeps the line in memory
and is tried again with the next one, so that training never waits for a log.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Mapping
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from cordee.config.paths import make_temporary_path
from cordee.report.reader import last_step, line_step, lines_with_offsets, open_regular_file

MAX_PENDING_LINES = 100_000


class JsonLinesWriter:
    """An append-only file of JSON objects. OSError never escapes; `failure` says what it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure = ""
        self._pending_lines: list[bytes] = []
        self._is_tail_clean = False
        self._file_id: tuple[int, int] | None = None
        self._truncation_step: int | None = None

    def move_obstacle(self) -> str:
        """Moves what is no file (a folder, a pipe, a device) out of this sink's way; its new name,
        "" when there was nothing to move."""
        try:
            if stat.S_ISREG(os.stat(self.path).st_mode):
                return ""
        except OSError as error:
            if error.errno != errno.ELOOP:  # links in a circle; else it is missing, or not known
                return ""
        number = 1
        while os.path.lexists(new_path := self.path.with_name(f"{self.path.name}.aside-{number}")):
            number += 1
        try:
            os.rename(self.path, new_path)
        except OSError as error:
            self.failure = f"{self.path.name}: {error.strerror}"
            return ""
        return new_path.name

    def claim_file(self) -> None:
        """Makes this the only writer: path becomes another file with the same lines, and what a
        former writer still appends, frozen as it may be between opening and writing, goes nowhere.
        Only two sinks that both took the file over mind each other."""
        try:
            if self.path.exists() and self._file_id == _file_identity(os.stat(self.path)):
                return
            write_atomically(self.path, _read_content(self.path))
            self._file_id = _file_identity(os.stat(self.path))
        except OSError as error:
            self.failure = f"{self.path.name}: {error.strerror}"

    def truncate_after(self, step: int) -> None:
        """Drops records of later steps, now or as soon as the disk lets; what is written meanwhile
        waits."""
        self._truncation_step = step
        self._pending_lines = [v for v in self._pending_lines if (line_step(v) or 0) <= step]
        self.flush()

    def last_step(self) -> int:
        """The step of the last record, written or waiting; 0 when there is none."""
        pending_steps = map(line_step, reversed(self._pending_lines))
        pending_step = next((step for step in pending_steps if step is not None), None)
        return last_step(self.path) if pending_step is None else pending_step

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record (kept in memory while the disk refuses, the newest 100,000)."""
        self._pending_lines.append(_format_record(record).encode())
        del self._pending_lines[:-MAX_PENDING_LINES]
        self.flush()

    def flush(self) -> bool:
        """Writes what waits; False when the disk refuses."""
        data = b"".join(self._pending_lines)
        try:
            self._apply_truncation()
            # Unbuffered: a buffer would be written again by close, after the cut.
            with open(self.path, "a+b", buffering=0) as stream:
                if self._file_id not in (None, _file_identity(os.fstat(stream.fileno()))):
                    self._pending_lines.clear()
                    self.failure = f"{self.path.name}: another host writes it now"
                    return False
                if not self._is_tail_clean:
                    _truncate_partial_line(stream)
                    self._is_tail_clean = True
                start_offset = stream.seek(0, os.SEEK_END)
                try:
                    written_bytes = 0
                    while written_bytes < len(data):
                        written_bytes += stream.write(data[written_bytes:]) or 0
                except OSError:
                    os.ftruncate(stream.fileno(), start_offset)
                    raise
        except OSError as error:
            self.failure = f"{self.path.name}: {error.strerror}"
            return False
        self._pending_lines.clear()
        self.failure = ""
        return True

    def _apply_truncation(self) -> None:
        if self._truncation_step is None:
            return
        exists = self.path.is_file()
        if exists and self._file_id in (None, _file_identity(os.stat(self.path))):
            truncate_after_step(self.path, self._truncation_step)
            if self._file_id is not None:
                self._file_id = _file_identity(os.stat(self.path))
        self._truncation_step = None

    def sync(self) -> None:
        """Makes what was written survive a power cut, as far as the disk allows."""
        if not self.flush() or not self.path.exists():
            return
        try:
            with open(self.path, "ab") as stream:
                os.fsync(stream.fileno())
        except OSError as error:
            self.failure = f"{self.path.name}: {error.strerror}"


def _file_identity(stat_result: os.stat_result) -> tuple[int, int]:
    return stat_result.st_dev, stat_result.st_ino


def _read_content(path: Path) -> bytes:
    if not path.exists():
        return b""
    with open_regular_file(path) as stream:
        return stream.read()


def _truncate_partial_line(stream: FileIO) -> None:
    """Drops what stands after the last line end: a writer was killed in the middle of a line."""
    end = stop = stream.seek(0, os.SEEK_END)
    while stop > 0:
        start = max(0, stop - 4096)
        stream.seek(start)
        newline = stream.read(stop - start).rfind(b"\n")
        if newline >= 0 or start == 0:
            complete_bytes = start + newline + 1
            if complete_bytes < end:
                os.ftruncate(stream.fileno(), complete_bytes)
            return
        stop = start


def truncate_after_step(path: Path, step: int) -> None:
    """Drops the records of later steps than `step`, and what stands between them. OSError.

    They are a file's end, as a rule, and cutting that needs no room on a disk; a file whose steps
    go back and forth is written anew.
    """
    cut_offset, needs_rewrite = -1, False
    kept_lines: list[bytes] = []
    for offset, line in lines_with_offsets(path):
        number = line_step(line)
        if number is not None and number <= step:
            kept_lines.append(line)
            needs_rewrite |= cut_offset >= 0
        elif number is not None and cut_offset < 0:
            cut_offset = offset
    if needs_rewrite:
        write_atomically(path, b"".join(line.rstrip(b"\n") + b"\n" for line in kept_lines))
    elif cut_offset >= 0:
        os.truncate(path, cut_offset)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that is seen whole or not at all."""
    temporary_path = make_temporary_path(path)
    try:
        with open(temporary_path, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary_path, path)
    finally:
        temporary_path.unlink(missing_ok=True)


def utc_timestamp() -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _format_record(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON, which has no number that is not finite: null in its place."""
    try:
        return json.dumps(record, allow_nan=False, default=_to_scalar) + "\n"
    except ValueError:
        return json.dumps(without_non_finite(record), allow_nan=False, default=_to_scalar) + "\n"


def without_non_finite(value: Any) -> Any:
    """A copy with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(item) for item in value]
    scalar = _to_scalar(value) if not isinstance(value, str | int | float | None) else value
    return None if isinstance(scalar, float) and not math.isfinite(scalar) else scalar


def _to_scalar(value: object) -> object:
    """Numbers of other libraries as plain ones."""
    item_method = getattr(value, "item", None)
    return item_method() if callable(item_method) else str(value)
