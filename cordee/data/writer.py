"""Writing a dataset folder: byte tokens into shards, texts and mixtures of them, all or nothing.

Text becomes bytes with a 0 byte after each document. A mixture holds the shards of its texts and
names those of its sources that are dataset folders already, where they lie.
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from cordee.data.corpora import MARKOV, Corpus, Document, check_corpus, find_corpus
from cordee.data.dataset import fsync_path, write_checksums
from cordee.data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    MixtureSource,
    Shard,
    Split,
    compute_fingerprint,
    is_dataset,
    read_info,
)  # fmt: skip
from cordee.data.mixture import integer_weights
from cordee.errors import DataError

SHARD_BYTES = 256 << 20
MIN_WHOLE_DOCUMENTS = 10
"""From this many documents on, whole ones are held out; below, the tail of each."""
END_OF_DOCUMENT = 0
SOURCE_SEPARATOR = ";"
TEXT_FIELDS = {
    "tokenizer": "bytes", "vocabulary": 256, "dtype": "uint8", "end_of_document": END_OF_DOCUMENT,
}  # fmt: skip
"""What sources of a mixture have in common, as text has it."""
SIZE_WEIGHT_TOTAL = 10_000
"""Weights by size are whole parts of this."""
_READ_BYTES = 16 << 20

Description = dict[str, Any]
"""The content of a `dataset.json`, or what it will be."""


# ---- shards --------------------------------------------------------------------------------------


class ShardWriter:
    """Cuts a stream of byte tokens into shards; each is hashed from the disk and synced."""

    def __init__(self, folder: Path, split: str, shard_bytes: int) -> None:
        self._folder = folder
        self._split = split
        # Memory is taken as it fills, so a small corpus does not cost a whole shard.
        self._tokens = np.empty(shard_bytes, dtype=np.uint8)
        self._token_count = 0
        self._document_ends: list[int] = []
        self._shards: list[Shard] = []

    def add(self, tokens: NDArray[np.uint8]) -> None:
        """Appends uint8 (n,)."""
        while tokens.size:
            # Full shards are written only now, so that a document's end falls into its own shard.
            if self._token_count == self._tokens.size:
                self._write_shard()
            count = min(tokens.size, self._tokens.size - self._token_count)
            self._tokens[self._token_count : self._token_count + count] = tokens[:count]
            self._token_count += count
            tokens = tokens[count:]

    def end_document(self) -> None:
        self._document_ends.append(self._token_count)

    def close(self) -> Split:
        """Writes what is left; what was written in all."""
        if self._token_count:
            self._write_shard()
        return Split(tuple(self._shards), sum(shard.tokens for shard in self._shards))

    def _write_shard(self) -> None:
        path = self._folder / f"{self._split}-{len(self._shards):05d}.safetensors"
        ends = np.array(self._document_ends, dtype=np.uint64)
        save_file({"tokens": self._tokens[: self._token_count], "doc_ends": ends}, path)
        digest, size_bytes = write_checksums(path), os.stat(path).st_size
        self._shards.append(
            Shard(path.name, self._token_count, len(self._document_ends), size_bytes, digest)
        )
        self._token_count, self._document_ends = 0, []


def write_manifest(folder: Path, content: Description) -> None:
    """Writes `dataset.json` with its fingerprint, last of all files."""
    # A token is a byte, the one that ends a document included: bits per byte are bits per token.
    content = {"format": FORMAT, "dtype": "uint8", "bytes_per_token": 1.0, **content}
    content["fingerprint"] = compute_fingerprint(content)
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="ascii")
    fsync_path(folder / MANIFEST)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` to write in; renamed to `folder` at the end, else removed.

    Its name is one that nobody else has: this host, process and moment are in it. What a killed
    process of this machine left behind is removed first. Of a link, the folder that it names.
    """
    if folder.is_symlink():
        folder = Path(os.path.realpath(folder))
    parent = folder.absolute().parent
    prefix = f".{folder.name}.{socket.gethostname()}."
    staging_folder = parent / f"{prefix}{os.getpid()}.{secrets.token_hex(4)}.partial"
    is_created = False
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(f"{glob.escape(prefix)}*.partial"):
            tail = re.fullmatch(r"([0-9]+)(\.[0-9a-f]{8})?\.partial", leftover.name[len(prefix) :])
            is_folder = leftover.is_dir() and not leftover.is_symlink()
            if tail and is_folder and not _is_running(tail[1]):
                shutil.rmtree(leftover)
        staging_folder.mkdir()
        is_created = True
        yield staging_folder
        fsync_path(staging_folder)
        os.rename(staging_folder, folder)
        fsync_path(parent)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the dataset cannot be written: {error}",
            values={"folder": str(folder)},
            fix="a folder that can be written, on a disk with room",
        ) from error
    finally:
        if is_created:
            shutil.rmtree(staging_folder, ignore_errors=True)


def _is_running(pid_text: str) -> bool:
    """Whether the maker of a partial folder lives. With our own number it is a forerunner's:
    numbers come round again, above all in containers."""
    try:
        pid = int(pid_text)
        os.kill(pid, 0)
    except (OverflowError, PermissionError):
        return True
    except ProcessLookupError:
        return False
    return pid != os.getpid()


# ---- text ----------------------------------------------------------------------------------------


def write_text(
    folder: Path, corpus: Corpus, held_out: float, seed: int, shard_bytes: int
) -> Description:
    """Writes a corpus as shards into `folder`; what a manifest says of it."""
    train_sizes = _train_sizes(corpus.documents, held_out, seed)
    writers = {split: ShardWriter(folder, split, shard_bytes) for split in SPLITS}
    for document, train_bytes in zip(corpus.documents, train_sizes, strict=True):
        _write_document(document, train_bytes, writers)
    return {
        "name": corpus.name,
        "vocabulary": 256,
        "tokenizer": "bytes",
        "end_of_document": END_OF_DOCUMENT,
        "sources": [
            {"path": str(d.path.absolute()), "bytes": d.bytes, "mtime_ns": d.mtime_ns}
            for d in corpus.documents
        ],
        "skipped": corpus.skip_counts,
        "splits": {split: asdict(writer.close()) for split, writer in writers.items()},
    }


def _train_sizes(documents: tuple[Document, ...], held_out: float, seed: int) -> list[int]:
    """For each document how many of its text's first bytes train; the rest is held out."""
    sizes = [document.text_bytes for document in documents]
    if held_out == 0.0:
        return sizes
    if len(documents) < MIN_WHOLE_DOCUMENTS:
        return [size - int(size * held_out) for size in sizes]

    def sort_key(number: int) -> tuple[int, int]:
        name = os.fsencode(documents[number].name)
        return xxhash.xxh3_64_intdigest(name, seed=seed % (1 << 64)), number

    document_order = sorted(range(len(documents)), key=sort_key)
    target_bytes, held_out_bytes = held_out * sum(sizes), 0
    held_out_numbers: set[int] = set()
    for number in document_order[:-1]:
        # One huge document must not turn a tenth into a half: it stays in training.
        if held_out_bytes < target_bytes and held_out_bytes + sizes[number] <= 1.5 * target_bytes:
            held_out_numbers.add(number)
            held_out_bytes += sizes[number]
    held_out_numbers = held_out_numbers or {min(document_order, key=sizes.__getitem__)}
    return [0 if n in held_out_numbers else size for n, size in enumerate(sizes)]


def _write_document(document: Document, train_bytes: int, writers: dict[str, ShardWriter]) -> None:
    end_token = np.array([END_OF_DOCUMENT], dtype=np.uint8)
    sizes = (train_bytes, document.text_bytes - train_bytes)
    with open(document.path, "rb") as file:
        file.seek(document.bom_bytes)
        for split, size in zip(SPLITS, sizes, strict=True):
            bytes_left = size
            while bytes_left:
                block = file.read(min(bytes_left, _READ_BYTES))
                if not block or b"\0" in block:
                    raise DataError(
                        "a source changed while it was being read",
                        values={"file": str(document.path), "bytes_expected": document.bytes},
                        fix="prepare again when nothing writes to it",
                    )
                writers[split].add(np.frombuffer(block, dtype=np.uint8))
                bytes_left -= len(block)
            if size:
                writers[split].add(end_token)
                writers[split].end_document()


# ---- mixtures ------------------------------------------------------------------------------------


def is_mixture(path_spec: str) -> bool:
    """Whether a specification names several sources to be drawn by weight; a name that exists as
    it stands is one path."""
    return SOURCE_SEPARATOR in path_spec and not os.path.exists(path_spec)


def split_sources(path_spec: str) -> list[str]:
    """The sources of a mixture, in order; of another specification, itself. DataError: fewer than
    two with a semicolon between, or one that cannot be part."""
    if not is_mixture(path_spec):
        return [path_spec]
    sources = [word.strip() for word in path_spec.split(SOURCE_SEPARATOR) if word.strip()]
    if len(sources) < 2:
        raise DataError(
            "a mixture has two sources or more, with semicolons between",
            values={"data.path": path_spec},
            fix=f"data.path={sources[0]!r}" if sources else "data.path='one;two'",
        )
    if MARKOV in sources:
        raise DataError(
            "a mixture is of texts, and of dataset folders with tokens like theirs",
            values={"data.path": path_spec, "source": MARKOV},
            fix=f"leave {MARKOV} out",
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
    """Raises what `write_mixture` would raise, reading no more than it must to know."""
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


def write_mixture(
    folder: Path, path_spec: str, weights: str, held_out: float, seed: int, shard_bytes: int
) -> Description:
    """Writes the texts of a mixture into `folder`, each in a folder of its own; what a manifest
    says of the mixture."""
    sources = split_sources(path_spec)
    user_weights = parse_weights(weights, len(sources))
    descriptions = []
    for index, source in enumerate(sources):
        if is_dataset(Path(source)):
            descriptions.append(_read_source(Path(source)))
            continue
        source_folder = folder / str(index)
        source_folder.mkdir()
        text = write_text(source_folder, find_corpus(source), held_out, seed, shard_bytes)
        fsync_path(source_folder)
        text = _relocate_shards(text, Path(str(index)))
        descriptions.append({**text, **TEXT_FIELDS, "bytes_per_token": 1.0})
    _check_compatible(sources, descriptions)
    token_counts = [description["splits"]["train"]["tokens"] for description in descriptions]
    mixture_weights = integer_weights(user_weights or _size_weights(sources, token_counts))
    split_fields = {"entropy_bits": None, "held_out": held_out, "seed": seed}
    return _merge_descriptions(sources, mixture_weights, descriptions, split_fields)


def _read_source(folder: Path) -> Description:
    """A dataset folder, named from where it lies."""
    info = read_info(folder)
    if info.parts:
        raise DataError(
            "a source of a mixture is a text or a plain dataset of tokens",
            values={"folder": str(folder), "holds": "a mixture"},
            fix="name its own sources, with semicolons between",
        )
    return _relocate_shards(info.description(), folder.absolute())


def _relocate_shards(description: Description, folder: Path) -> Description:
    """The same description, with shards named from elsewhere."""
    splits = {}
    for name, split in description["splits"].items():
        shards = [{**shard, "file": str(folder / shard["file"])} for shard in split["shards"]]
        splits[name] = {"shards": shards, "tokens": split["tokens"]}
    return {**description, "splits": splits}


def _check_compatible(sources: Sequence[str], descriptions: Sequence[Description]) -> None:
    for key in TEXT_FIELDS:
        values = {s: d[key] for s, d in zip(sources, descriptions, strict=True)}
        if len(set(values.values())) > 1:
            raise DataError(
                f"the sources of a mixture differ in their {key}",
                values=values,
                fix="prepare them alike",
            )


def _size_weights(sources: Sequence[str], sizes: Sequence[int]) -> list[Fraction]:
    if 0 in sizes:
        raise DataError(
            "a source of a mixture has nothing to train on",
            values={"source": sources[sizes.index(0)], "tokens": 0},
            fix="leave it out, or a smaller data.held_out",
        )
    return [Fraction(max(1, round(SIZE_WEIGHT_TOTAL * size / sum(sizes)))) for size in sizes]


def _merge_descriptions(
    sources: Sequence[str],
    weights: Sequence[int],
    descriptions: Sequence[Description],
    split_fields: Description,
) -> Description:
    """The manifest's content: the sources' shards one after another."""
    bytes_of_weights = sum(
        weight * description["bytes_per_token"]
        for weight, description in zip(weights, descriptions, strict=True)
    )
    skip_counts: dict[str, int] = {}
    for description in descriptions:
        for reason, count in description["skipped"].items():
            skip_counts[reason] = skip_counts.get(reason, 0) + count
    splits = {name: [d["splits"][name] for d in descriptions] for name in SPLITS}
    parts = [
        MixtureSource(source, weight, {name: len(splits[name][n]["shards"]) for name in SPLITS})
        for n, (source, weight) in enumerate(zip(sources, weights, strict=True))
    ]
    return {
        **{key: descriptions[0][key] for key in TEXT_FIELDS},
        "name": " + ".join(description["name"] for description in descriptions),
        "bytes_per_token": bytes_of_weights / sum(weights),
        **split_fields,
        "sources": [source for description in descriptions for source in description["sources"]],
        "skipped": skip_counts,
        "splits": {
            name: {
                "shards": [shard for split in splits[name] for shard in split["shards"]],
                "tokens": sum(split["tokens"] for split in splits[name]),
            }
            for name in SPLITS
        },
        "parts": [asdict(part) for part in parts],
    }
