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

from cordee.data.corpora import MARKOV, check_corpus, find_corpus
from cordee.data.dataset import fsync_path
from cordee.data.manifest import SPLITS, DatasetInfo, MixtureSource, Shard, is_dataset, read_info
from cordee.data.mixture import integer_weights
from cordee.data.text_writer import END_OF_DOCUMENT, write_text
from cordee.data.writer import atomic_folder, write_manifest
from cordee.errors import DataError

SOURCE_SEPARATOR = ";"
TEXT_FIELDS = {
    "tokenizer": "bytes", "vocabulary": 256, "dtype": "uint8", "end_of_document": END_OF_DOCUMENT,
}  # fmt: skip
"""What sources of a mixture have in common, as text has it."""
SIZE_WEIGHT_TOTAL = 10_000
"""Weights by size are whole parts of this."""


def is_mixture(path_spec: str) -> bool:
    """Whether a specification names several sources to be drawn by weight; a name that exists as
    it stands is one path."""
    return SOURCE_SEPARATOR in path_spec and not os.path.exists(path_spec)


def split_sources(path_spec: str) -> list[str]:
    """The sources of a mixture, in order. DataError: fewer than two, or one that cannot be part."""
    sources = [word.strip() for word in path_spec.split(SOURCE_SEPARATOR) if word.strip()]
    if len(sources) < 2:
        raise DataError(
            "a mixture has two sources or more, with semicolons between",
            values={"data.path": path_spec},
            fix=f"data.path={sources[0]!r}" if sources else "data.path='one;two'",
        )
    for source in sources:
        if source == MARKOV:
            raise DataError(
                "a mixture is of texts, and of dataset folders with tokens like theirs",
                values={"data.path": path_spec, "source": source},
                fix=f"leave {source} out",
            )
    return sources


def parse_weights(weights_text: str, count: int) -> list[Fraction] | None:
    """Weights of `count` sources from "7,3"; None for "", which means by size. DataError: other
    than `count` positive numbers."""
    if not weights_text.strip():
        return None
    try:
        weights = [_parse_weight(word.strip()) for word in weights_text.split(",")]
    except (ValueError, ZeroDivisionError):
        weights = []
    if len(weights) != count:
        raise DataError(
            "the weights of a mixture are numbers, one for each source, with commas between",
            values={"data.weights": weights_text, "sources": count},
            fix="data.weights=" + ",".join(["1"] * count),
        )
    integer_weights(weights)
    return weights


def _parse_weight(weight_text: str) -> Fraction:
    """A number as it was written; ValueError for another, or one whose digits have no end."""
    if not re.fullmatch(r"[\d.]{1,30}(e[+-]?\d{1,2})?(/\d{1,30})?", weight_text, re.IGNORECASE):
        raise ValueError(weight_text)
    return Fraction(weight_text)


def check_mixture(path_spec: str, weights: str) -> None:
    """Raises what `prepare_mixture` would raise, reading no more than it must to know."""
    sources = split_sources(path_spec)
    parse_weights(weights, len(sources))
    descriptions = []
    for source in sources:
        if is_dataset(Path(source)):
            descriptions.append(_read_source(Path(source)))
        else:
            check_corpus(source)
            descriptions.append(TEXT_FIELDS)
    _check_compatible(sources, descriptions)


def prepare_mixture(
    path_spec: str, weights: str, folder: Path, held_out: float, seed: int, shard_bytes: int
) -> DatasetInfo:
    """Makes the dataset `folder` of a mixture, or nothing (see `prepare`)."""
    sources = split_sources(path_spec)
    user_weights = parse_weights(weights, len(sources))
    with atomic_folder(folder) as staging_folder:
        descriptions = [
            _read_source(Path(source))
            if is_dataset(Path(source))
            else _write_source(staging_folder, index, source, held_out, seed, shard_bytes)
            for index, source in enumerate(sources)
        ]
        _check_compatible(sources, descriptions)
        token_counts = [description["splits"]["train"]["tokens"] for description in descriptions]
        mixture_weights = integer_weights(user_weights or _size_weights(sources, token_counts))
        write_manifest(
            staging_folder,
            _merge_descriptions(sources, mixture_weights, descriptions, held_out, seed),
        )
    return read_info(folder)


def _write_source(
    staging_folder: Path, index: int, source: str, held_out: float, seed: int, shard_bytes: int
) -> dict[str, Any]:
    """A text, written into a folder of its own inside the mixture's."""
    source_folder = staging_folder / str(index)
    source_folder.mkdir()
    description = write_text(source_folder, find_corpus(source), held_out, seed, shard_bytes)
    fsync_path(source_folder)
    return {
        **_relocate_shards(description, Path(str(index))),
        **TEXT_FIELDS,
        "bytes_per_token": 1.0,
    }


def _read_source(folder: Path) -> dict[str, Any]:
    """A dataset folder, named from where it lies."""
    info = read_info(folder)
    if info.parts:
        raise DataError(
            "a source of a mixture is a text or a plain dataset of tokens",
            values={"folder": str(folder), "holds": "a mixture"},
            fix="name its own sources, with semicolons between",
        )
    return _relocate_shards(info.description(), folder.absolute())


def _relocate_shards(description: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same description, with shards named from elsewhere."""
    splits = {}
    for name in SPLITS:
        split = description["splits"][name]
        shards = [Shard(**shard) for shard in split["shards"]]
        shard_fields = [asdict(replace(shard, file=str(folder / shard.file))) for shard in shards]
        splits[name] = {"shards": shard_fields, "tokens": split["tokens"]}
    return {**description, "splits": splits}


def _check_compatible(sources: Sequence[str], descriptions: Sequence[dict[str, Any]]) -> None:
    for key in TEXT_FIELDS:
        values = {
            source: description[key]
            for source, description in zip(sources, descriptions, strict=True)
        }
        if len(set(values.values())) > 1:
            raise DataError(
                f"the sources of a mixture differ in their {key}",
                values=values,
                fix="prepare them alike",
            )


def _size_weights(sources: Sequence[str], sizes: Sequence[int]) -> list[Fraction]:
    for source, size in zip(sources, sizes, strict=True):
        if not size:
            raise DataError(
                "a source of a mixture has nothing to train on",
                values={"source": source, "tokens": 0},
                fix="leave it out, or a smaller data.held_out",
            )
    return [Fraction(max(1, round(SIZE_WEIGHT_TOTAL * size / sum(sizes)))) for size in sizes]


def _merge_descriptions(
    sources: Sequence[str], weights: Sequence[int], descriptions: Sequence[dict[str, Any]],
    held_out: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """The manifest's content."""
    parts = [
        MixtureSource(
            source, weight, {name: len(description["splits"][name]["shards"]) for name in SPLITS}
        )
        for source, weight, description in zip(sources, weights, descriptions, strict=True)
    ]
    pairs = list(zip(weights, descriptions, strict=True))
    reasons = dict.fromkeys(
        reason for description in descriptions for reason in description["skipped"]
    )
    return {
        **{key: descriptions[0][key] for key in TEXT_FIELDS},
        "name": " + ".join(description["name"] for description in descriptions),
        "bytes_per_token": sum(w * description["bytes_per_token"] for w, description in pairs)
        / sum(weights),
        "entropy_bits": None,
        "held_out": held_out,
        "seed": seed,
        "sources": [source for description in descriptions for source in description["sources"]],
        "skipped": {
            r: sum(description["skipped"].get(r, 0) for description in descriptions)
            for r in reasons
        },
        "splits": {
            name: {
                "shards": [
                    shard
                    for description in descriptions
                    for shard in description["splits"][name]["shards"]
                ],
                "tokens": sum(
                    description["splits"][name]["tokens"] for description in descriptions
                ),
            }
            for name in SPLITS
        },
        "parts": [asdict(part) for part in parts],
    }
