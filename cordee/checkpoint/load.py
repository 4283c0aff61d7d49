"""Finds checkpoints, verifies them and reads rows of tensors out of them.

The order is fixed: the manifest's SHA-256, file sizes and headers, every chunk's checksum, and only
then a tensor. Not here: what the tensors mean, devices, agreement between ranks. Traded away:
memory maps; a disk that fails under a map kills the process, one that fails a read is an error
with a name. Verifying reads the whole checkpoint; one rank does it, the others pass verify=False.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from cordee.checkpoint.format import (
    CHUNK_BYTES,
    DTYPES,
    MANIFEST,
    FileEntry,
    Placed,
    digest,
    fields,
    folder_name,
    open_plain,
    parse_file,
    read_sealed,
    scan,
    tile,
)
from cordee.errors import CheckpointError

BLOCK_BYTES = 1 << 20  # stays in a core's cache between reading and hashing


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint; made by `open_checkpoint`. `meta` is what rank 0 gave to the save."""

    step: int
    generation: int
    meta: dict[str, Any]
    path: Path
    _tensors: Mapping[str, Sequence[Placed]]
    _stamps: Mapping[str, tuple[int, int]]

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The global shape of a tensor."""
        return self._placed(name)[0].entry.shape

    def read(self, name: str, row_start: int = 0, row_stop: int | None = None) -> torch.Tensor:
        """Rows [row_start, row_stop) of dim 0, on the CPU; reads these bytes and no others.

        A scalar counts as one row. CheckpointError: no such tensor or rows, or the file has
        changed since it was opened.
        """
        placed = self._placed(name)
        entry = placed[0].entry
        stop = entry.total_rows if row_stop is None else row_stop
        if not 0 <= row_start <= stop <= entry.total_rows or (not entry.shape and row_start):
            raise CheckpointError(
                f"{name} does not have these rows",
                values={"rows": (row_start, stop), "shape": entry.shape},
            )
        rows = stop - row_start
        shape = (rows, *entry.shape[1:]) if entry.shape else ()
        tensor = torch.empty(shape, dtype=DTYPES[entry.dtype])
        if tensor.numel():
            into = tensor.view(-1).view(torch.uint8).numpy().data
            for piece in placed:
                begin = max(row_start, piece.entry.row_start)
                end = min(stop, piece.entry.row_start + piece.entry.rows)
                if begin < end:
                    part = into[
                        (begin - row_start) * entry.row_bytes : (end - row_start) * entry.row_bytes
                    ]
                    skip_bytes = (begin - piece.entry.row_start) * entry.row_bytes
                    self._read(piece.file, piece.offset_bytes + skip_bytes, part)
        return tensor

    def _placed(self, name: str) -> Sequence[Placed]:
        if name not in self._tensors:
            raise CheckpointError(
                f"no tensor {name!r} in this checkpoint",
                values={"checkpoint": str(self.path), "tensors": len(self._tensors)},
            )
        return self._tensors[name]

    def _read(self, file: str, offset_bytes: int, into: memoryview) -> None:
        try:
            with open_plain(self.path / file) as source:
                state = os.fstat(source.fileno())
                if (state.st_size, state.st_mtime_ns) != self._stamps[file]:
                    raise _broken(self.path, file, "has changed since it was opened")
                source.seek(offset_bytes)
                _fill(source, into)
        except OSError as error:
            raise _broken(self.path, file, f"cannot be read: {error.strerror or error}") from error


def complete(folder: Path) -> list[Path]:
    """Folders that have a manifest, newest (step, generation) first; none if there is no folder.

    CheckpointError if the folder cannot be listed.
    """
    try:
        return [found.path for found in scan(folder) if found.complete]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"the checkpoints cannot be listed: {error.strerror}", values={"folder": str(folder)}
        ) from error


def newest(folder: Path, rejected: Callable[[Path, str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; `rejected(path, reason)` for each newer one."""
    for path in complete(folder):
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            rejected(path, error.what)
    return None


def open_checkpoint(path: Path, verify: bool = True) -> Checkpoint:
    """Opens one checkpoint and, unless told not to, checks every byte of it.

    CheckpointError names the file and the reason, for damaged data also the tensors it holds.
    """
    path = Path(path)
    body = read_sealed(path / MANIFEST)
    try:
        kinds = {"step": int, "generation": int, "meta": dict, "files": list}
        step, generation, meta, parts = fields(body, kinds)
        files = [parse_file(part) for part in parts]
        if not files:
            raise ValueError("lists no files")
        tensors = tile(files)
        if path.name.startswith("step-") and path.name != folder_name(step, generation):
            raise ValueError(f"is of step {step}, generation {generation}, not of this folder")
    except ValueError as error:
        raise _broken(path, MANIFEST, str(error)) from error
    stamps = {file.file: _check_start(path, file) for file in files}
    if verify:
        _check_chunks(path, files)
    return Checkpoint(
        step=step, generation=generation, meta=meta, path=path, _tensors=tensors, _stamps=stamps
    )


def _broken(path: Path, file: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: {reason}",
        values={"checkpoint": str(path)},
        fix="an older checkpoint; this one is not used",
    )


def _fill(source: io.FileIO, into: memoryview) -> None:
    """Reads until `into` is full. OSError at the end of the file."""
    while into:
        count = source.readinto(into)
        if not count:
            raise OSError(None, "the file is too short")
        into = into[count:]


def _blocks(source: io.FileIO, buffer: memoryview, size_bytes: int) -> Iterator[memoryview]:
    """The next bytes of a file, a buffer at a time. OSError if it ends before."""
    while size_bytes:
        block = buffer[:size_bytes]
        _fill(source, block)
        yield block
        size_bytes -= len(block)


def _check_start(path: Path, file: FileEntry) -> tuple[int, int]:
    """Size and header of a file against the manifest; its size and time of change."""
    head = file.layout.head
    found = bytearray(len(head))
    try:
        with open_plain(path / file.file) as source:
            state = os.fstat(source.fileno())
            if state.st_size != file.bytes:
                raise _broken(
                    path, file.file, f"has {state.st_size} bytes, {file.bytes} were written"
                )
            _fill(source, memoryview(found))
    except OSError as error:
        raise _broken(path, file.file, f"cannot be read: {error.strerror or error}") from error
    if found != head:
        raise _broken(path, file.file, "its header is not the one that the manifest implies")
    return state.st_size, state.st_mtime_ns


def _check_chunks(path: Path, files: Sequence[FileEntry]) -> None:
    """Every chunk of every file against its checksum, on a few threads; names the first bad one."""
    tasks = [(file, start) for file in files for start in range(0, file.bytes, CHUNK_BYTES)]
    threads = min(4, os.cpu_count() or 1, len(tasks))
    with ThreadPoolExecutor(threads) as pool:
        shares = [tasks[k::threads] for k in range(threads)]
        bad = [found for found in pool.map(_check_share, repeat(path), shares) if found]
    if bad:
        file, _, reason = min(bad)
        raise _broken(path, file, reason)


def _check_share(path: Path, share: Sequence[tuple[FileEntry, int]]) -> tuple[str, int, str] | None:
    """The first bad chunk among these: its file, its first byte, what is wrong."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for file, start in share:
        stop = min(start + CHUNK_BYTES, file.bytes)
        try:
            with open_plain(path / file.file) as source:
                source.seek(start)
                found = digest(_blocks(source, buffer, stop - start))
        except OSError as error:
            return file.file, start, f"cannot be read: {error.strerror or error}"
        if found != file.chunks[start // CHUNK_BYTES]:
            held = [
                piece.key
                for piece, offset in zip(file.pieces, file.layout.offsets_bytes, strict=True)
                if offset < stop and offset + piece.size_bytes > start
            ]
            names = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if held[3:] else "")
            return file.file, start, f"bytes {start} to {stop} are not what was written ({names})"
    return None
