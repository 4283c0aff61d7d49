"""From files and command lines to a `Run`: TOML, dotted overrides, did-you-mean, dump, explain.

Not here: whether the values can be obeyed together (`check.py`). Precedence: default < preset (and
what it implies) < file < command line. Traded away: a general structuring library; every leaf needs
a strict rule of its own (3.5 is no int, "yes" is no bool) and errors name key, value and fix.
"""

from __future__ import annotations

import ast
import codecs
import difflib
import inspect
import itertools
import sys
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cordee.config.model import ModelSettings
from cordee.config.paths import home, home_of_each
from cordee.config.presets import implied, model_presets
from cordee.config.ranges import RANGES
from cordee.config.run import FREE_ON_RESUME, Run
from cordee.errors import ConfigError

RUN_FILE = "run.toml"
"""A run's resolved settings, in its folder."""
PATHS = {
    "run.dir": home, "launch.secret": home, "model.hub": home, "initial.weights": home,
    "data.path": home_of_each,
}  # fmt: skip
"""Keys that name files, and what makes their `~` a home folder."""
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
"""Byte order marks of encodings in which nothing is read here; the longer ones first."""
_ESCAPES = {
    "\\": "\\\\", '"': '\\"', "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r",
}  # fmt: skip
"""What TOML writes with a letter; other control characters have their number."""

RECORDED = "recorded"
"""Table of that file that is no setting: what the run was begun with, where bits are promised."""


@dataclass(frozen=True)
class Loaded:
    """A run and where each key that is not a default came from (key -> place)."""

    run: Run
    origin: Mapping[str, str]


def known_keys(cls: type = Run, prefix: str = "") -> dict[str, Any]:
    """Every dotted key with its type, in the order in which they are written."""
    keys: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for part in fields(cls):
        name, kind = prefix + part.name, hints[part.name]
        if is_dataclass(kind):
            keys.update(known_keys(typing.cast(type, kind), name + "."))
        else:
            keys[name] = kind
    return keys


def load(file: str | None = None, overrides: Sequence[str] = ()) -> Loaded:
    """Reads `file` (TOML) and `key=value` overrides, strictly; raises ConfigError."""
    given: dict[str, tuple[Any, str]] = {}
    if file is not None:
        tables = read_toml(Path(file))
        tables.pop(RECORDED, None)
        for key, value in _flatten(tables).items():
            given[key] = (value, file)
    for text in overrides:
        key, value = split_override(text)
        given[key] = (value, "command line")
    keys = known_keys()
    values: dict[str, Any] = {}
    for key, (value, place) in given.items():
        if key not in keys:
            raise _unknown_key(key, list(keys), place)
        values[key] = convert(key, value, keys[key])
    preset = values.get("model.preset", ModelSettings().preset)
    presets = {"auto": ModelSettings(), **model_presets()}
    if preset not in presets:
        raise _unknown_value("model.preset", preset, list(presets))
    made = at_home(override(replace(Run(), model=presets[preset]), values))
    left = {k: v for k, v in implied(made.model).items() if k not in values}
    return Loaded(override(made, left), {key: place for key, (_, place) in given.items()})


def override(run: Run, values: Mapping[str, Any]) -> Run:
    """A copy of `run` with dotted keys replaced; the values are taken as they are."""
    for key, value in values.items():
        run = _replaced(run, key.split("."), value)
    return run


def at_home(run: Run) -> Run:
    """`run` with the `~` of its paths as home folders."""
    values = {key: (_get(run, key), expand) for key, expand in PATHS.items()}
    return override(run, {key: expand(v) for key, (v, expand) in values.items() if "~" in v})


def encoding_of(start: bytes) -> str:
    """The encoding that the byte order mark at a file's start names, when it is none that is read
    here (UTF-16, UTF-32); else empty."""
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), "")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, with or without UTF-8's byte order mark; ConfigError when it is
    missing, unreadable, malformed or in another encoding."""
    path = Path(home(str(path)))
    try:
        raw = path.read_bytes()
        if encoding := encoding_of(raw[:4]):
            raise ConfigError(
                f"the file is {encoding} text, as its byte order mark says; TOML is UTF-8",
                values={"file": str(path)},
                fix=f"save it as UTF-8: iconv -f {encoding} -t UTF-8 {path} > NEW.toml",
            )
        return tomllib.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        # TOMLDecodeError and UnicodeDecodeError are such; so is an integer of thousands of digits.
        raise ConfigError(
            "the file is not valid TOML",
            values={"file": str(path), "error": str(error)},
            fix="mend that line; text values need quotes",
        ) from error
    except OSError as error:
        near = [p.name for p in path.parent.glob("*.toml") if p.is_file() and p != path]
        guess = difflib.get_close_matches(path.name, near, n=1)
        raise ConfigError(
            f"the file cannot be read: {error.strerror}",
            values={"file": str(path)},
            fix=f"did you mean {path.with_name(guess[0])}?" if guess else "give a TOML file's path",
        ) from error


def split_override(text: str) -> tuple[str, str]:
    """`key=value` or `--key=value` into its two parts."""
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals or not key:
        raise ConfigError(
            "an override is written key=value",
            values={"argument": text},
            fix=f"{key or 'run.steps'}=VALUE, or a path that ends in .toml for a file",
        )
    return key.strip(), value


def convert(key: str, value: Any, kind: Any) -> Any:
    """`value` (text or from TOML) as `kind`; ConfigError names key, value and what is allowed."""
    if isinstance(value, int) and abs(value) >= 2**64:  # no key is that long, no sentence either
        raise _wrong_type(key, value, kind)
    if get_origin(kind) in (Union, types.UnionType):
        for option in get_args(kind):
            try:
                return convert(key, value, option)
            except ConfigError:
                continue
        raise _wrong_type(key, value, kind)
    if get_origin(kind) is Literal:
        word = value.strip() if isinstance(value, str) else value
        for allowed in get_args(kind):
            if not isinstance(word, bool) and word in (allowed, str(allowed)):
                return allowed
        raise _unknown_value(key, value, [str(v) for v in get_args(kind)])
    converted = _leaf(value, kind)
    if converted is None:
        raise _wrong_type(key, value, kind)
    return converted


def _leaf(value: Any, kind: type) -> Any:
    if kind is str:
        return value if isinstance(value, str) else None
    value = value.strip() if isinstance(value, str) else value
    if kind is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "false": False}.get(value) if isinstance(value, str) else None
    if isinstance(value, bool):
        return None
    try:
        if kind is int:
            if isinstance(value, str):
                value = int(value.replace("_", ""))
                return value if abs(value) < 2**64 else None
            return value if isinstance(value, int) else None
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number == number and abs(number) != float("inf") else None


def flatten(run: Run) -> dict[str, Any]:
    """The run as dotted keys and plain values, in order."""
    return {key: _get(run, key) for key in known_keys()}


def recorded(file: Path) -> dict[str, Any]:
    """The table `recorded` of a run's file; empty when there is none."""
    found: dict[str, Any] = read_toml(file).get(RECORDED, {}) if file.exists() else {}
    return found


def dump(run: Run, told: Mapping[str, str] | None = None) -> str:
    """The run as TOML text that `load` reads back to an equal run; `told` is what it records."""
    lines: list[str] = []
    section = None
    for key, value in flatten(run).items():
        table, _, name = key.rpartition(".")
        if table != section:
            lines += ["", f"[{table}]"] if lines else [f"[{table}]"]
            section = table
        lines.append(f"{name} = {_toml(value)}")
    if told:
        lines += ["", f"[{RECORDED}]", *(f"{_toml(key)} = {_toml(told[key])}" for key in told)]
    return "\n".join(lines) + "\n"


def differences(old: Run, new: Run) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ and that a resumed run may not change: key -> (old, new)."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before[key], after[key])
        for key in before
        if before[key] != after[key] and not key.startswith(FREE_ON_RESUME)
    }


def explain(key: str, loaded: Loaded) -> str:
    """One key (or a whole section): its sentence, type, default, value and where it came from."""
    keys = known_keys()
    wanted = [k for k in keys if k == key or k.startswith(key + ".")]
    if not wanted:
        raise _unknown_key(key, list(keys), "command line")
    default = flatten(Run())
    lines = []
    for name in wanted:
        lines.append(f"{name} = {_toml(_get(loaded.run, name))}")
        lines.append("  " + field_doc(name))
        lies = f", {RANGES[name]}" if name in RANGES else ""
        lines.append(
            f"  type: {type_name(keys[name])}{lies} · default: {_toml(default[name])}"
            f" · set by: {loaded.origin.get(name, 'default or preset')}"
        )
    return "\n".join(lines)


def field_doc(key: str) -> str:
    """The sentence that stands under the key's field in config/run.py or config/model.py."""
    cls: type = Run
    *path, name = key.split(".")
    for part in path:
        cls = get_type_hints(cls)[part]
    return _docs_of(cls).get(name, "")


def type_name(kind: Any) -> str:
    """A type as a user reads it: int, float, "a" | "b"."""
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(type_name(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return " | ".join(_toml(value) for value in get_args(kind))
    return {int: "int", float: "float", str: "text", bool: "true | false"}.get(kind, str(kind))


def _docs_of(cls: type) -> dict[str, str]:
    tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    docs: dict[str, str] = {}
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
    for statement, follower in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(follower, ast.Expr)
            and isinstance(follower.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(follower.value.value).split())
    return docs


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _replaced(node: Any, path: Sequence[str], value: Any) -> Any:
    if len(path) == 1:
        return replace(node, **{path[0]: value})
    return replace(node, **{path[0]: _replaced(getattr(node, path[0]), path[1:], value)})


def _get(run: Run, key: str) -> Any:
    node: Any = run
    for part in key.split("."):
        node = getattr(node, part)
    return node


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(map(_escaped, value)) + '"'
    return repr(value)


def _escaped(character: str) -> str:
    """A character as it stands in a TOML string."""
    number = f"\\u{ord(character):04X}" if character < " " or character == "\x7f" else character
    return _ESCAPES.get(character, number)


def _unknown_key(key: str, known: Sequence[str], place: str) -> ConfigError:
    by_name = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or by_name
    return ConfigError(
        "there is no such key",
        values={"key": key, "from": place},
        fix=f"did you mean {near[0]}? (cordee config explain {near[0]})"
        if near
        else "cordee config explain run, or another section: " + ", ".join(_sections(known)),
    )


def _sections(known: Sequence[str]) -> list[str]:
    return sorted({key.split(".")[0] for key in known})


def _unknown_value(key: str, value: Any, allowed: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(str(value), allowed, n=1)
    return ConfigError(
        f"{key} cannot be that",
        values={key: value, "allowed": list(allowed)},
        fix=f"{key}={near[0] if near else allowed[0]}",
    )


def _wrong_type(key: str, value: Any, kind: Any) -> ConfigError:
    default = flatten(Run()).get(key)
    return ConfigError(
        f"{key} has the wrong type: it is {type_name(kind)}",
        values={key: value},
        fix=f"{key}={default if not isinstance(default, bool) else str(default).lower()}",
    )
