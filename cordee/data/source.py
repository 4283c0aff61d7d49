"""The dataset folder: its checksums, and tokens by row through a memory map.

A folder holds `dataset.json` (`manifest`), shards in safetensors (`tokens`, `doc_ends`) and, beside
each shard, its `.sums`. Not here: making the folder (`prepare`), the order of rows (`order`),
tensors (`loader`). Traded away: compression and remote stores; a row is one copy from a memory map.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from cordee.data.manifest import SPLITS, Shard, read_info, rows_in
from cordee.data.mixture import Mixture
from cordee.data.order import Order
from cordee.errors import DataError

SUM_BLOCK_BYTES = 4 << 20
_DTYPES = {"U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"}

_Tokens = NDArray[Any]


def write_sums(path: Path) -> str:
    """Sync and hash a finished shard: write `<shard>.sums` (xxh3-64 a block), return xxh3-128."""
    blocks, whole = _hash_blocks(path)
    sums = {"block_bytes": SUM_BLOCK_BYTES, "xxh3_64": blocks}
    _sums_path(path).write_text(json.dumps(sums), encoding="ascii")
    sync(_sums_path(path))
    sync(path)
    return whole


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def damaged_blocks(path: Path, shard: Shard) -> list[int]:
    """Numbers of the 4 MiB blocks of a shard that are not what was written; [] when all are well.

    The blocks are held against `.sums`, the whole file against `dataset.json`. DataError names the
    file when it is missing, cut or lengthened, or when `.sums` itself is what was damaged.
    """
    try:
        sums = json.loads(_sums_path(path).read_bytes())
        recorded = list(sums["xxh3_64"])
        if sums["block_bytes"] != SUM_BLOCK_BYTES:
            raise ValueError("another block size")
        size = os.stat(path).st_size
        blocks, whole = _hash_blocks(path)
    except OSError as error:
        raise DataError(
            f"a shard cannot be read: {error.strerror}",
            values={"file": str(error.filename)},
            fix="prepare the dataset again, or copy the file from a good one",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _bad_sums(path) from error
    if size != shard.bytes:
        raise DataError(
            "a shard has another length than when it was written",
            values={
                "file": str(path),
                "block": min(size, shard.bytes) // SUM_BLOCK_BYTES,
                "bytes": size,
                "written_bytes": shard.bytes,
            },
            fix="prepare the dataset again, or copy the file from a good one",
        )
    if whole == shard.xxh3_128 and recorded != blocks:
        raise _bad_sums(path)
    bad = [
        number for number, digest in enumerate(blocks) if recorded[number : number + 1] != [digest]
    ]
    # Both damaged, such that every block fits its sum: the file is at fault, the place unknown.
    return bad if bad or whole == shard.xxh3_128 else list(range(len(blocks)))


def check_shard(path: Path, shard: Shard) -> None:
    """DataError that names file and block unless every byte of the shard is what was written."""
    bad = damaged_blocks(path, shard)
    if bad:
        first = bad[0] * SUM_BLOCK_BYTES
        raise DataError(
            "a shard is damaged: a block does not match its checksum",
            values={
                "file": str(path),
                "block": bad[0],
                "bytes": f"{first}..{min(first + SUM_BLOCK_BYTES, shard.bytes)}",
                "damaged_blocks": len(bad),
            },
            fix="prepare the dataset again, or copy the file from a good one",
        )


def _bad_sums(path: Path) -> DataError:
    return DataError(
        "the list of checksums of a shard is damaged",
        values={"file": str(_sums_path(path))},
        fix="prepare the dataset again, or copy the file from a good one",
    )


def _sums_path(path: Path) -> Path:
    return path.with_name(path.name + ".sums")


def _hash_blocks(path: Path) -> tuple[list[str], str]:
    whole = xxhash.xxh3_128()
    blocks = []
    with open(path, "rb") as file:
        while block := file.read(SUM_BLOCK_BYTES):
            blocks.append(xxhash.xxh3_64_hexdigest(block))
            whole.update(block)
    return blocks, whole.hexdigest()


def map_shard(path: Path) -> dict[str, _Tokens]:
    """The tensors of a shard as read-only memory maps, by name.

    The header is read here because the library's reader copies what it returns, and a dataset
    larger than memory must open at once. Format: 8 bytes little-endian length, JSON, data.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, SUM_BLOCK_BYTES)))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype = np.dtype(_DTYPES[entry["dtype"]]).newbyteorder("<")
            shape = tuple(entry["shape"])
            start = 8 + length + entry["data_offsets"][0]
            if math.prod(shape):
                # A plain array over the map: the memmap class costs time on every index.
                mapped = np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)
                tensors[name] = np.asarray(mapped)
            else:
                tensors[name] = np.empty(shape, dtype=dtype)
        if not {"tokens", "doc_ends"} <= tensors.keys():
            raise ValueError("tokens and doc_ends are not both there")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "a shard cannot be mapped: it is missing, cut short or not a shard",
            values={"file": str(path), "cause": str(error)},
            fix="prepare the dataset again, or copy the file from a good one",
        ) from error
    return tensors


class TokenSource:
    """The tokens of one split over any number of shards, as windows of `sequence` + 1 tokens.

    Open it with `open_dataset`. Row i of length L is tokens [i*L, i*L + L + 1) of the split's
    stream: rows share one border token (the last target is the next row's first input), may
    straddle shards and documents, and only a tail shorter than a row is left out. In a mixture each
    source has rows of its own, numbered on from the source before.
    """

    def __init__(
        self, parts: list[_Tokens], dtype: str, mixed: Sequence[tuple[int, int]] = ()
    ) -> None:
        """`mixed`: the weight and the tokens of each source of a mixture, in the stream's order."""
        self.dtype = np.dtype(dtype)
        self._mixed = tuple(mixed)
        self._parts = parts
        # starts[k] is the first token of part k; one more entry closes the last part.
        self._starts = np.cumsum([0, *(part.size for part in parts)], dtype=np.int64)
        self.tokens = int(self._starts[-1])
        self._windows = lru_cache(maxsize=64)(self._windows_of)

    def rows(self, sequence: int) -> int:
        """How many rows of `sequence` tokens (and one target more) there are; 0 if too short."""
        return sum(rows_in(tokens, sequence) for tokens in self._sources)

    def order(self, seed: int, sequence: int, microbatch_rows: int, microbatches: int) -> Order:
        """The global order of its rows. DataError: a source of a mixture has none."""
        mixture = self.mixture(seed, sequence)
        return Order(seed, self.rows(sequence), microbatch_rows, microbatches, mixture)

    def mixture(self, seed: int, sequence: int) -> Mixture | None:
        """How sources take turns, if there are several. DataError: one has no row."""
        rows = tuple(rows_in(tokens, sequence) for tokens in self._sources)
        weights = tuple(weight for weight, _ in self._mixed)
        return Mixture(seed, rows, weights) if weights else None

    @property
    def _sources(self) -> list[int]:
        """Tokens of each source."""
        return [tokens for _, tokens in self._mixed] or [self.tokens]

    def gather(self, row_ids: NDArray[np.int64], sequence: int) -> _Tokens:
        """Rows by id, (n, sequence + 1) in the native dtype. IndexError for ids too large."""
        begins = row_ids * sequence
        if self._mixed:
            sources = np.array(self._sources)
            first_rows = np.cumsum([0, *(rows_in(tokens, sequence) for tokens in sources)])
            source = np.searchsorted(first_rows[1:], row_ids, side="right")
            first_tokens = np.cumsum([0, *sources])
            begins += first_tokens[source] - first_rows[source] * sequence
        if len(self._parts) == 1 and sequence < self.tokens:
            return self._windows(0, sequence + 1)[begins]
        return self._gather_parts(begins, sequence + 1)

    def _windows_of(self, part: int, width: int) -> _Tokens:
        """All windows of a part at stride one, a view. One indexed copy then gathers n of them."""
        return np.lib.stride_tricks.sliding_window_view(self._parts[part], width)

    def _gather_parts(self, begins: NDArray[np.int64], width: int) -> _Tokens:
        if begins.size and not 0 <= begins.min() <= begins.max() <= self.tokens - width:
            raise IndexError(f"a row out of range: {begins.max() // max(1, width - 1)}")
        out = np.empty((begins.size, width), dtype=self.dtype)
        first = np.searchsorted(self._starts, begins, side="right") - 1
        last = np.searchsorted(self._starts, begins + width - 1, side="right") - 1
        whole = first == last
        for part in np.unique(first[whole]).tolist():
            here = whole & (first == part)
            out[here] = self._windows(part, width)[begins[here] - self._starts[part]]
        for row in np.flatnonzero(~whole).tolist():
            out[row] = self.slice(int(begins[row]), int(begins[row]) + width)
        return out

    def slice(self, start: int, stop: int) -> _Tokens:
        """Tokens [start, stop) of the stream, across shards; the obvious version of `gather`."""
        pieces = [np.empty(0, dtype=self.dtype)]
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        while part < len(self._parts) and (begin := int(self._starts[part])) < stop:
            pieces.append(self._parts[part][max(0, start - begin) : stop - begin])
            part += 1
        return np.concatenate(pieces)


def open_dataset(folder: Path, split: str, verify: bool = True) -> TokenSource:
    """Map a split of a dataset folder. With `verify`, every block is held against its checksum.

    DataError names the file and block that is damaged, or a split that does not exist.
    """
    info = read_info(folder)
    if split not in SPLITS:
        raise DataError("no such split", values={"split": split}, fix=f"one of {SPLITS}")
    parts = []
    for shard in info.splits[split].shards:
        path = info.folder / shard.file
        if verify:
            check_shard(path, shard)
        tokens = map_shard(path)["tokens"]
        if tokens.size != shard.tokens or tokens.dtype != np.dtype(info.dtype):
            raise DataError(
                "a shard holds other tokens than dataset.json says",
                values={"file": str(path), "tokens": tokens.size, "expected": shard.tokens},
                fix="prepare the dataset again, into a new folder",
            )
        parts.append(tokens)
    sizes = [sum(shard.tokens for shard in shards) for shards in info.shards_of(split)]
    mixed = [(part.weight, size) for part, size in zip(info.parts, sizes, strict=False)]
    return TokenSource(parts, info.dtype, mixed)
