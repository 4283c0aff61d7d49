"""The dataset folder: its checksums, and tokens by row through a memory map.

A folder holds `dataset.json` (manifest.py) and shards in safetensors (`tokens`, `doc_ends`), each
with its `.sums` beside it.
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

from cordee.data.manifest import SPLITS, Shard, count_rows, read_info
from cordee.data.mixture import MixtureOrder
from cordee.data.order import SampleOrder
from cordee.errors import DataError

CHECKSUM_BLOCK_BYTES = 4 << 20
_DTYPES = {"U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"}

_TokenArray = NDArray[Any]
_MEND_FIX = "prepare the dataset again, or copy the file from a good one"


def write_checksums(path: Path) -> str:
    """Sync and hash a finished shard: write `<shard>.sums` (xxh3-64 a block), return xxh3-128."""
    block_digests, file_digest = _hash_blocks(path)
    sums = {"block_bytes": CHECKSUM_BLOCK_BYTES, "xxh3_64": block_digests}
    _checksum_path(path).write_text(json.dumps(sums), encoding="ascii")
    fsync_path(_checksum_path(path))
    fsync_path(path)
    return file_digest


def fsync_path(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damaged_blocks(path: Path, shard: Shard) -> list[int]:
    """Numbers of the 4 MiB blocks of a shard that are not what was written; [] when all are well.

    The blocks are held against `.sums`, the whole file against `dataset.json`. DataError names the
    file when it is missing, cut or lengthened, or when `.sums` itself is what was damaged.
    """
    try:
        sums = json.loads(_checksum_path(path).read_bytes())
        expected_digests = list(sums["xxh3_64"])
        if sums["block_bytes"] != CHECKSUM_BLOCK_BYTES:
            raise ValueError("another block size")
        size = os.stat(path).st_size
        block_digests, file_digest = _hash_blocks(path)
    except OSError as error:
        raise DataError(
            f"a shard cannot be read: {error.strerror}",
            values={"file": str(error.filename)},
            fix=_MEND_FIX,
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _checksum_error(path) from error
    if size != shard.bytes:
        raise DataError(
            "a shard has another length than when it was written",
            values={"file": str(path), "block": min(size, shard.bytes) // CHECKSUM_BLOCK_BYTES,
                    "bytes": size, "written_bytes": shard.bytes},
            fix=_MEND_FIX,
        )  # fmt: skip
    if file_digest == shard.xxh3_128 and expected_digests != block_digests:
        raise _checksum_error(path)
    bad_blocks = [
        number
        for number, digest in enumerate(block_digests)
        if expected_digests[number : number + 1] != [digest]
    ]
    if bad_blocks or file_digest == shard.xxh3_128:
        return bad_blocks
    # Both damaged, such that every block fits its sum: the file is at fault, the place unknown.
    return list(range(len(block_digests)))


def check_shard(path: Path, shard: Shard) -> None:
    """DataError that names file and block unless every byte of the shard is what was written."""
    bad_blocks = find_damaged_blocks(path, shard)
    if bad_blocks:
        first_byte = bad_blocks[0] * CHECKSUM_BLOCK_BYTES
        byte_range = f"{first_byte}..{min(first_byte + CHECKSUM_BLOCK_BYTES, shard.bytes)}"
        raise DataError(
            "a shard is damaged: a block does not match its checksum",
            values={"file": str(path), "block": bad_blocks[0], "bytes": byte_range,
                    "damaged_blocks": len(bad_blocks)},
            fix=_MEND_FIX,
        )  # fmt: skip


def _checksum_error(path: Path) -> DataError:
    return DataError(
        "the list of checksums of a shard is damaged",
        values={"file": str(_checksum_path(path))},
        fix=_MEND_FIX,
    )


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sums")


def _hash_blocks(path: Path) -> tuple[list[str], str]:
    file_hash = xxhash.xxh3_128()
    block_digests = []
    with open(path, "rb") as file:
        while block := file.read(CHECKSUM_BLOCK_BYTES):
            block_digests.append(xxhash.xxh3_64_hexdigest(block))
            file_hash.update(block)
    return block_digests, file_hash.hexdigest()


def map_shard(path: Path) -> dict[str, _TokenArray]:
    """The tensors of a shard as read-only memory maps, by name.

    The header is read here because the library's reader copies what it returns, and a dataset
    larger than memory must open at once. Format: 8 bytes little-endian length, JSON, data.
    """
    try:
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_bytes, CHECKSUM_BLOCK_BYTES)))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype = np.dtype(_DTYPES[entry["dtype"]]).newbyteorder("<")
            shape = tuple(entry["shape"])
            start = 8 + header_bytes + entry["data_offsets"][0]
            if math.prod(shape):
                # A plain array over the map: the memmap class costs time on every index.
                memory_map = np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)
                tensors[name] = np.asarray(memory_map)
            else:
                tensors[name] = np.empty(shape, dtype=dtype)
        if not {"tokens", "doc_ends"} <= tensors.keys():
            raise ValueError("tokens and doc_ends are not both there")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "a shard cannot be mapped: it is missing, cut short or not a shard",
            values={"file": str(path), "cause": str(error)},
            fix=_MEND_FIX,
        ) from error
    return tensors


class TokenDataset:
    """The tokens of one split over any number of shards, as windows of `sequence` + 1 tokens.

    Open it with `open_dataset`. Row i of length L is tokens [i*L, i*L + L + 1) of the split's
    stream: rows share one border token (the last target is the next row's first input), may
    straddle shards and documents, and only a tail shorter than a row is left out. In a mixture each
    source has rows of its own, numbered on from the source before.
    """

    def __init__(
        self, shard_tokens: list[_TokenArray], dtype: str,
        mixture_sources: Sequence[tuple[int, int]] = (),
    ) -> None:  # fmt: skip
        """`mixture_sources`: weight and tokens of each source of a mixture, in their order."""
        self.dtype = np.dtype(dtype)
        self._mixture_sources = tuple(mixture_sources)
        self._shard_tokens = shard_tokens
        # starts[k] is the first token of part k; one more entry closes the last part.
        self._shard_starts = np.cumsum([0, *(part.size for part in shard_tokens)], dtype=np.int64)
        self.tokens = int(self._shard_starts[-1])
        self._windows = lru_cache(maxsize=64)(self._make_windows)

    def rows(self, sequence: int) -> int:
        """How many rows of `sequence` tokens (and one target more) there are; 0 if too short."""
        return sum(count_rows(tokens, sequence) for tokens in self._source_tokens)

    def sample_order(
        self, seed: int, sequence: int, microbatch_rows: int, microbatches: int
    ) -> SampleOrder:
        """The global order of its rows. DataError: a source of a mixture has none."""
        mixture = self.mixture_order(seed, sequence)
        return SampleOrder(seed, self.rows(sequence), microbatch_rows, microbatches, mixture)

    def mixture_order(self, seed: int, sequence: int) -> MixtureOrder | None:
        """How sources take turns, if there are several. DataError: one has no row."""
        rows = tuple(count_rows(tokens, sequence) for tokens in self._source_tokens)
        weights = tuple(weight for weight, _ in self._mixture_sources)
        return MixtureOrder(seed, rows, weights) if weights else None

    @property
    def _source_tokens(self) -> list[int]:
        """Tokens of each source."""
        return [tokens for _, tokens in self._mixture_sources] or [self.tokens]

    def gather(self, row_ids: NDArray[np.int64], sequence: int) -> _TokenArray:
        """Rows by id, (n, sequence + 1) in the native dtype. IndexError for ids too large."""
        starts = row_ids * sequence
        if self._mixture_sources:
            source_tokens = np.array(self._source_tokens)
            first_rows = np.cumsum([0, *(count_rows(tokens, sequence) for tokens in source_tokens)])
            source_index = np.searchsorted(first_rows[1:], row_ids, side="right")
            first_tokens = np.cumsum([0, *source_tokens])
            starts += first_tokens[source_index] - first_rows[source_index] * sequence
        if len(self._shard_tokens) == 1 and sequence < self.tokens:
            return self._windows(0, sequence + 1)[starts]
        return self._gather_shards(starts, sequence + 1)

    def _make_windows(self, shard_index: int, width: int) -> _TokenArray:
        """All windows of a part at stride one, a view. One indexed copy then gathers n of them."""
        return np.lib.stride_tricks.sliding_window_view(self._shard_tokens[shard_index], width)

    def _gather_shards(self, starts: NDArray[np.int64], width: int) -> _TokenArray:
        if starts.size and not 0 <= starts.min() <= starts.max() <= self.tokens - width:
            raise IndexError(f"a row out of range: {starts.max() // max(1, width - 1)}")
        out = np.empty((starts.size, width), dtype=self.dtype)
        first_shard = np.searchsorted(self._shard_starts, starts, side="right") - 1
        last_shard = np.searchsorted(self._shard_starts, starts + width - 1, side="right") - 1
        in_one_shard = first_shard == last_shard
        for shard_index in np.unique(first_shard[in_one_shard]).tolist():
            mask = in_one_shard & (first_shard == shard_index)
            shard_offsets = starts[mask] - self._shard_starts[shard_index]
            out[mask] = self._windows(shard_index, width)[shard_offsets]
        for row in np.flatnonzero(~in_one_shard).tolist():
            out[row] = self.read_tokens(int(starts[row]), int(starts[row]) + width)
        return out

    def read_tokens(self, start: int, stop: int) -> _TokenArray:
        """Tokens [start, stop) of the stream, across shards; the obvious version of `gather`."""
        arrays = [np.empty(0, dtype=self.dtype)]
        for tokens, first in zip(self._shard_tokens, self._shard_starts.tolist(), strict=False):
            if first < stop and start < first + tokens.size:
                arrays.append(tokens[max(0, start - first) : stop - first])
        return np.concatenate(arrays)


def open_dataset(folder: Path, split: str, verify: bool = True) -> TokenDataset:
    """Map a split of a dataset folder. With `verify`, every block is held against its checksum:
    DataError names the file and block that is damaged, or a split that does not exist."""
    info = read_info(folder)
    if split not in SPLITS:
        raise DataError("no such split", values={"split": split}, fix=f"one of {SPLITS}")
    shard_tokens = []
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
        shard_tokens.append(tokens)
    weights = [part.weight for part in info.parts]
    mixture_sources = list(zip(weights, info.source_tokens(split), strict=True)) if weights else []
    return TokenDataset(shard_tokens, info.dtype, mixture_sources)
