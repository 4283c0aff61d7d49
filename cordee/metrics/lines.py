"""The one reader of a run's JSON files, whatever happened to them: torn, flipped, forged, a pipe.

What cannot be read is an absence and no error: a log stops no run. Not here: writing (`sinks.py`),
and what records mean.
"""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

LINE_BYTES = 16 << 20
"""Longest line that is read; a longer one is no record of ours."""
DOCUMENT_BYTES = 64 << 20
"""Longest file that is read as one JSON object."""
MOST_STEPS = 1 << 53
"""A step number beyond it is none: charts and counters hold all below exactly."""
DIGITS = 24
"""Longest whole number in a record (64 bits have 20); longer ones overflow what reads them."""


def open_plain(path: Path) -> io.BufferedReader:
    """Opens a regular file to read; a link to one is followed. OSError for all else: a pipe would
    be waited for, a device may have no end."""
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(None, "not a regular file", str(path))
    return open(number, "rb")


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of each line of a file up to the size that it had when it was opened; what is
    longer than LINE_BYTES is given as an empty line. OSError."""
    with open_plain(path) as stream:
        at, end = 0, os.fstat(stream.fileno()).st_size
        while at < end:
            line = stream.readline(min(LINE_BYTES, end - at))
            if not line:
                return
            start, at = at, at + len(line)
            if len(line) == LINE_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LINE_BYTES)
                    at += len(line)
                line = b""
            yield start, line


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file one by one: a long run's do not fit a small machine's memory."""
    with suppress(OSError):
        for _, line in whole_lines(path):
            record = record_of(line)
            if record is not None:
                yield record


def document(path: Path) -> dict[str, Any]:
    """A file that is one JSON object; {} for any other."""
    with suppress(OSError), open_plain(path) as stream:
        raw = stream.read(DOCUMENT_BYTES + 1)
        return (record_of(raw) if len(raw) <= DOCUMENT_BYTES else None) or {}
    return {}


def record_of(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None when it is none."""
    try:
        record = _DECODER.decode(line.decode("utf-8-sig", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def step_of(record: Mapping[str, Any]) -> int | None:
    """The step that a record is of; None when it says none."""
    return whole_number(record.get("step"))


def whole_number(value: object) -> int | None:
    """A count as records hold them; None for anything else."""
    return value if type(value) is int and 0 <= value <= MOST_STEPS else None


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError("a number of no record")
    return int(text)


_DECODER = json.JSONDecoder(parse_int=_whole)
