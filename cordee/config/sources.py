"""`data.path` as an array and `[[data.sources]]` tables in TOML, brought into the short form.

A run knows one form, texts with semicolons (data.path) and weights with commas (data.weights), so
that the same sources are the same run however they were written.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from cordee.errors import ConfigError

SOURCE_KEYS = ("path", "weight")
EXAMPLE = '[[data.sources]] with path = "FOLDER" and weight = 1'


def shorten_sources(tables: dict[str, Any]) -> bool:
    """Rewrites data.path and data.weights of a file's `tables` in place; whether the weights were
    written beside the paths, so that another data.path replaces both. ConfigError names what is
    wrong with a source."""
    data = tables.get("data")
    if not isinstance(data, dict):
        return False
    if isinstance(data.get("weights"), list):
        weights = data["weights"]
        data["weights"] = ",".join(_weight_text("data.weights", n, weights) for n in weights)
    if "sources" in data and "path" in data:
        raise ConfigError(
            "data.path and data.sources both name the data",
            values={"data.path": data["path"], "data.sources": data["sources"]},
            fix="leave data.path out, or data.sources",
        )
    key = "data.sources" if "sources" in data else "data.path"
    entries = data.pop("sources", data.get("path"))
    if not isinstance(entries, list):
        if key == "data.sources":
            raise ConfigError(
                "data.sources are tables, one for each source", values={key: entries}, fix=EXAMPLE
            )
        return False
    if not entries:
        raise ConfigError(f"{key} names no source", values={key: entries}, fix=EXAMPLE)
    sources = [_read_source(key, entry) for entry in entries]
    data["path"] = ";".join(path for path, _ in sources)
    weights = [weight for _, weight in sources if weight]
    if not weights:
        return False
    if len(weights) < len(sources):
        path = next(path for path, weight in sources if not weight)
        raise ConfigError(
            "some sources have a weight and others have none",
            values={"without weight": path, "weights": ",".join(weights)},
            fix="a weight for every source, or for none (then they are drawn by size)",
        )
    if "weights" in data:
        raise ConfigError(
            "data.weights and the sources' own weights say the same thing twice",
            values={"data.weights": data["weights"], key: ",".join(weights)},
            fix="leave data.weights out",
        )
    data["weights"] = ",".join(weights) if len(sources) > 1 else ""
    return True


def _read_source(key: str, entry: Any) -> tuple[str, str]:
    """Path and weight, as texts, of a source: "" where it has no weight."""
    table: Mapping[str, Any] = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(table, dict):
        raise ConfigError(
            "a source is a text, or a table of path and weight", values={key: entry}, fix=EXAMPLE
        )
    for name in (name for name in table if name not in SOURCE_KEYS):
        nearest = difflib.get_close_matches(name, SOURCE_KEYS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            "a source has no such key",
            values={"key": name, key: entry, "known": ", ".join(SOURCE_KEYS)},
            fix=f"did you mean {nearest}?",
        )
    path = table.get("path")
    if not isinstance(path, str) or not path.strip():
        raise ConfigError("a source has no path", values={key: entry}, fix=EXAMPLE)
    if ";" in path:
        raise ConfigError(
            "a source among others has no semicolon in its path",
            values={key: path},
            fix=f"a source each: {[part.strip() for part in path.split(';') if part.strip()]}",
        )
    return path.strip(), _weight_text(key, table["weight"], entry) if "weight" in table else ""


def _weight_text(key: str, weight: Any, entry: Any) -> str:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 < weight < math.inf:
        raise ConfigError(
            "a source's weight is a number above 0",
            values={"weight": weight, key: entry},
            fix="weight = 1, or leave the source out",
        )
    return str(weight)
