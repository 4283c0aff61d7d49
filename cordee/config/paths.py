"""Paths as users write them, and temporary names beside a path. Every verb and every key that names
a file goes through `expand_home`."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

_LEADING_TILDE = re.compile(r"(?P<before>\A|[,;])(?P<space>\s*)(?P<home>~[^/,;]*)")
_NAME_BYTES = 255
"""Longest name of a file."""


def expand_home(path: str) -> str:
    """`~` and `~user` in front as the home folder, which a shell leaves alone behind `key=`; a file
    that is called so is written ./~."""
    return os.path.expanduser(path)


def expand_home_of_each(path_spec: str) -> str:
    """The same in front of every source of a data.path, which has commas or semicolons between
    them; a name that exists as it stands is one path."""
    if os.path.lexists(path_spec):
        return expand_home(path_spec)
    return _LEADING_TILDE.sub(
        lambda match: match["before"] + match["space"] + expand_home(match["home"]), path_spec
    )


def make_temporary_path(path: Path, ending: str = ".part") -> Path:
    """A hidden name beside `path` for what is to become it: with this process's number and 32
    random bits, so that nobody else has it and nothing of anybody's is overwritten or removed."""
    tail = f".{os.getpid()}.{secrets.token_hex(4)}{ending}"
    max_bytes = _NAME_BYTES - len(tail) - 1
    name = os.fsdecode(os.fsencode(path.name)[:max_bytes])
    return path.with_name(f".{name}{tail}")
