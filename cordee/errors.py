"""Cordée's errors: each says what happened, with which values, and the nearest fix.

The class decides the exit code; there are no error codes, the sentence is the interface.
"""

from __future__ import annotations

from collections.abc import Mapping

MAX_DIGITS, MAX_LETTERS = 40, 2000
"""Of a value that is shown in a sentence, at most."""


class CordeeError(Exception):
    """Base of all errors meant for the user: `message`, the `values` involved, the nearest `fix`.

    `exit_code` is 2 when the command or its input is wrong (nothing was started or written),
    1 when a run that had started failed.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, values: Mapping[str, object] | None = None, fix: str | None = None
    ) -> None:
        self.message = message
        self.values = dict(values or {})
        self.fix = fix
        super().__init__(self.sentence())

    def sentence(self) -> str:
        """The error as shown: what, one line of values, one line with the nearest fix."""
        lines = [self.message]
        if self.values:
            lines.append(
                "  values: " + ", ".join(f"{k}={_shorten(v)}" for k, v in self.values.items())
            )
        if self.fix:
            lines.append("  nearest fix: " + self.fix)
        return "\n".join(lines)


def _shorten(value: object) -> str:
    """A value in a sentence; of an integer or a text without end, its start and its length."""
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str) and len(value) > MAX_LETTERS:
        return f"{value[:MAX_LETTERS]!r}... ({len(value)} letters)"
    return repr(value)


class ConfigError(CordeeError):
    """A key, a value or a combination of them that cannot be obeyed."""

    exit_code = 2


class LayoutError(ConfigError):
    """Degrees that do not divide what they cut."""


class DataError(CordeeError):
    """Input that is missing, empty, too short or not what its checksums say."""

    exit_code = 2


class CheckpointError(CordeeError):
    """A checkpoint that cannot be written, read or verified."""


class RunError(CordeeError):
    """A run that had started and cannot go on; the cause comes first."""
