"""From files and command lines to a `Run`: TOML, dotted overrides, did-you-mean, dump, explain.

Precedence: default < preset (and what it implies) < file < command line. Values are converted
strictly (3.5 is no int, "yes" is no bool); errors name key, value and fix.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cordee.config.model import ModelSettings
from cordee.config.paths import expand_home, expand_home_of_each
from cordee.config.presets import model_presets
from cordee.config.ranges import Range
from cordee.config.run import CHANGEABLE_ON_RESUME, Run
from cordee.config.sources import shorten_sources
from cordee.errors import ConfigError

RUN_FILE = "run.toml"
"""A run's resolved settings, in its folder."""
PATH_KEYS = {
    "run.dir": expand_home,
    "launch.secret": expand_home,
    "model.hub": expand_home,
    "initial.weights": expand_home,
    "data.path": expand_home_of_each,
}
"""Keys that name files, and what makes their `~` a home folder."""
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
"""Byte order marks of encodings in which nothing is read here; the longer ones first."""
_ESCAPES = {
    "\\": "\\\\", '"': '\\"', "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r",
}  # fmt: skip
"""What TOML writes with a letter; other control characters have their number."""

RETIRED_KEYS: Mapping[str, Any] = {
    "model.kind": "transformer", "model.image.side": 16, "model.image.channels": 1,
    "model.image.classes": 10,
}  # fmt: skip
"""Keys that are gone, with the value that run.toml of older runs holds and that changes nothing."""

RECORDED_TABLE = "recorded"
"""Table of that file that is no setting: what the run was begun with, where bits are promised."""


@dataclass(frozen=True)
class LoadedRun:
    """A run and where each key that is not a default came from (key -> place)."""

    run: Run
    origins: Mapping[str, str]


def _annotations(cls: type = Run, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _annotations(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


@cache
def config_keys() -> Mapping[str, Any]:
    """Every dotted key with its type, in the order in which they are written."""
    return {
        key: hint.__origin__ if get_origin(hint) is Annotated else hint
        for key, hint in _annotations()
    }


RANGES: Mapping[str, Range] = {
    key: hint.__metadata__[0] for key, hint in _annotations() if get_origin(hint) is Annotated
}
"""The range of every key that is a number."""


def load(
    file: str | None = None, overrides: Sequence[str] = (), tables: Mapping[str, Any] | None = None
) -> LoadedRun:
    """Reads `file` (TOML), `tables` of values and `key=value` overrides, strictly; the later ones
    precede. Raises ConfigError."""
    entries: dict[str, tuple[Any, str]] = {}
    has_source_weights = False
    if file is not None:
        file_tables = read_toml(Path(file))
        file_tables.pop(RECORDED_TABLE, None)
        has_source_weights = shorten_sources(file_tables)
        for key, value in _flatten(file_tables).items():
            entries[key] = (value, file)
    entries |= {key: (value, "keywords") for key, value in _flatten(tables or {}).items()}
    for text in overrides:
        key, value = split_override(text)
        if key == "data.path" and has_source_weights and entries["data.weights"][1] == file:
            del entries["data.weights"]
            has_source_weights = False
        entries[key] = (value, "command line")
    keys = config_keys()
    values: dict[str, Any] = {}
    for key, (value, origin) in entries.items():
        if key in RETIRED_KEYS and value == RETIRED_KEYS[key]:
            continue
        if key not in keys:
            raise _unknown_key(key, list(keys), origin)
        values[key] = convert(key, value, keys[key])
    preset = values.get("model.preset", ModelSettings().preset)
    presets = {"auto": ModelSettings(), **model_presets()}
    if preset not in presets:
        raise _unknown_value("model.preset", preset, list(presets))
    run = expand_paths(override(replace(Run(), model=presets[preset]), values))
    return LoadedRun(run, {key: origin for key, (_, origin) in entries.items()})


def override(run: Run, values: Mapping[str, Any]) -> Run:
    """A copy of `run` with dotted keys replaced, without conversion."""
    for key, value in values.items():
        run = _replace_at(run, key.split("."), value)
    return run


def expand_paths(run: Run) -> Run:
    """`run` with the `~` of its paths as home folders."""
    values = {key: (_get_key(run, key), expand) for key, expand in PATH_KEYS.items()}
    return override(run, {key: expand(v) for key, (v, expand) in values.items() if "~" in v})


def encoding_of(start: bytes) -> str:
    """UTF-16 or UTF-32 where a file starts with such a byte order mark; else empty."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, with or without UTF-8's byte order mark; ConfigError when it is
    missing, unreadable, malformed or in another encoding."""
    path = Path(expand_home(str(path)))
    try:
        content = path.read_bytes()
        if encoding := encoding_of(content[:4]):
            raise ConfigError(
                f"the file is {encoding} text, as its byte order mark says; TOML is UTF-8",
                values={"file": str(path)},
                fix=f"save it as UTF-8: iconv -f {encoding} -t UTF-8 {path} > NEW.toml",
            )
        return tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        # TOMLDecodeError and UnicodeDecodeError are such; so is an integer of thousands of digits.
        raise ConfigError(
            "the file is not valid TOML",
            values={"file": str(path), "error": str(error)},
            fix="mend that line; text values need quotes",
        ) from error
    except OSError as error:
        files = [file for file in path.parent.glob("*.toml") if file.is_file() and file != path]
        matches = difflib.get_close_matches(path.name, [file.name for file in files], n=1)
        suggestion = f"did you mean {path.with_name(matches[0])}?" if matches else ""
        raise ConfigError(
            f"the file cannot be read: {error.strerror}",
            values={"file": str(path)},
            fix=suggestion or "give a TOML file's path",
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


def convert(key: str, value: Any, type_hint: Any) -> Any:
    """`value` (text or from TOML) as `type_hint`; ConfigError names key, value and allowed ones."""
    if isinstance(value, int) and abs(value) >= 2**64:  # no key is that long, no sentence either
        raise _wrong_type(key, value, type_hint)
    if get_origin(type_hint) in (Union, types.UnionType):
        for option in get_args(type_hint):
            try:
                return convert(key, value, option)
            except ConfigError:
                continue
        raise _wrong_type(key, value, type_hint)
    if get_origin(type_hint) is Literal:
        word = value.strip() if isinstance(value, str) else value
        for allowed in get_args(type_hint):
            if not isinstance(word, bool) and word in (allowed, str(allowed)):
                return allowed
        raise _unknown_value(key, value, [str(v) for v in get_args(type_hint)])
    leaf = _convert_leaf(value, type_hint)
    if leaf is None:
        raise _wrong_type(key, value, type_hint)
    return leaf


def _convert_leaf(value: Any, type_hint: type) -> Any:
    if type_hint is str:
        return value if isinstance(value, str) else None
    value = value.strip() if isinstance(value, str) else value
    if type_hint is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "false": False}.get(value) if isinstance(value, str) else None
    if isinstance(value, bool):
        return None
    try:
        if type_hint is int:
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
    return {key: _get_key(run, key) for key in config_keys()}


def recorded_settings(file: Path) -> dict[str, Any]:
    """The table `recorded` of a run's file; empty when there is none."""
    table: dict[str, Any] = read_toml(file).get(RECORDED_TABLE, {}) if file.exists() else {}
    return table


def dump(run: Run, records: Mapping[str, str] | None = None) -> str:
    """The run as TOML text that `load` reads back to an equal run, with `records` in a table."""
    lines: list[str] = []
    section = None
    for key, value in flatten(run).items():
        table, _, name = key.rpartition(".")
        if table != section:
            lines += ["", f"[{table}]"] if lines else [f"[{table}]"]
            section = table
        lines.append(f"{name} = {_toml_text(value)}")
    if records:
        lines += ["", f"[{RECORDED_TABLE}]"]
        lines += [f"{_toml_text(key)} = {_toml_text(value)}" for key, value in records.items()]
    return "\n".join(lines) + "\n"


def differences(old_run: Run, new_run: Run) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ and that a resumed run may not change: key -> (old, new)."""
    old_values, new_values = flatten(old_run), flatten(new_run)
    return {
        key: (old_values[key], new_values[key])
        for key in old_values
        if old_values[key] != new_values[key] and not key.startswith(CHANGEABLE_ON_RESUME)
    }


def explain_key(key: str, loaded: LoadedRun) -> str:
    """One key (or a whole section): its sentence, type, default, value and where it came from."""
    keys = config_keys()
    names = [k for k in keys if k == key or k.startswith(key + ".")]
    if not names:
        raise _unknown_key(key, list(keys), "command line")
    defaults = flatten(Run())
    lines = []
    for name in names:
        lines.append(f"{name} = {_toml_text(_get_key(loaded.run, name))}")
        lines.append("  " + field_doc(name))
        range_text = f", {RANGES[name]}" if name in RANGES else ""
        lines.append(
            f"  type: {type_name(keys[name])}{range_text} · default: {_toml_text(defaults[name])}"
            f" · set by: {loaded.origins.get(name, 'default or preset')}"
        )
    return "\n".join(lines)


def field_doc(key: str) -> str:
    """The sentence that stands under the key's field in config/run.py or config/model.py."""
    cls: type = Run
    *path, name = key.split(".")
    for section in path:
        cls = get_type_hints(cls)[section]
    return _field_docs(cls).get(name, "")


def type_name(type_hint: Any) -> str:
    """A type as a user reads it: int, float, "a" | "b"."""
    if get_origin(type_hint) in (Union, types.UnionType):
        return " | ".join(type_name(option) for option in get_args(type_hint))
    if get_origin(type_hint) is Literal:
        return " | ".join(_toml_text(value) for value in get_args(type_hint))
    names = {int: "int", float: "float", str: "text", bool: "true | false"}
    return names.get(type_hint, str(type_hint))


def _field_docs(cls: type) -> dict[str, str]:
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
    values: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            values.update(_flatten(value, f"{prefix}{key}."))
        else:
            values[prefix + key] = value
    return values


def _replace_at(node: Any, path: Sequence[str], value: Any) -> Any:
    if len(path) == 1:
        return replace(node, **{path[0]: value})
    return replace(node, **{path[0]: _replace_at(getattr(node, path[0]), path[1:], value)})


def _get_key(run: Run, key: str) -> Any:
    node: Any = run
    for part in key.split("."):
        node = getattr(node, part)
    return node


def _toml_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(map(_escape, value)) + '"'
    return repr(value)


def _escape(character: str) -> str:
    code = f"\\u{ord(character):04X}" if character < " " or character == "\x7f" else character
    return _ESCAPES.get(character, code)


def _unknown_key(key: str, keys: Sequence[str], origin: str) -> ConfigError:
    if key.startswith("data.sources"):
        return ConfigError(
            "data.sources is for files; here data.path has semicolons between sources",
            values={"key": key, "from": origin},
            fix="data.path='one;two' data.weights=5,3",
        )
    if key in RETIRED_KEYS:
        return ConfigError(
            "there is no such key: classifiers of images are a program of their own",
            values={"key": key, "from": origin},
            fix=f"leave {key} out; examples/classify_shapes.py trains them",
        )
    namesakes = [k for k in keys if k.rpartition(".")[2] == key.rpartition(".")[2]]
    matches = difflib.get_close_matches(key, keys, n=1, cutoff=0.5) or namesakes
    sections = ", ".join(sorted({key.split(".")[0] for key in keys}))
    fix = f"cordee config explain run, or another section: {sections}"
    if matches:
        fix = f"did you mean {matches[0]}? (cordee config explain {matches[0]})"
    return ConfigError("there is no such key", values={"key": key, "from": origin}, fix=fix)


def _unknown_value(key: str, value: Any, allowed: Sequence[str]) -> ConfigError:
    matches = difflib.get_close_matches(str(value), allowed, n=1)
    return ConfigError(
        f"{key} cannot be that",
        values={key: value, "allowed": list(allowed)},
        fix=f"{key}={matches[0] if matches else allowed[0]}",
    )


def _wrong_type(key: str, value: Any, type_hint: Any) -> ConfigError:
    default = flatten(Run()).get(key)
    default = str(default).lower() if isinstance(default, bool) else default
    problem = f"{key} has the wrong type: it is {type_name(type_hint)}"
    return ConfigError(problem, values={key: value}, fix=f"{key}={default}")
