"""How every verb reads its words: a file, `key=value` or `--key value`, and the verb's own flags.

Not here: what the keys mean (`config/load.py`). argparse reads the flags; dotted options are turned
into overrides first, because argparse cannot know them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cordee.config.load import Loaded, known_keys, load
from cordee.config.paths import home
from cordee.config.ranges import Range
from cordee.dist.streams import say as say
from cordee.errors import ConfigError

SECTIONS = frozenset(key.partition(".")[0] for key in known_keys())
"""What stands before the first dot of every key."""


@dataclass(frozen=True)
class Words:
    """A command line in parts: flags (argparse), a TOML file, overrides and other words."""

    flags: argparse.Namespace
    file: str | None
    overrides: tuple[str, ...]
    rest: tuple[str, ...]

    @property
    def run(self) -> str | None:
        """The first of the other words: what a verb calls RUN."""
        return self.rest[0] if self.rest else None

    def load(self) -> Loaded:
        """The run that the file and the overrides describe."""
        return load(self.file, self.overrides)


def parser(verb: str, summary: str, example: str, words: str = "") -> argparse.ArgumentParser:
    """A parser whose --help shows what the verb does, its words and an example."""
    made = argparse.ArgumentParser(
        prog=f"cordee {verb}",
        usage=f"cordee {verb} {words}".strip(),
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    return made


def read(
    made: argparse.ArgumentParser,
    argv: Sequence[str],
    *,
    rest: int = 0,
    settings: Sequence[str] | None = None,
) -> Words:
    """Parses `argv`; at most `rest` words may be neither a file nor an override.

    `settings` are the sections whose keys the verb takes, None: every one. A verb that takes only
    some takes no file either: all its other words are names and paths, whatever is in them.
    """
    # Intermixed: words may stand before and after a flag.
    flags = made.parse_intermixed_args(_dotted_as_overrides(argv))
    kinds = [_kind(word, settings) for word in flags.words]
    overrides, files, others = (
        [word for word, kind in zip(flags.words, kinds, strict=True) if kind == which]
        for which in ("override", "file", "other")
    )
    if len(files) > 1 or len(others) > rest:
        extra = files[1:] if len(files) > 1 else others[rest:]
        raise ConfigError(
            "there is a word too many",
            values={"word": extra[0], "command": made.prog},
            fix=f"{made.usage}, with overrides as key=value",
        )
    return Words(flags, files[0] if files else None, tuple(overrides), tuple(map(home, others)))


def _kind(word: str, settings: Sequence[str] | None) -> str:
    """override, file or other. A path may have `=` in it (runs/lr=0.1), and so may a file's name;
    with a key in front of the `=` it is an override, unless ./ stands before that."""
    key, equals, _ = word.partition("=")
    section, dot, _ = key.strip().partition(".")
    is_key = bool(equals and dot) and "/" not in key and section in SECTIONS
    if settings is not None:
        return "override" if is_key and section in settings else "other"
    if equals and (is_key or not ("/" in key or (word.endswith(".toml") and _is_file(word)))):
        return "override"
    return "file" if word.endswith(".toml") else "other"


def _is_file(word: str) -> bool:
    return os.path.isfile(home(word))


def check_flags(
    made: argparse.ArgumentParser, flags: argparse.Namespace, ranges: Mapping[str, Range]
) -> None:
    """ConfigError for the first flag, by its name in `flags`, whose number is beside its range."""
    for name, given in ranges.items():
        value, flag = getattr(flags, name), "--" + name.replace("_", "-")
        if value not in given:
            raise ConfigError(
                f"{flag} is {given}",
                values={flag: value},
                fix=f"{flag} {given.near(value, made.get_default(name))}",
            )


def _dotted_as_overrides(argv: Sequence[str]) -> list[str]:
    """`--a.b v` and `--a.b=v` become `a.b=v`; everything else stays."""
    turned: list[str] = []
    words = iter(argv)
    for word in words:
        name = word.partition("=")[0]
        if word.startswith("--") and "." in name:
            turned.append(word[2:] if "=" in word else f"{word[2:]}={next(words, '')}")
        else:
            turned.append(word)
    return turned
