"""Text into shards: bytes, a 0 byte after each document, and which documents are held out.

Not here: which files are text (`builtin`), the folder around the shards (`prepare`, `mixed`).
Traded away: subword tokens; other programs make those, and `data.path` takes their folder.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from cordee.data.builtin import Corpus, Document
from cordee.data.manifest import SPLITS
from cordee.data.shards import ShardWriter
from cordee.errors import DataError

# From this many documents on, whole ones are held out; below, the tail of each.
WHOLE_DOCUMENTS = 10
END_OF_DOCUMENT = 0
_READ_BYTES = 16 << 20


def write_text(
    place: Path, corpus: Corpus, held_out: float, seed: int, shard_bytes: int
) -> dict[str, Any]:
    """Writes a corpus as shards into `place`; what a manifest says of it."""
    cuts = _cuts(corpus.documents, held_out, seed)
    writers = {split: ShardWriter(place, split, shard_bytes) for split in SPLITS}
    for document, cut in zip(corpus.documents, cuts, strict=True):
        _write_document(document, cut, writers)
    sources = [
        {"path": str(d.path.absolute()), "bytes": d.bytes, "mtime_ns": d.mtime_ns}
        for d in corpus.documents
    ]
    return {
        "name": corpus.name,
        "vocabulary": 256,
        "tokenizer": "bytes",
        "end_of_document": END_OF_DOCUMENT,
        "sources": sources,
        "skipped": corpus.skipped,
        "splits": {split: asdict(writer.close()) for split, writer in writers.items()},
    }


def _cuts(documents: tuple[Document, ...], held_out: float, seed: int) -> list[int]:
    """For each document how many of its text's first bytes train; the rest is held out."""
    sizes = [document.text_bytes for document in documents]
    if held_out == 0.0:
        return sizes
    if len(documents) < WHOLE_DOCUMENTS:
        return [size - int(size * held_out) for size in sizes]
    key = seed % (1 << 64)
    numbers = sorted(
        range(len(documents)),
        key=lambda n: (xxhash.xxh3_64_intdigest(os.fsencode(documents[n].name), seed=key), n),
    )
    wanted = held_out * sum(sizes)
    chosen: list[int] = []
    kept = 0
    for number in numbers[:-1]:
        # One huge document must not turn a tenth into a half: it stays in training.
        if kept < wanted and kept + sizes[number] <= 1.5 * wanted:
            chosen.append(number)
            kept += sizes[number]
    if not chosen:
        chosen = [min(numbers, key=lambda n: sizes[n])]
    aside = set(chosen)
    return [0 if n in aside else size for n, size in enumerate(sizes)]


def _write_document(document: Document, cut: int, writers: dict[str, ShardWriter]) -> None:
    end = np.array([END_OF_DOCUMENT], dtype=np.uint8)
    with open(document.path, "rb") as file:
        file.seek(document.mark)
        for split, size in zip(SPLITS, (cut, document.text_bytes - cut), strict=True):
            left = size
            while left and (piece := file.read(min(left, _READ_BYTES))) and b"\0" not in piece:
                writers[split].add(np.frombuffer(piece, dtype=np.uint8))
                left -= len(piece)
            if left:
                raise DataError(
                    "a source changed while it was being read",
                    values={"file": str(document.path), "bytes_expected": document.bytes},
                    fix="prepare again when nothing writes to it",
                )
            if size:
                writers[split].add(end)
                writers[split].end_document()
