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

MAX_LINE_BYTES = 16 << 20
"""Longest line that is read; a longer one is no record of ours."""
MAX_DOCUMENT_BYTES = 64 << 20
"""Longest file that is read as one JSON object."""
MAX_STEP = 1 << 53
"""A step number beyond it is none: charts and counters hold all below exactly."""
MAX_DIGITS = 24
"""Longest whole number in a record (64 bits have 20); longer ones overflow what reads them."""


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
    longer than LINE_BYTES is given as an empty line. OSError."""
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


def read_json_object(path: Path) -> dict[str, Any]:
    """A file that is one JSON object; {} for any other."""
    with suppress(OSError), open_regular_file(path) as stream:
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
        return (parse_record(data) if len(data) <= MAX_DOCUMENT_BYTES else None) or {}
    return {}


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


def as_count(value: object) -> int | None:
    """A count as records hold them; None for anything else."""
    return value if type(value) is int and 0 <= value <= MAX_STEP else None


def _parse_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError("a number of no record")
    return int(text)


_DECODER = json.JSONDecoder(parse_int=_parse_int)
