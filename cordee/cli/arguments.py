"""How every verb reads its words: a file, `key=value` or `--key value`, and the verb's own flags.

Dotted options become overrides first, because argparse, which reads the flags, cannot know them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cordee.config.load import LoadedRun, config_keys, load
from cordee.config.paths import expand_home
from cordee.config.ranges import Range
from cordee.errors import ConfigError

SECTIONS = frozenset(key.partition(".")[0] for key in config_keys())
"""What stands before the first dot of every key."""


@dataclass(frozen=True)
class ParsedArguments:
    """A command line in parts: flags (argparse), a TOML file, overrides and other words."""

    flags: argparse.Namespace
    file: str | None
    overrides: tuple[str, ...]
    positionals: tuple[str, ...]

    @property
    def run_word(self) -> str | None:
        """The first of the other words: what a verb calls RUN."""
        return self.positionals[0] if self.positionals else None

    def load(self) -> LoadedRun:
        """The run that the file and the overrides describe."""
        return load(self.file, self.overrides)


def make_parser(verb: str, summary: str, example: str, words: str = "") -> argparse.ArgumentParser:
    """A parser whose --help shows what the verb does, its words and an example."""
    arg_parser = argparse.ArgumentParser(
        prog=f"cordee {verb}",
        usage=f"cordee {verb} {words}".strip(),
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arg_parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    return arg_parser


def parse_arguments(
    arg_parser: argparse.ArgumentParser,
    argv: Sequence[str],
    *,
    max_positionals: int = 0,
    sections: Sequence[str] | None = None,
) -> ParsedArguments:
    """Parses `argv`; at most `max_positionals` words may be neither a file nor an override.

    `sections` are the sections whose keys the verb takes, None: every one. A verb that takes only
    some takes no file either: all its other words are names and paths, whatever is in them.
    """
    # Intermixed: words may stand before and after a flag.
    flags = arg_parser.parse_intermixed_args(_dotted_to_overrides(argv))
    word_kinds = [_classify_word(word, sections) for word in flags.words]
    overrides, files, positionals = (
        [word for word, kind in zip(flags.words, word_kinds, strict=True) if kind == kind_name]
        for kind_name in ("override", "file", "other")
    )
    if len(files) > 1 or len(positionals) > max_positionals:
        extra_words = files[1:] if len(files) > 1 else positionals[max_positionals:]
        raise ConfigError(
            "there is a word too many",
            values={"word": extra_words[0], "command": arg_parser.prog},
            fix=f"{arg_parser.usage}, with overrides as key=value",
        )
    return ParsedArguments(
        flags, files[0] if files else None, tuple(overrides), tuple(map(expand_home, positionals))
    )


def _classify_word(word: str, sections: Sequence[str] | None) -> str:
    """override, file or other. A path may have `=` in it (runs/lr=0.1), and so may a file's name;
    with a key in front of the `=` it is an override, unless ./ stands before that."""
    key, equals, _ = word.partition("=")
    section, dot, _ = key.strip().partition(".")
    is_key = bool(equals and dot) and "/" not in key and section in SECTIONS
    if sections is not None:
        return "override" if is_key and section in sections else "other"
    if equals and (is_key or not ("/" in key or (word.endswith(".toml") and _is_file(word)))):
        return "override"
    return "file" if word.endswith(".toml") else "other"


def _is_file(word: str) -> bool:
    return os.path.isfile(expand_home(word))


def check_flags(
    arg_parser: argparse.ArgumentParser, flags: argparse.Namespace, ranges: Mapping[str, Range]
) -> None:
    """ConfigError for the first flag, by its name in `flags`, whose number is beside its range."""
    for name, valid_range in ranges.items():
        value, flag = getattr(flags, name), "--" + name.replace("_", "-")
        if value not in valid_range:
            raise ConfigError(
                f"{flag} is {valid_range}",
                values={flag: value},
                fix=f"{flag} {valid_range.nearest(value, arg_parser.get_default(name))}",
            )


def _dotted_to_overrides(argv: Sequence[str]) -> list[str]:
    """`--a.b v` and `--a.b=v` become `a.b=v`; everything else stays."""
    arguments: list[str] = []
    words = iter(argv)
    for word in words:
        name = word.partition("=")[0]
        if word.startswith("--") and "." in name:
            arguments.append(word[2:] if "=" in word else f"{word[2:]}={next(words, '')}")
        else:
            arguments.append(word)
    return arguments
