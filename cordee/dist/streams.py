"""Standard streams whose reader goes away (`| head`, a closed terminal, a full disk) or never was.

Lines that nobody reads are dropped; the run goes on to its end and files are written whole.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STREAMS = ("stdin", "stdout", "stderr")
"""Names in `sys` of descriptors 0, 1 and 2."""


def tolerate_broken_pipes() -> None:
    """Makes standard output and error of this process such streams; for a process of our own.

    A descriptor that was closed becomes /dev/null: else the next file that is opened would get its
    number, and whatever is said would be written into it.
    """
    for descriptor, name in enumerate(STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        old_stream: Any = getattr(sys, name)
        if descriptor > 0:
            setattr(sys, name, _wrap_stream(descriptor, old_stream))
        elif old_stream is None:
            sys.stdin = open(descriptor, closefd=False)  # noqa: SIM115 - for the whole process


def print_to_stderr(text: str) -> None:
    """A line for the person, on standard error, so that --json has standard output alone; nothing
    when it cannot be written."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            print(text, file=sys.stderr, flush=True)


class _LenientStream(io.FileIO):
    """A descriptor that takes what is written to it and drops what nobody reads. An error of
    standard output that is no reader's (a full disk) is raised once: a result was lost."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._ignores_errors = descriptor == 2

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            # None: a terminal that would have to be waited for.
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO) and not self._ignores_errors:
                self._ignores_errors = True
                raise
            return memoryview(data).nbytes


def _wrap_stream(descriptor: int, old_stream: TextIO | None) -> TextIO:
    if old_stream is not None:
        with suppress(OSError):
            old_stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LenientStream(descriptor)),
        encoding=old_stream.encoding if old_stream else None,
        errors=old_stream.errors if old_stream else "backslashreplace",
        line_buffering=descriptor == 2 or os.isatty(descriptor),
    )
