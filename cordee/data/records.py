"""Images as records of bytes: a label, then the pixels channel by channel (binary CIFAR-10's form).

A split of N records is N x record bytes and one 0 byte more, so that rows of data.sequence = record
bytes and one border token are the records, each whole. Not here: drawing (`shapes`), decoding of
picture formats. Traded away: labels of more than a byte, and a held-out file of the user's own.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cordee.config.model import ImageSettings, ModelSettings
from cordee.data.corpora import SHAPES, philox_words
from cordee.data.manifest import SPLITS, DatasetInfo
from cordee.data.shapes import shape_records
from cordee.data.writer import ShardWriter
from cordee.errors import DataError

RECORDS = "records:"
"""Prefix of a data.path that names files of records."""

_READ_BYTES = 16 << 20

_Bytes = NDArray[np.uint8]
Piece = tuple[_Bytes, NDArray[np.bool_]]
"""Records (n, record), and which of them are held out."""


@dataclass(frozen=True)
class RecordFile:
    """A file of whole records."""

    path: Path
    records: int
    bytes: int
    mtime_ns: int


def is_images(path_spec: str) -> bool:
    """Whether the specification names images."""
    return path_spec == SHAPES or path_spec.startswith(RECORDS)


def find_records(path_spec: str, image: ImageSettings) -> list[RecordFile]:
    """The files of `records:FILE,FILE`, in order; their contents are not read.

    DataError for one that is missing, is no file, or does not hold whole records.
    """
    files = []
    names = [n.strip() for n in path_spec.removeprefix(RECORDS).split(",") if n.strip()]
    for name in names:
        try:
            status = os.stat(name)
        except OSError as error:
            raise DataError(
                f"the file of records cannot be read: {error.strerror}",
                values={"data.path": name},
                fix=f"data.path={SHAPES}, or a file that is there",
            ) from error
        count, left = divmod(status.st_size, image.record_bytes)
        if left or not count or not stat.S_ISREG(status.st_mode):
            raise DataError(
                "the file does not hold whole records of a label and its pixels",
                values={
                    "file": name,
                    "bytes": status.st_size,
                    "bytes of a record": image.record_bytes,
                    "left over": left,
                },
                fix="model.image.side and model.image.channels as the file has them",
            )
        files.append(RecordFile(Path(name), count, status.st_size, status.st_mtime_ns))
    if not files:
        raise DataError(
            "no file of records is named",
            values={"data.path": path_spec},
            fix=f"data.path={SHAPES}, or data.path={RECORDS}FILE",
        )
    return files


def write_shapes(
    place: Path, train: int, held_out: float, seed: int, image: ImageSettings, shard_bytes: int
) -> dict[str, Any]:
    """`train` drawn images and so many more held out that they are that fraction of all."""
    kept = round(train * held_out / (1.0 - held_out))
    count = train + max(kept, int(held_out > 0))
    piece = (shape_records(seed, count, image), np.arange(count) >= train)
    return _content("shapes", [], image, _write(place, [piece], shard_bytes))


def write_records(
    place: Path, path_spec: str, held_out: float, seed: int, image: ImageSettings, shard_bytes: int
) -> dict[str, Any]:
    """The records of all files in their order, but for a random choice that is held out.

    DataError for a label that is no class, a file that changes meanwhile, or too few records.
    """
    files = find_records(path_spec, image)
    count = sum(file.records for file in files)
    aside = max(round(count * held_out), int(held_out > 0))
    if aside >= count:
        raise DataError(
            "there are too few records to hold some out",
            values={"records": count, "data.held_out": held_out},
            fix="data.held_out=0, or more records",
        )
    held = np.zeros(count, dtype=np.bool_)
    held[np.argsort(philox_words(seed, 0, count), kind="stable")[:aside]] = True
    sources = [
        {"path": str(f.path.absolute()), "bytes": f.bytes, "mtime_ns": f.mtime_ns} for f in files
    ]
    name = files[0].path.stem + (f"+{len(files) - 1}" if len(files) > 1 else "")
    splits = _write(place, _read(files, held, image), shard_bytes)
    return _content(name, sources, image, splits)


def check_images(info: DatasetInfo, model: ModelSettings) -> None:
    """DataError when `model` is a classifier and `info` does not hold the images that it reads."""
    wanted = asdict(model.image)
    if not model.is_classifier or info.images == wanted:
        return
    if info.images is None:
        raise text_refused(model, str(info.folder))
    given = " ".join(f"model.image.{key}={value}" for key, value in info.images.items())
    raise DataError(
        "the dataset holds other images than the classifier reads",
        values={"data": dict(info.images), "model.image": wanted},
        fix=f"{given} data.sequence={ImageSettings(**info.images).record_bytes}",
    )


def text_refused(model: ModelSettings, path_spec: str) -> DataError:
    """A classifier was given text."""
    return DataError(
        "a classifier reads images, and this is text",
        values={"model.kind": model.kind, "data.path": path_spec},
        fix=f"data.path={SHAPES}, or data.path={RECORDS}FILE",
    )


def _read(
    files: list[RecordFile], held: NDArray[np.bool_], image: ImageSettings
) -> Iterator[Piece]:
    size = image.record_bytes
    at_once = max(1, _READ_BYTES // size)
    before = 0
    for file in files:
        with open(file.path, "rb") as stream:
            for first in range(0, file.records, at_once):
                count = min(at_once, file.records - first)
                piece = np.frombuffer(stream.read(count * size), dtype=np.uint8)
                if piece.size != count * size:
                    raise DataError(
                        "a source changed while it was being read",
                        values={"file": str(file.path), "bytes_expected": file.bytes},
                        fix="prepare again when nothing writes to it",
                    )
                records = piece.reshape(count, size)
                _check_labels(records[:, 0], file, first, image)
                yield records, held[before + first : before + first + count]
        before += file.records


def _check_labels(labels: _Bytes, file: RecordFile, first: int, image: ImageSettings) -> None:
    wrong = np.flatnonzero(labels >= image.classes)
    if wrong.size:
        label = int(labels[wrong[0]])
        raise DataError(
            "a record's label is no class",
            values={"file": str(file.path), "record": first + int(wrong[0]), "label": label,
                    "model.image.classes": image.classes},
            fix=f"model.image.classes={label + 1}, or other sides and channels of images",
        )  # fmt: skip


def _write(place: Path, pieces: Iterable[Piece], shard_bytes: int) -> dict[str, Any]:
    writers = {split: ShardWriter(place, split, shard_bytes) for split in SPLITS}
    some = dict.fromkeys(SPLITS, False)
    for records, held in pieces:
        for split, mine in zip(SPLITS, (records[~held], records[held]), strict=True):
            writers[split].add(mine.reshape(-1))
            some[split] |= mine.size > 0
    for split in SPLITS:
        if some[split]:
            writers[split].add(np.zeros(1, dtype=np.uint8))
            writers[split].end_document()
    return {split: asdict(writer.close()) for split, writer in writers.items()}


def _content(
    name: str, sources: list[dict[str, Any]], image: ImageSettings, splits: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "vocabulary": 256,
        "tokenizer": "images",
        "images": asdict(image),
        "end_of_document": None,
        "sources": sources,
        "skipped": {},
        "splits": splits,
    }
