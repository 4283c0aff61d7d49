"""From files, folders, globs or a builtin corpus to a dataset folder that is whole or not there.

Sources are read twice, first to count and refuse, then to write, so nothing is written before all
is known. Also here: a dataset inspected, and verified byte by byte.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cordee.data.corpora import (
    MARKOV,
    MARKOV_SYMBOLS,
    MARKOV_TOKENS,
    check_corpus,
    find_corpus,
    markov_tokens,
)
from cordee.data.dataset import CHECKSUM_BLOCK_BYTES, check_shard, map_shard, open_dataset
from cordee.data.manifest import (
    SPLITS,
    DatasetInfo,
    Shard,
    is_dataset,
    list_changed_sources,
    read_info,
)
from cordee.data.order import measure_mixing
from cordee.data.writer import (
    SHARD_BYTES,
    Description,
    ShardWriter,
    atomic_folder,
    check_mixture,
    is_mixture,
    write_manifest,
    write_mixture,
    write_text,
)
from cordee.errors import DataError


def prepare(
    path_spec: str,
    folder: Path,
    held_out: float,
    seed: int,
    tokens: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    weights: str = "",
) -> DatasetInfo:
    """Make the dataset `folder` from `path_spec`, or nothing: it is renamed into place when whole.

    `path_spec` is a builtin, or files, folders and globs with commas between; a folder that is a
    dataset already is returned as it is. With semicolons it is a mixture of such sources, drawn by
    `weights` ("7,3"; "": by size). `held_out` is the fraction kept from training: whole documents
    by keyed hash from 10 documents on, else the tail of each. `tokens` is the length of a synthetic
    train split, and of no other source. DataError for whatever cannot be read or done.
    """
    _check_arguments(path_spec, held_out, tokens, weights)
    if is_dataset(Path(path_spec)):
        return read_info(Path(path_spec))
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            "the dataset would replace something that is there",
            values={"folder": str(folder)},
            fix=f"use it: data.path={folder}" if is_dataset(folder) else "name a new folder",
        )
    is_text = not is_mixture(path_spec) and path_spec != MARKOV
    corpus = find_corpus(path_spec) if is_text else None
    with atomic_folder(folder) as staging_folder:
        if corpus is not None:
            content = write_text(staging_folder, corpus, held_out, seed, shard_bytes)
        elif path_spec == MARKOV:
            train_tokens = MARKOV_TOKENS if tokens is None else tokens
            content = _write_markov(staging_folder, train_tokens, held_out, seed, shard_bytes)
        else:
            content = write_mixture(staging_folder, path_spec, weights, held_out, seed, shard_bytes)
        split_fields = {"held_out": held_out, "seed": seed, "entropy_bits": None}
        write_manifest(staging_folder, content | (split_fields | content))
    return read_info(folder)


def _check_arguments(path_spec: str, held_out: float, tokens: int | None, weights: str) -> None:
    _check_weights(path_spec, weights)
    if not 0.0 <= held_out < 1.0:
        raise DataError(
            "the held-out fraction is not in [0, 1)",
            values={"data.held_out": held_out},
            fix="data.held_out=0.1",
        )
    if tokens is not None and (path_spec != MARKOV or tokens < 1):
        raise DataError(
            "the number of tokens can be set for synthetic sources only, to 1 or more",
            values={"data.path": path_spec, "tokens": tokens},
            fix=f"leave it out, or data.path={MARKOV}",
        )


def _check_weights(path_spec: str, weights: str) -> None:
    if weights and not is_mixture(path_spec):
        raise DataError(
            "weights are for a mixture: sources with semicolons between",
            values={"data.path": path_spec, "data.weights": weights},
            fix="data.path='one;two', or leave data.weights out",
        )


def _write_markov(
    folder: Path, train_tokens: int, held_out: float, seed: int, shard_bytes: int
) -> Description:
    held_out_tokens = round(train_tokens * held_out / (1.0 - held_out))
    chain, entropy_bits = markov_tokens(seed, train_tokens + held_out_tokens)
    splits = {}
    for split, tokens in zip(SPLITS, (chain[:train_tokens], chain[train_tokens:]), strict=True):
        writer = ShardWriter(folder, split, shard_bytes)
        if tokens.size:
            writer.add(tokens)
            writer.end_document()
        splits[split] = asdict(writer.close())
    return {
        "name": "markov",
        "vocabulary": MARKOV_SYMBOLS,
        "tokenizer": "markov",
        "end_of_document": None,
        "sources": [],
        "skipped": {},
        "splits": splits,
        "held_out": held_out,
        "seed": seed,
        "entropy_bits": entropy_bits,
    }


def check_sources(path_spec: str, weights: str = "") -> None:
    """Raise what `prepare` would raise about its sources, without reading them all through."""
    _check_weights(path_spec, weights)
    if is_dataset(Path(path_spec)):
        read_info(Path(path_spec))
    elif is_mixture(path_spec):
        check_mixture(path_spec, weights)
    elif path_spec != MARKOV:
        check_corpus(path_spec)


def check_split_lengths(info: DatasetInfo, sequence: int) -> None:
    """DataError unless every split that was asked for holds one row of `sequence` tokens, and in a
    mixture each source's part of it."""
    names = [part.name for part in info.parts] or [info.name]
    split_tokens = {
        (split, name): tokens
        for split in SPLITS
        if split == "train" or info.held_out > 0
        for name, tokens in zip(names, info.source_tokens(split), strict=True)
    }
    max_sequence = min(split_tokens.values()) - 1
    for (split, name), tokens in split_tokens.items():
        if tokens < sequence + 1:
            more_text = "more text" if split == "train" else "more text, or data.held_out=0"
            source = {"source": name} if info.parts else {}
            raise DataError(
                f"the {split} split is shorter than one row of data.sequence + 1 tokens",
                values={"data.sequence": sequence, "tokens": tokens,
                        "data.held_out": info.held_out, **source},
                fix=f"data.sequence={max_sequence}" if max_sequence >= 1 else more_text,
            )  # fmt: skip


def verify_dataset(folder: Path) -> dict[str, Any]:
    """Read all of a dataset against its checksums and its own rules; counts of what was read.

    DataError for the first fault, with the number of shards that have one.
    """
    info = read_info(folder)
    shards = [shard for split in SPLITS for shard in info.splits[split].shards]
    faults = []
    for shard in shards:
        try:
            check_shard(info.folder / shard.file, shard)
            _check_content(info, shard)
        except DataError as fault:
            faults.append(fault)
    if faults:
        values = {**faults[0].values, "damaged_shards": len(faults), "shards": len(shards)}
        raise DataError(faults[0].message, values=values, fix=faults[0].fix)
    return {
        "shards": len(shards),
        "blocks": sum(-(-shard.bytes // CHECKSUM_BLOCK_BYTES) for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "fingerprint": info.fingerprint,
    }


def _check_content(info: DatasetInfo, shard: Shard) -> None:
    """What checksums cannot see: a shard that was wrong when it was written."""
    arrays = map_shard(info.folder / shard.file)
    tokens, ends = arrays["tokens"], arrays["doc_ends"].astype(np.int64)
    if ends.size != shard.documents or (np.diff(ends) <= 0).any():
        problem = "its document ends are not in order or not as many as its documents"
    elif ends.size and not 0 < ends[0] <= ends[-1] <= tokens.size:
        problem = "its document ends lie outside its tokens"
    elif tokens.size != shard.tokens or (tokens.size and tokens.max() >= info.vocabulary):
        problem = "its tokens are not as many, or not in the vocabulary"
    elif info.end_of_document is not None and (tokens[ends - 1] != info.end_of_document).any():
        problem = "a document does not end with the token that ends documents"
    else:
        return
    raise DataError(
        f"a shard breaks the rules of its format: {problem}",
        values={"file": str(info.folder / shard.file)},
        fix="prepare the dataset again, into a new folder",
    )


def inspect_dataset(folder: Path, sequence: int = 256) -> dict[str, Any]:
    """What a person wants to know of a dataset: counts, its first document, how the order mixes."""
    info = read_info(folder)
    dataset = open_dataset(folder, "train", verify=False)
    head_tokens = dataset.read_tokens(0, min(dataset.tokens, 200))
    is_text = info.tokenizer == "bytes"
    first_document = head_tokens.tobytes().split(b"\0")[0].decode("utf-8", "replace")
    has_one_order = dataset.rows(sequence) and not info.parts
    order = dataset.sample_order(info.seed, sequence, 1, 1) if has_one_order else None
    return {
        "name": info.name,
        "fingerprint": info.fingerprint,
        "tokenizer": info.tokenizer,
        "vocabulary": info.vocabulary,
        "dtype": info.dtype,
        "bytes_per_token": info.bytes_per_token,
        "entropy_bits": info.entropy_bits,
        "end_of_document": info.end_of_document,
        "splits": {
            name: {
                "tokens": split.tokens,
                "documents": sum(shard.documents for shard in split.shards),
                "shards": len(split.shards),
                "bytes": sum(shard.bytes for shard in split.shards),
                "rows": info.rows(name, sequence),
            }
            for name, split in info.splits.items()
        },
        **({"parts": _describe_sources(info, sequence)} if info.parts else {}),
        "sequence": sequence,
        "sources": len(info.sources),
        "changed_sources": list_changed_sources(info),
        "skipped": dict(info.skipped),
        "first_document": first_document if is_text else head_tokens[:32].tolist(),
        "mixing": asdict(measure_mixing(order)) if order else None,
    }


def _describe_sources(info: DatasetInfo, sequence: int) -> list[dict[str, Any]]:
    """Of each source of a mixture: its name, weight, share of what is drawn, and rows."""
    total_weight = sum(part.weight for part in info.parts)
    return [
        {
            "name": part.name, "weight": part.weight, "share": round(part.weight / total_weight, 6),
            "rows": rows,
        }
        for part, rows in zip(info.parts, info.rows_by_source("train", sequence), strict=True)
    ]  # fmt: skip
