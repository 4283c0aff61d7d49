"""Text into shards: bytes, a 0 byte after each document, and which documents are held out.

Not here: which files are text (`builtin`), the folder around the shards (`prepare`,
`mixture_overrides`). Traded away: subword tokens; other programs make those, and `data.path` takes
their folder.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from cordee.data.corpora import Corpus, Document
from cordee.data.manifest import SPLITS
from cordee.data.writer import ShardWriter
from cordee.errors import DataError

# From this many documents on, whole ones are held out; below, the tail of each.
MIN_WHOLE_DOCUMENTS = 10
END_OF_DOCUMENT = 0
_READ_BYTES = 16 << 20


def write_text(
    folder: Path, corpus: Corpus, held_out: float, seed: int, shard_bytes: int
) -> dict[str, Any]:
    """Writes a corpus as shards into `folder`; what a manifest says of it."""
    train_sizes = _train_sizes(corpus.documents, held_out, seed)
    writers = {split: ShardWriter(folder, split, shard_bytes) for split in SPLITS}
    for document, train_bytes in zip(corpus.documents, train_sizes, strict=True):
        _write_document(document, train_bytes, writers)
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
    hash_seed = seed % (1 << 64)
    document_order = sorted(
        range(len(documents)),
        key=lambda n: (xxhash.xxh3_64_intdigest(os.fsencode(documents[n].name), seed=hash_seed), n),
    )
    target_bytes = held_out * sum(sizes)
    held_out_numbers: list[int] = []
    held_out_bytes = 0
    for number in document_order[:-1]:
        # One huge document must not turn a tenth into a half: it stays in training.
        if held_out_bytes < target_bytes and held_out_bytes + sizes[number] <= 1.5 * target_bytes:
            held_out_numbers.append(number)
            held_out_bytes += sizes[number]
    if not held_out_numbers:
        held_out_numbers = [min(document_order, key=lambda n: sizes[n])]
    held_out_set = set(held_out_numbers)
    return [0 if n in held_out_set else size for n, size in enumerate(sizes)]


def _write_document(document: Document, train_bytes: int, writers: dict[str, ShardWriter]) -> None:
    end_token = np.array([END_OF_DOCUMENT], dtype=np.uint8)
    with open(document.path, "rb") as file:
        file.seek(document.bom_bytes)
        for split, size in zip(
            SPLITS, (train_bytes, document.text_bytes - train_bytes), strict=True
        ):
            bytes_left = size
            while (
                bytes_left
                and (block := file.read(min(bytes_left, _READ_BYTES)))
                and b"\0" not in block
            ):
                writers[split].add(np.frombuffer(block, dtype=np.uint8))
                bytes_left -= len(block)
            if bytes_left:
                raise DataError(
                    "a source changed while it was being read",
                    values={"file": str(document.path), "bytes_expected": document.bytes},
                    fix="prepare again when nothing writes to it",
                )
            if size:
                writers[split].add(end_token)
                writers[split].end_document()
