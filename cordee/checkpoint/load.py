"""Finds checkpoints, verifies them and reads boxes of tensors out of them.

Verified are the manifest's SHA-256, then file sizes and headers, then every chunk's checksum. Files
are read and not mapped: a disk that fails under a memory map kills the process, one that fails a
read is an error with a name.
"""

from __future__ import annotations

import io
import itertools
import math
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
    MANIFEST,
    FileEntry,
    PieceLocation,
    StepFolder,
    chunk_checksum,
    folder_name,
    locate_pieces,
    open_regular_file,
    parse_fields,
    parse_file_entry,
    read_checked_json,
    scan_step_folders,
)
from cordee.checkpoint.pieces import DTYPES
from cordee.errors import CheckpointError
from cordee.layout.slices import Box, box_shape, full_box, intersection, relative_box

BLOCK_BYTES = 1 << 20  # stays in a core's cache between reading and hashing
MAX_READ_BYTES = 8 << 20  # rows up to this size are read together, and this much into scratch
MAX_GAP_BYTES = 64 << 10  # a shorter gap costs less to read than a second read


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint; made by `open_checkpoint`. `meta` is what rank 0 gave to `begin`."""

    step: int
    generation: int
    meta: dict[str, Any]
    path: Path
    _locations: Mapping[str, Sequence[PieceLocation]]
    _file_stats: Mapping[str, tuple[int, int]]

    def names(self) -> list[str]:
        return sorted(self._locations)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._locations_of(name)[0].entry.shape

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """A box of the tensor (all of it by default), contiguous, on the CPU.

        Reads the bytes of the box, and of the rest only gaps below 64 KiB between them.
        CheckpointError: no such tensor or box, or the file has changed since it was opened.
        """
        locations = self._locations_of(name)
        entry = locations[0].entry
        box = full_box(entry.shape) if box is None else box
        if len(box) != len(entry.shape) or not all(
            0 <= start <= stop <= size for (start, stop), size in zip(box, entry.shape, strict=True)
        ):
            raise CheckpointError(
                f"{name} does not have this box", values={"box": box, "shape": entry.shape}
            )
        tensor = torch.empty(box_shape(box), dtype=DTYPES[entry.dtype])
        for location in locations:
            overlap = intersection(box, location.entry.box)
            if overlap is not None:
                output = tensor[tuple(slice(*span) for span in relative_box(overlap, box))]
                self._read_piece(location, relative_box(overlap, location.entry.box), output)
        return tensor

    def _locations_of(self, name: str) -> Sequence[PieceLocation]:
        if name not in self._locations:
            raise CheckpointError(
                f"no tensor {name!r} in this checkpoint",
                values={"checkpoint": str(self.path), "tensors": len(self._locations)},
            )
        return self._locations[name]

    def _read_piece(self, location: PieceLocation, box: Box, output: torch.Tensor) -> None:
        """Fills `output` with `box`, a box within the piece."""
        file_name = location.file
        try:
            with open_regular_file(self.path / file_name) as source:
                file_stat = os.fstat(source.fileno())
                if (file_stat.st_size, file_stat.st_mtime_ns) != self._file_stats[file_name]:
                    raise _damage_error(self.path, file_name, "has changed since it was opened")
                _read_box(source, location, box, output)
        except OSError as error:
            raise _damage_error(
                self.path, file_name, f"cannot be read: {error.strerror or error}"
            ) from error


def list_complete(folder: Path) -> list[Path]:
    """Folders that have a manifest, newest (step, generation) first; none if there is no folder.

    CheckpointError if the folder cannot be listed.
    """
    return [step_folder.path for step_folder in _scan(folder) if step_folder.is_complete]


def find_newest(
    folder: Path,
    on_rejected: Callable[[Path, str], None],
    on_skipped: Callable[[Path, str], None] = lambda path, reason: None,
) -> Checkpoint | None:
    """The newest checkpoint that verifies.

    `on_rejected(path, reason)` is called for each newer one that does not, `on_skipped` for each
    newer name that is no complete checkpoint. CheckpointError if the folder cannot be listed.
    """
    checkpoint: Checkpoint | None = None
    step_folders = _scan(folder)
    for step_folder in step_folders:
        if step_folder.is_complete:
            try:
                checkpoint = open_checkpoint(step_folder.path)
                break
            except CheckpointError as error:
                on_rejected(step_folder.path, error.message)
    for item in step_folders:
        newest = (checkpoint.step, checkpoint.generation) if checkpoint else (-1, -1)
        if item.problem and (item.step, item.generation) > newest:
            on_skipped(item.path, item.problem)
    return checkpoint


def _scan(folder: Path) -> list[StepFolder]:
    try:
        return scan_step_folders(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"the checkpoints cannot be listed: {error.strerror}", values={"folder": str(folder)}
        ) from error


def open_checkpoint(path: Path, verify: bool = True) -> Checkpoint:
    """Opens one checkpoint and, with `verify`, checks every byte of it (one rank does).

    CheckpointError names the file and the reason, for damaged data also the tensors in it.
    """
    path = Path(path)
    body = read_checked_json(path / MANIFEST)
    try:
        field_types = {"step": int, "generation": int, "meta": dict, "files": list}
        step, generation, meta, file_values = parse_fields(body, field_types)
        entries = [parse_file_entry(file_value) for file_value in file_values]
        if not entries:
            raise ValueError("lists no files")
        locations = locate_pieces(entries)
        if path.name.startswith("step-") and path.name != folder_name(step, generation):
            raise ValueError(f"is of step {step}, generation {generation}, not of this folder")
        if (progress_step := _step_of_progress(meta)) not in (None, step):
            raise ValueError(f"is of step {step}, and the progress in it of step {progress_step}")
    except ValueError as error:
        raise _damage_error(path, MANIFEST, str(error)) from error
    file_stats = {entry.file: _check_header(path, entry) for entry in entries}
    if verify:
        _check_chunks(path, entries)
    return Checkpoint(
        step=step,
        generation=generation,
        meta=meta,
        path=path,
        _locations=locations,
        _file_stats=file_stats,
    )


def _step_of_progress(meta: Mapping[str, Any]) -> object:
    progress = meta.get("progress")
    return progress.get("step") if isinstance(progress, dict) else None


def _damage_error(path: Path, file: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: {reason}",
        values={"checkpoint": str(path)},
        fix="an older checkpoint; this one is not used",
    )


def _read_exactly(source: io.FileIO, buffer: memoryview) -> None:
    """Reads until `buffer` is full. OSError at the end of the file."""
    while buffer:
        count = source.readinto(buffer)
        if not count:
            raise OSError(None, "the file is too short")
        buffer = buffer[count:]


def _read_box(source: io.FileIO, location: PieceLocation, box: Box, output: torch.Tensor) -> None:
    """Fills `output` with `box`, a box within the piece; gaps of up to MAX_GAP_BYTES between rows
    are read with them."""
    # One dim more in front, so that a scalar has one too.
    shape, box, output = (1, *location.entry.size), ((0, 1), *box), output[None]
    item_bytes = output.element_size()
    strides_bytes = [item_bytes * math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # A run is a range of rows of dim `level`, read with all that lies between its first element
    # and its last; `span` are the bytes of one of its rows.
    level, span_bytes = len(shape) - 1, item_bytes
    while level:
        run_bytes = span_bytes + (box[level][1] - box[level][0] - 1) * strides_bytes[level]
        if (
            strides_bytes[level - 1] > MAX_READ_BYTES
            or strides_bytes[level - 1] - run_bytes > MAX_GAP_BYTES
        ):
            break
        level, span_bytes = level - 1, run_bytes
    row_bytes, inner_box = strides_bytes[level], box[level + 1 :]
    lead_bytes = sum(
        start * stride
        for (start, _), stride in zip(inner_box, strides_bytes[level + 1 :], strict=True)
    )
    inner_index = tuple(slice(*dim) for dim in inner_box)
    batch_rows = max(1, MAX_READ_BYTES // row_bytes)
    first, last = box[level]
    for index in itertools.product(*(range(*dim) for dim in box[:level])):
        offset_bytes = sum(
            i * stride for i, stride in zip(index, strides_bytes[:level], strict=True)
        )
        output_rows = output[
            tuple(i - start for i, (start, _) in zip(index, box[:level], strict=True))
        ]
        for row in range(first, last, batch_rows):
            target = output_rows[row - first : min(row + batch_rows, last) - first]
            run_bytes = span_bytes + (len(target) - 1) * row_bytes
            source.seek(location.offset_bytes + offset_bytes + row * row_bytes + lead_bytes)
            if run_bytes == target.nbytes and target.is_contiguous():
                _read_exactly(source, _byte_view(target))
                continue
            scratch = torch.empty((len(target), *shape[level + 1 :]), dtype=output.dtype)
            _read_exactly(source, _byte_view(scratch)[lead_bytes : lead_bytes + run_bytes])
            target.copy_(scratch[(slice(None), *inner_index)])


def _byte_view(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _read_blocks(source: io.FileIO, buffer: memoryview, size_bytes: int) -> Iterator[memoryview]:
    """The next bytes of a file, a buffer at a time. OSError if it ends before."""
    while size_bytes:
        block = buffer[:size_bytes]
        _read_exactly(source, block)
        yield block
        size_bytes -= len(block)


def _check_header(path: Path, entry: FileEntry) -> tuple[int, int]:
    """Checks size and header of a file against the manifest; its size and time of change."""
    expected_header = entry.file_layout.header
    file_header = bytearray(len(expected_header))
    try:
        with open_regular_file(path / entry.file) as source:
            file_stat = os.fstat(source.fileno())
            if file_stat.st_size != entry.bytes:
                raise _damage_error(
                    path, entry.file, f"has {file_stat.st_size} bytes, {entry.bytes} were written"
                )
            _read_exactly(source, memoryview(file_header))
    except OSError as error:
        raise _damage_error(
            path, entry.file, f"cannot be read: {error.strerror or error}"
        ) from error
    if file_header != expected_header:
        raise _damage_error(path, entry.file, "its header is not the one that the manifest implies")
    return file_stat.st_size, file_stat.st_mtime_ns


def _check_chunks(path: Path, files: Sequence[FileEntry]) -> None:
    """Checks every chunk on a few threads; CheckpointError names the first bad one."""
    tasks = [(file, start) for file in files for start in range(0, file.bytes, CHUNK_BYTES)]
    thread_count = min(4, os.cpu_count() or 1, len(tasks))
    with ThreadPoolExecutor(thread_count) as pool:
        shares = [tasks[k::thread_count] for k in range(thread_count)]
        failures = [
            failure for failure in pool.map(_find_bad_chunk, repeat(path), shares) if failure
        ]
    if failures:
        file, _, reason = min(failures)
        raise _damage_error(path, file, reason)


def _find_bad_chunk(
    path: Path, tasks: Sequence[tuple[FileEntry, int]]
) -> tuple[str, int, str] | None:
    """The first bad chunk among these: its file, its first byte, what is wrong."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for entry, start in tasks:
        stop = min(start + CHUNK_BYTES, entry.bytes)
        try:
            with open_regular_file(path / entry.file) as source:
                source.seek(start)
                checksum = chunk_checksum(_read_blocks(source, buffer, stop - start))
        except OSError as error:
            return entry.file, start, f"cannot be read: {error.strerror or error}"
        if checksum != entry.chunks[start // CHUNK_BYTES]:
            piece_keys = [
                piece.key
                for piece, offset in zip(entry.pieces, entry.file_layout.offsets_bytes, strict=True)
                if offset < stop and offset + piece.size_bytes > start
            ]
            names = ", ".join(piece_keys[:3]) + (
                f" and {len(piece_keys) - 3} more" if piece_keys[3:] else ""
            )
            return entry.file, start, f"bytes {start} to {stop} are not what was written ({names})"
    return None
