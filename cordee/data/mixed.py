"""A mixture as one dataset folder: several sources, separated by semicolons, each with a weight.

Texts are copied into the folder as any corpus is; a source that is a dataset folder already stays
where it is, and the mixture names its shards there. Not here: which row comes when (`mixture`).
Traded away: sources of unlike tokens, and mixtures of mixtures.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from cordee.data.builtin import MARKOV, find_corpus, probe_corpus
from cordee.data.manifest import SPLITS, DatasetInfo, Part, Shard, is_dataset, read_info
from cordee.data.mixture import whole_weights
from cordee.data.records import is_images
from cordee.data.shards import making, write_manifest
from cordee.data.source import sync
from cordee.data.text import END_OF_DOCUMENT, write_text
from cordee.errors import DataError

BETWEEN = ";"
TEXT = {
    "tokenizer": "bytes", "vocabulary": 256, "dtype": "uint8", "end_of_document": END_OF_DOCUMENT,
}  # fmt: skip
"""What sources of a mixture have in common, as text has it."""
FINEST = 10_000
"""Weights by size are whole parts of this."""


def is_mixture(path_spec: str) -> bool:
    """Whether a specification names several sources to be drawn by weight; a name that exists as
    it stands is one path."""
    return BETWEEN in path_spec and not os.path.exists(path_spec)


def sources_of(path_spec: str) -> list[str]:
    """The sources of a mixture, in order. DataError: fewer than two, or one that cannot be part."""
    sources = [word.strip() for word in path_spec.split(BETWEEN) if word.strip()]
    if len(sources) < 2:
        raise DataError(
            "a mixture has two sources or more, with semicolons between",
            values={"data.path": path_spec},
            fix=f"data.path={sources[0]!r}" if sources else "data.path='one;two'",
        )
    for source in sources:
        if source == MARKOV or is_images(source):
            raise DataError(
                "a mixture is of texts, and of dataset folders with tokens like theirs",
                values={"data.path": path_spec, "source": source},
                fix=f"leave {source} out",
            )
    return sources


def read_weights(words: str, count: int) -> list[Fraction] | None:
    """Weights of `count` sources from "7,3"; None for "", which means by size. DataError: other
    than `count` positive numbers."""
    if not words.strip():
        return None
    try:
        weights = [_weight(word.strip()) for word in words.split(",")]
    except (ValueError, ZeroDivisionError):
        weights = []
    if len(weights) != count:
        raise DataError(
            "the weights of a mixture are numbers, one for each source, with commas between",
            values={"data.weights": words, "sources": count},
            fix="data.weights=" + ",".join(["1"] * count),
        )
    whole_weights(weights)
    return weights


def _weight(word: str) -> Fraction:
    """A number as it was written; ValueError for another, or one whose digits have no end."""
    if not re.fullmatch(r"[\d.]{1,30}(e[+-]?\d{1,2})?(/\d{1,30})?", word, re.IGNORECASE):
        raise ValueError(word)
    return Fraction(word)


def probe_mixture(path_spec: str, weights: str) -> None:
    """Raises what `prepare_mixture` would raise, reading no more than it must to know."""
    sources = sources_of(path_spec)
    read_weights(weights, len(sources))
    found = []
    for source in sources:
        if is_dataset(Path(source)):
            found.append(_there(Path(source)))
        else:
            probe_corpus(source)
            found.append(TEXT)
    _check_alike(sources, found)


def prepare_mixture(
    path_spec: str, weights: str, folder: Path, held_out: float, seed: int, shard_bytes: int
) -> DatasetInfo:
    """Makes the dataset `folder` of a mixture, or nothing (see `prepare`)."""
    sources = sources_of(path_spec)
    asked = read_weights(weights, len(sources))
    with making(folder) as place:
        found = [
            _there(Path(source))
            if is_dataset(Path(source))
            else _written(place, number, source, held_out, seed, shard_bytes)
            for number, source in enumerate(sources)
        ]
        _check_alike(sources, found)
        sizes = [one["splits"]["train"]["tokens"] for one in found]
        whole = whole_weights(asked or _by_size(sources, sizes))
        write_manifest(place, _joined(sources, whole, found, held_out, seed))
    return read_info(folder)


def _written(
    place: Path, number: int, source: str, held_out: float, seed: int, shard_bytes: int
) -> dict[str, Any]:
    """A text, written into a folder of its own inside the mixture's."""
    here = place / str(number)
    here.mkdir()
    found = write_text(here, find_corpus(source), held_out, seed, shard_bytes)
    sync(here)
    return {**_moved(found, Path(str(number))), **TEXT, "bytes_per_token": 1.0}


def _there(folder: Path) -> dict[str, Any]:
    """A dataset folder, named from where it lies."""
    info = read_info(folder)
    if info.parts or info.images is not None:
        raise DataError(
            "a source of a mixture is a text or a plain dataset of tokens",
            values={"folder": str(folder), "holds": "images" if info.images else "a mixture"},
            fix="name its own sources, with semicolons between",
        )
    return _moved(info.description(), folder.absolute())


def _moved(found: dict[str, Any], where: Path) -> dict[str, Any]:
    """The same description, with shards named from elsewhere."""
    splits = {}
    for name in SPLITS:
        split = found["splits"][name]
        shards = [Shard(**shard) for shard in split["shards"]]
        moved = [asdict(replace(shard, file=str(where / shard.file))) for shard in shards]
        splits[name] = {"shards": moved, "tokens": split["tokens"]}
    return {**found, "splits": splits}


def _check_alike(sources: Sequence[str], found: Sequence[dict[str, Any]]) -> None:
    for key in TEXT:
        values = {source: one[key] for source, one in zip(sources, found, strict=True)}
        if len(set(values.values())) > 1:
            raise DataError(
                f"the sources of a mixture differ in their {key}",
                values=values,
                fix="prepare them alike",
            )


def _by_size(sources: Sequence[str], sizes: Sequence[int]) -> list[Fraction]:
    for source, size in zip(sources, sizes, strict=True):
        if not size:
            raise DataError(
                "a source of a mixture has nothing to train on",
                values={"source": source, "tokens": 0},
                fix="leave it out, or a smaller data.held_out",
            )
    return [Fraction(max(1, round(FINEST * size / sum(sizes)))) for size in sizes]


def _joined(
    sources: Sequence[str], weights: Sequence[int], found: Sequence[dict[str, Any]],
    held_out: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """The manifest's content."""
    parts = [
        Part(source, weight, {name: len(one["splits"][name]["shards"]) for name in SPLITS})
        for source, weight, one in zip(sources, weights, found, strict=True)
    ]
    pairs = list(zip(weights, found, strict=True))
    reasons = dict.fromkeys(reason for one in found for reason in one["skipped"])
    return {
        **{key: found[0][key] for key in TEXT},
        "name": " + ".join(one["name"] for one in found),
        "bytes_per_token": sum(w * one["bytes_per_token"] for w, one in pairs) / sum(weights),
        "entropy_bits": None,
        "held_out": held_out,
        "seed": seed,
        "sources": [source for one in found for source in one["sources"]],
        "skipped": {r: sum(one["skipped"].get(r, 0) for one in found) for r in reasons},
        "splits": {
            name: {
                "shards": [shard for one in found for shard in one["splits"][name]["shards"]],
                "tokens": sum(one["splits"][name]["tokens"] for one in found),
            }
            for name in SPLITS
        },
        "parts": [asdict(part) for part in parts],
    }
