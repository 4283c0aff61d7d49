"""Finds checkpoints, verifies them and reads boxes of tensors out of them.

The order is fixed: the manifest's SHA-256, file sizes and headers, every chunk's checksum, and only
then a tensor. Not here: what the tensors mean, devices, agreement between ranks. Traded away:
memory maps; a disk that fails under a map kills the process, one that fails a read is an error
with a name. Verifying reads the whole checkpoint; one rank does it, the others pass verify=False.
A box whose rows are far apart is read row by row; where they are near, the gaps are read with them.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from cordee.checkpoint.folders import MANIFEST, folder_name, passed_over, scan
from cordee.checkpoint.format import (
    CHUNK_BYTES,
    DTYPES,
    FileEntry,
    Placed,
    digest,
    fields,
    open_plain,
    parse_file,
    read_sealed,
    tile,
)
from cordee.errors import CheckpointError
from cordee.layout.boxes import Box, intersection, moved, shape_of, whole

BLOCK_BYTES = 1 << 20  # stays in a core's cache between reading and hashing
RUN_BYTES = 8 << 20  # rows up to this size are read together, and this much at once if not in place
GAP_BYTES = 64 << 10  # a shorter gap costs less to read than a second read


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

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """A box of the tensor (all of it by default), contiguous, on the CPU.

        Reads the bytes of the box, and of the rest only gaps below 64 KiB between them.
        CheckpointError: no such tensor or box, or the file has changed since it was opened.
        """
        placed = self._placed(name)
        entry = placed[0].entry
        box = whole(entry.shape) if box is None else box
        if len(box) != len(entry.shape) or not all(
            0 <= start <= stop <= size for (start, stop), size in zip(box, entry.shape, strict=True)
        ):
            raise CheckpointError(
                f"{name} does not have this box", values={"box": box, "shape": entry.shape}
            )
        tensor = torch.empty(shape_of(box), dtype=DTYPES[entry.dtype])
        for piece in placed:
            part = intersection(box, piece.entry.box)
            if part is not None:
                into = tensor[tuple(slice(*span) for span in moved(part, box))]
                self._read(piece, moved(part, piece.entry.box), into)
        return tensor

    def _placed(self, name: str) -> Sequence[Placed]:
        if name not in self._tensors:
            raise CheckpointError(
                f"no tensor {name!r} in this checkpoint",
                values={"checkpoint": str(self.path), "tensors": len(self._tensors)},
            )
        return self._tensors[name]

    def _read(self, piece: Placed, part: Box, into: torch.Tensor) -> None:
        """Fills `into` with `part`, a box within the piece."""
        file = piece.file
        try:
            with open_plain(self.path / file) as source:
                state = os.fstat(source.fileno())
                if (state.st_size, state.st_mtime_ns) != self._stamps[file]:
                    raise _broken(self.path, file, "has changed since it was opened")
                _read_box(source, piece, part, into)
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


def newest(
    folder: Path,
    rejected: Callable[[Path, str], None],
    passed: Callable[[Path, str], None] = lambda path, reason: None,
) -> Checkpoint | None:
    """The newest checkpoint that verifies; `rejected(path, reason)` for each newer one, and
    `passed(path, reason)` for newer ones that were never complete, or whose folder is a link."""
    found: Checkpoint | None = None
    for path in complete(folder):
        try:
            found = open_checkpoint(path)
            break
        except CheckpointError as error:
            rejected(path, error.what)
    with suppress(OSError):
        for step, generation, path, reason in passed_over(folder):
            if found is None or (step, generation) > (found.step, found.generation):
                passed(path, reason)
    return found


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
        if (stands := _step_of(meta)) not in (None, step):
            raise ValueError(f"is of step {step}, and the progress in it of step {stands}")
    except ValueError as error:
        raise _broken(path, MANIFEST, str(error)) from error
    stamps = {file.file: _check_start(path, file) for file in files}
    if verify:
        _check_chunks(path, files)
    return Checkpoint(
        step=step, generation=generation, meta=meta, path=path, _tensors=tensors, _stamps=stamps
    )


def _step_of(meta: Mapping[str, Any]) -> object:
    """The step that a checkpoint's progress says; None where it has no progress."""
    progress = meta.get("progress")
    return progress.get("step") if isinstance(progress, dict) else None


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


def _read_box(source: io.FileIO, piece: Placed, part: Box, into: torch.Tensor) -> None:
    """Fills `into` with `part`, a box within the piece, in as few reads as are worth it."""
    # One dim more in front, so that a scalar has one too.
    size, part, into = (1, *piece.entry.size), ((0, 1), *part), into[None]
    item = into.element_size()
    strides = [item * math.prod(size[dim + 1 :]) for dim in range(len(size))]
    # A run is a range of rows of dim `level`, read with all that lies between its first element
    # and its last; `span` are the bytes of one of its rows.
    level, span = len(size) - 1, item
    while level:
        run = span + (part[level][1] - part[level][0] - 1) * strides[level]
        if strides[level - 1] > RUN_BYTES or strides[level - 1] - run > GAP_BYTES:
            break
        level, span = level - 1, run
    row_bytes, within = strides[level], part[level + 1 :]
    lead = sum(start * by for (start, _), by in zip(within, strides[level + 1 :], strict=True))
    cut = tuple(slice(*dim) for dim in within)
    at_once = max(1, RUN_BYTES // row_bytes)
    first, last = part[level]
    for index in itertools.product(*(range(*dim) for dim in part[:level])):
        before = sum(i * by for i, by in zip(index, strides[:level], strict=True))
        rows = into[tuple(i - start for i, (start, _) in zip(index, part[:level], strict=True))]
        for row in range(first, last, at_once):
            target = rows[row - first : min(row + at_once, last) - first]
            run = span + (len(target) - 1) * row_bytes
            source.seek(piece.offset_bytes + before + row * row_bytes + lead)
            if run == target.nbytes and target.is_contiguous():
                _fill(source, _bytes(target))
                continue
            scratch = torch.empty((len(target), *size[level + 1 :]), dtype=into.dtype)
            _fill(source, _bytes(scratch)[lead : lead + run])
            target.copy_(scratch[(slice(None), *cut)])


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


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
