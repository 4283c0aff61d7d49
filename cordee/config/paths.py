"""Paths as users write them, and names beside a path that nobody else has.

Not here: what a path is of. Every verb and every key that names a file goes through `home`.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

_LEADING = re.compile(r"(?P<before>\A(?:records:)?|[,;])(?P<space>\s*)(?P<home>~[^/,;]*)")
_NAME_BYTES = 255
"""Longest name of a file."""


def home(path: str) -> str:
    """`~` and `~user` in front as the home folder, which a shell leaves alone behind `key=`; a file
    that is called so is written ./~."""
    return os.path.expanduser(path)


def home_of_each(path_spec: str) -> str:
    """The same in front of every source of a data.path, which has commas or semicolons between
    them; a name that exists as it stands is one path."""
    if os.path.lexists(path_spec):
        return home(path_spec)
    return _LEADING.sub(lambda m: m["before"] + m["space"] + home(m["home"]), path_spec)


def free_name(path: Path, ending: str = ".part") -> Path:
    """A hidden name beside `path` for what is to become it: with this process's number and 32
    random bits, so that nobody else has it and nothing of anybody's is overwritten or removed."""
    tail = f".{os.getpid()}.{secrets.token_hex(4)}{ending}"
    room = _NAME_BYTES - len(tail) - 1
    name = os.fsdecode(os.fsencode(path.name)[:room])
    return path.with_name(f".{name}{tail}")
