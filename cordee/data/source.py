"""The dataset folder: its description, its checksums, and tokens by row through a memory map.

A folder holds `dataset.json`, shards in safetensors (`tokens`, `doc_ends`) and, beside each shard,
its `.sums`. Not here: making the folder (`prepare`), the order of rows (`order`), tensors
(`loader`). Traded away: compression and remote stores; a row is one copy from mapped memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from cordee.errors import DataError

FORMAT = "cordee-data-1"
MANIFEST = "dataset.json"
SPLITS = ("train", "held_out")
SUM_BLOCK_BYTES = 4 << 20
_DTYPES = {"U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"}

_Tokens = NDArray[Any]


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
class DatasetInfo:
    """What `dataset.json` says, and the `folder` it lies in.

    `bytes_per_token` turns nats per token into bits per byte; `entropy_bits` is the lowest loss
    that any model can reach, in bits per token, where it is known. `held_out` is the fraction
    that was asked for. `skipped` counts files left out, by reason. `images` are the form of images
    (the fields of ImageSettings) where the tokens are such.
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
    images: Mapping[str, int] | None = None

    def description(self) -> dict[str, Any]:
        """The content of `dataset.json`: plain dicts, lists, numbers and strings."""
        plain = asdict(self)
        del plain["folder"]
        if self.images is None:
            del plain["images"]
        return {"format": FORMAT, **plain}


def fingerprint_of(description: Mapping[str, Any]) -> str:
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
        plain = json.loads(text)
        found = plain.pop("format")
        if found == FORMAT and fingerprint_of(plain | {"format": found}) == plain["fingerprint"]:
            plain["sources"] = tuple(SourceFile(**source) for source in plain["sources"])
            plain["splits"] = {name: _split(plain["splits"][name]) for name in SPLITS}
            return DatasetInfo(folder=Path(folder), **plain)
    except (ValueError, KeyError, TypeError, AttributeError):
        found = None
    raise DataError(
        "dataset.json is not what was written: its fingerprint does not fit its content"
        if found == FORMAT
        else "dataset.json is damaged or of another format",
        values={"file": str(path), "format": found, "expected": FORMAT},
        fix="prepare the dataset again, into a new folder",
    )


def _split(plain: Mapping[str, Any]) -> Split:
    return Split(tuple(Shard(**shard) for shard in plain["shards"]), plain["tokens"])


def changed_sources(info: DatasetInfo) -> list[str]:
    """Paths of source files that vanished, or whose size or time is not what it was when read."""
    changed = []
    for source in info.sources:
        try:
            now = os.stat(source.path)
        except OSError:
            changed.append(source.path)
            continue
        if (now.st_size, now.st_mtime_ns) != (source.bytes, source.mtime_ns):
            changed.append(source.path)
    return changed


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
    straddle shards and documents, and only a tail shorter than a row is left out.
    """

    def __init__(self, parts: list[_Tokens], dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self._parts = parts
        # starts[k] is the first token of part k; one more entry closes the last part.
        self._starts = np.cumsum([0, *(part.size for part in parts)], dtype=np.int64)
        self.tokens = int(self._starts[-1])
        self._windows = lru_cache(maxsize=64)(self._windows_of)

    def rows(self, sequence: int) -> int:
        """How many rows of `sequence` tokens (and one target more) there are; 0 if too short."""
        return max(0, (self.tokens - 1) // sequence)

    def gather(self, row_ids: NDArray[np.int64], sequence: int) -> _Tokens:
        """Rows by id, (n, sequence + 1) in the native dtype. IndexError for ids too large."""
        begins = row_ids * sequence
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
    return TokenSource(parts, info.dtype)
