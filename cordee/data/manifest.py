"""dataset.json: what a dataset folder says of itself, under a fingerprint of its own, which refuses
what was altered since.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash

from cordee.errors import DataError

FORMAT = "cordee-data-1"
MANIFEST = "dataset.json"
SPLITS = ("train", "held_out")


def count_rows(tokens: int, sequence: int) -> int:
    """Rows of `sequence` tokens, and one target more, in a stream."""
    return max(0, (tokens - 1) // sequence)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: `documents` end in it, `bytes` is the size of the whole file."""

    file: str
    tokens: int
    documents: int
    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Split:
    """The shards of `train` or `held_out`, in order, and their tokens together."""

    shards: tuple[Shard, ...]
    tokens: int


@dataclass(frozen=True)
class SourceFile:
    """A file the dataset was made from, as it was then."""

    path: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class MixtureSource:
    """A source of a mixture: what it was named, the weight it is drawn with (a whole number), and
    how many shards of each split are its own; the parts' shards follow each other."""

    name: str
    weight: int
    shards: Mapping[str, int]


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` says, and the `folder` it lies in.

    `bytes_per_token` turns nats per token into bits per byte; `entropy_bits` is the lowest loss
    that any model can reach, in bits per token, where it is known. `held_out` is the fraction asked
    for. `skipped` counts files left out, by reason. `parts` are the sources of a mixture.
    """

    folder: Path
    name: str
    vocabulary: int
    dtype: str
    tokenizer: str
    bytes_per_token: float
    entropy_bits: float | None
    end_of_document: int | None
    held_out: float
    seed: int
    sources: tuple[SourceFile, ...]
    skipped: Mapping[str, int]
    splits: Mapping[str, Split]
    fingerprint: str
    parts: tuple[MixtureSource, ...] = ()

    def description(self) -> dict[str, Any]:
        """The content of `dataset.json`: plain dicts, lists, numbers and strings."""
        content = asdict(self)
        del content["folder"]
        if not self.parts:
            del content["parts"]
        return {"format": FORMAT, **content}

    def source_tokens(self, split: str) -> list[int]:
        """Tokens of a split by source; of what is no mixture, all of them."""
        return [sum(shard.tokens for shard in shards) for shards in self.shards_by_source(split)]

    def rows_by_source(self, split: str, sequence: int) -> list[int]:
        """Rows of `sequence` tokens (and one target more) in each source; see `TokenDataset`."""
        return [count_rows(tokens, sequence) for tokens in self.source_tokens(split)]

    def rows(self, split: str, sequence: int) -> int:
        """Rows of a split in all."""
        return sum(self.rows_by_source(split, sequence))

    def shards_by_source(self, split: str) -> list[tuple[Shard, ...]]:
        """The shards of a split by source; of what is no mixture, all of them."""
        shards = self.splits[split].shards
        counts = [part.shards[split] for part in self.parts] or [len(shards)]
        ends = accumulate(counts)
        return [shards[end - count : end] for end, count in zip(ends, counts, strict=True)]


def compute_fingerprint(description: Mapping[str, Any]) -> str:
    """xxh3-128 of the canonical JSON of a description (sorted keys, no spaces, ASCII).

    Left out is what may differ though the tokens are the same: where the sources lay, when they
    were written, how many neighbours of theirs were skipped, and the fingerprint itself.
    """
    content = {k: v for k, v in description.items() if k not in ("fingerprint", "skipped")}
    content["sources"] = [{"bytes": source["bytes"]} for source in content["sources"]]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def is_dataset(folder: Path) -> bool:
    """Whether the folder holds a `dataset.json`."""
    return os.path.isfile(folder / MANIFEST)


def read_info(folder: Path) -> DatasetInfo:
    """Read `dataset.json`. DataError if it is missing, of another format, or altered since."""
    path = Path(folder) / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"no dataset can be read here: {error.strerror}",
            values={"file": str(path)},
            fix="make one with: cordee data prepare",
        ) from error
    try:
        content = json.loads(text)
        format_name = content.pop("format")
        if (
            format_name == FORMAT
            and compute_fingerprint(content | {"format": format_name}) == content["fingerprint"]
        ):
            content["sources"] = tuple(SourceFile(**source) for source in content["sources"])
            content["parts"] = tuple(MixtureSource(**part) for part in content.get("parts", ()))
            content["splits"] = {name: _parse_split(content["splits"][name]) for name in SPLITS}
            return DatasetInfo(folder=Path(folder), **content)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        format_name = None
    raise DataError(
        "dataset.json is not what was written: its fingerprint does not fit its content"
        if format_name == FORMAT
        else "dataset.json is damaged or of another format",
        values={"file": str(path), "format": format_name, "expected": FORMAT},
        fix="prepare the dataset again, into a new folder",
    )


def _parse_split(content: Mapping[str, Any]) -> Split:
    return Split(tuple(Shard(**shard) for shard in content["shards"]), content["tokens"])


def list_changed_sources(info: DatasetInfo) -> list[str]:
    """Paths of source files that vanished, or whose size or time is not what it was when read."""
    changed_paths = []
    for source in info.sources:
        try:
            file_stat = os.stat(source.path)
        except OSError:
            changed_paths.append(source.path)
            continue
        if (file_stat.st_size, file_stat.st_mtime_ns) != (source.bytes, source.mtime_ns):
            changed_paths.append(source.path)
    return changed_paths
