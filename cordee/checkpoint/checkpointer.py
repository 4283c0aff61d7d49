"""Saves a run's state while training goes on: every rank writes its part, rank 0 commits.

A save copies tensors into buffers in memory (the only stall), then a thread hashes and writes them.
Ranks learn of each other's status with the step's summary; when all have written, rank 0 renames
the manifest into place, which is the commit.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cordee.checkpoint.format import (
    CHUNK_BYTES,
    JSON_LIMIT_BYTES,
    MANIFEST,
    FileEntry,
    FileLayout,
    PieceEntry,
    StepFolder,
    canonical_json,
    chunk_checksum,
    encode_checked_json,
    file_name,
    folder_name,
    locate_pieces,
    make_file_layout,
    parse_fields,
    parse_file_entry,
    part_file_name,
    read_checked_json,
    scan_step_folders,
)
from cordee.checkpoint.pieces import DTYPES, Piece, make_entry
from cordee.errors import CheckpointError
from cordee.hardware.devices import DEVICES

RETRY_STEPS = 10
"""Steps after which a failed save is tried again."""

FINAL_SAVE_ATTEMPTS = 3
"""Tries for the save at the end of a run."""

EventCallback = Callable[[str, int, Mapping[str, Any]], object]
"""(event, step, its fields)"""

_OWN_FILE_NAME = re.compile(
    rf"(rank-[0-9]{{5,9}}\.(safetensors|json)|{re.escape(MANIFEST)})(\.tmp)?"
)
"""Names of the files that saves write into a checkpoint's folder."""


class SaveStatus(enum.IntEnum):
    """Where one rank stands with its save; a number, so that ranks can send it."""

    IDLE = 0
    WRITING = 1
    WRITTEN = 2
    FAILED = 3
    COMMITTED = 4  # rank 0 alone


@dataclass(frozen=True, kw_only=True)
class CommitReport:
    """A durable checkpoint: its size, seconds from `begin` to the commit, and what old checkpoints
    could not be removed, if any."""

    step: int
    path: Path
    bytes: int
    seconds: float
    warning: str | None = None


@dataclass(frozen=True)
class _SaveJob:
    """One save in flight."""

    step: int
    generation: int
    path: Path
    entries: tuple[PieceEntry, ...]
    file_layout: FileLayout
    meta: Mapping[str, Any]
    start_s: float


def _no_event(event: str, step: int, fields: Mapping[str, Any]) -> None:
    """Where nobody keeps events."""


class Checkpointer:
    """Saves of one rank, one at a time; every rank has one and calls the same verbs.

    A run calls `is_due` and `begin` after a step, `advance` with every rank's status after the
    following ones, `drain` at its end. These decide by what all ranks know, so all decide alike.
    They are made of `join`, `commit` (rank 0) and `finish`, which a caller that gathers statuses
    itself may use instead.

    `folder` is the run's `checkpoints`; its parent must exist, so that a run that was deleted or
    unmounted is not made anew somewhere else. `keep_count` complete checkpoints remain.
    `fault_point(name, step)` is called where a fault may be injected; an OSError that it raises
    counts as the disk's.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        keep_count: int,
        fault_point: Callable[[str, int], None],
        every_steps: int = 0,
        log_event: EventCallback = _no_event,
    ) -> None:
        if not 0 <= rank < world_size or keep_count < 1:
            raise CheckpointError(
                "a saver needs 0 <= rank < world and keeps at least one checkpoint",
                values={"rank": rank, "world": world_size, "keep": keep_count},
            )
        self._folder, self._keep_count = Path(folder), keep_count
        self._rank, self._world_size = rank, world_size
        self._fault_point, self._log_event = fault_point, log_event
        self._every_steps = every_steps
        self._retry_step: int | None = None
        self._staging_buffer = torch.empty(0, dtype=torch.uint8)
        self._job: _SaveJob | None = None
        self._thread: threading.Thread | None = None
        self._status = SaveStatus.IDLE
        self._owns_files = False  # while the folder may hold a complete checkpoint
        self.failure: str | None = None
        """Why the save FAILED, in a sentence with the operating system's reason."""
        self.saved_step: int | None = None
        """The newest step that is known to be committed."""

    # ---- the run's view: when, and together with all ranks ----

    @property
    def status(self) -> SaveStatus:
        """The status now, without waiting; ranks exchange it in the step's summary."""
        return self._status

    @property
    def has_pending_save(self) -> bool:
        """Whether a save is in flight or must be tried again."""
        return self._job is not None or self._retry_step is not None

    def is_due(self, step: int) -> bool:
        """Whether a save should begin after `step`."""
        if self._job is not None:
            return False
        if self._retry_step is not None and step >= self._retry_step:
            return True
        return self._every_steps > 0 and step % self._every_steps == 0

    def advance(self, statuses: Sequence[int]) -> None:
        """Takes the next step of a save that `statuses`, by rank, show to be possible.

        When all have written, rank 0 commits; all others see that in the next statuses and finish.
        One failure anywhere fails the save everywhere: it is tried again RETRY_STEPS later.
        """
        job = self._job
        if job is None or any(s in (SaveStatus.WRITING, SaveStatus.IDLE) for s in statuses):
            return
        failed_ranks = [rank for rank, status in enumerate(statuses) if status == SaveStatus.FAILED]
        if failed_ranks:
            self._retry_step = job.step + RETRY_STEPS
            cause = self.failure or f"rank {failed_ranks[0]} could not write"
            self._log_event("checkpoint_failed", job.step, {"ranks": failed_ranks, "cause": cause})
        elif statuses[0] == SaveStatus.COMMITTED:
            self.saved_step = job.step
        else:
            report = self.commit() if self._rank == 0 else None  # None: FAILED, and all will see it
            if report is not None:
                fields = {"bytes": report.bytes, "seconds": report.seconds}
                self._log_event("checkpoint", job.step, {**fields, "path": report.path.name})
            return
        self.finish()

    def drain(
        self, gather_statuses: Callable[[int], Sequence[int]], retry: Callable[[], None]
    ) -> bool:
        """Ends what is in flight; whether the newest save succeeded. Every rank calls it.

        `gather_statuses` sends this rank's status and returns all ranks'; `retry` begins the same
        save anew.
        """
        for attempt in range(FINAL_SAVE_ATTEMPTS):
            while self._job is not None:
                self.join()
                self.advance(gather_statuses(self.status))
            if self._retry_step is None or attempt == FINAL_SAVE_ATTEMPTS - 1:
                break
            retry()
        return self._retry_step is None

    # ---- one save ----

    def join(self, timeout_s: float | None = None) -> SaveStatus:
        """Waits for the writing thread, at most `timeout_s`; the status then."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._status

    def begin(
        self, step: int, generation: int, pieces: Sequence[Piece], meta: Mapping[str, Any]
    ) -> None:
        """Copies the pieces and starts to write them; the tensors may change once this returns.

        Every rank calls it for the same step. `meta` is JSON; rank 0's is stored. CheckpointError:
        a save is in flight, or a piece or `meta` cannot be written. What the disk refuses shows
        later, as FAILED.
        """
        if self._status is not SaveStatus.IDLE:
            raise CheckpointError(
                "a save is in flight",
                values={"step": step, "status": self._status.name},
                fix="call finish() on every rank before the next begin()",
            )
        start_s = time.monotonic()
        try:
            _check_json(meta)
            meta = json.loads(canonical_json(dict(meta)))
            pairs = [(make_entry(piece), piece.tensor) for piece in pieces]
            pairs = [(entry, tensor) for entry, tensor in pairs if not entry.is_empty]
            pairs.sort(key=lambda pair: pair[0].sort_key)
            entries = tuple(entry for entry, _ in pairs)
            file_layout = make_file_layout(entries)
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"this cannot be saved: {error}", values={"step": step, "rank": self._rank}
            ) from error
        path = self._folder / folder_name(step, generation)
        job = _SaveJob(step, generation, path, entries, file_layout, meta, start_s)
        self._job = job
        self._retry_step, self.failure, self._owns_files = None, None, False
        try:
            self._fault_point("save.stage", step)
            self._stage(job, [tensor for _, tensor in pairs])
            thread = threading.Thread(target=self._write_job, args=(job,), daemon=True)
            self._status = SaveStatus.WRITING
            thread.start()
            self._thread = thread
        except (OSError, MemoryError, RuntimeError) as error:  # no memory, no thread
            self._fail(job, error)

    def commit(self) -> CommitReport | None:
        """Rank 0, once every rank is WRITTEN: merges the parts, renames the manifest, removes old
        checkpoints. None if it did not happen; the status is then FAILED and `failure` says why.
        """
        job = self._job
        if self._rank != 0 or self._status is not SaveStatus.WRITTEN or job is None:
            raise CheckpointError(
                "only rank 0 commits, once, and only what is written",
                values={"rank": self._rank, "status": self._status.name},
            )
        try:
            rank_files = [_read_part_file(job, rank) for rank in range(self._world_size)]
            locate_pieces(parse_file_entry(rank_file) for rank_file in rank_files)
            body = {"step": job.step, "generation": job.generation, "meta": job.meta}
            self._fault_point("save.manifest", job.step)
            _write_checked_json(
                job.path / MANIFEST,
                {**body, "files": rank_files},
                lambda: self._fault_point("save.rename", job.step),
            )
            _fsync_folder(self._folder)
        except (OSError, ValueError, CheckpointError) as error:
            self._fail(job, error)
            return None
        self._status = SaveStatus.COMMITTED
        return CommitReport(
            step=job.step,
            path=job.path,
            bytes=sum(rank_file["bytes"] for rank_file in rank_files),
            seconds=time.monotonic() - job.start_s,
            warning=self._prune(job),
        )

    def finish(self) -> None:
        """Back to IDLE, on every rank, after the commit or a failure; waits for the thread."""
        self.join()
        # Another rank's failure does not tell the others whether rank 0 has committed meanwhile,
        # so only rank 0 and who failed itself remove their files. The folder stays until rank 0
        # begins a later save: another rank may already be trying this step again.
        is_failed = self._status is SaveStatus.FAILED
        should_clean = is_failed or (self._rank == 0 and self._status is not SaveStatus.COMMITTED)
        if self._job is not None and should_clean and self._owns_files:
            _remove_rank_files(self._job.path, self._rank)
        self._job = self._thread = self.failure = None
        self._status = SaveStatus.IDLE

    def _fail(self, job: _SaveJob, error: Exception | str) -> None:
        """FAILED; the sentence is set before the status, by which another thread looks for it."""
        reason = error.message if isinstance(error, CheckpointError) else str(error)
        if isinstance(error, OSError) and error.errno is not None:
            error_name = errno.errorcode.get(error.errno, str(error.errno))
            reason = f"{error.strerror} ({error_name})"
        self.failure = (
            f"step {job.step} is not saved: {reason}; rank {self._rank} had "
            f"{job.file_layout.size_bytes} bytes to write into {job.path}"
        )
        self._status = SaveStatus.FAILED

    def _stage(self, job: _SaveJob, tensors: list[torch.Tensor]) -> None:
        """Copies the whole file into the staging buffer, which grows and never shrinks."""
        devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
        pin_memory = any(DEVICES[device.type].pinning for device in devices)
        header, offsets_bytes, size_bytes = job.file_layout
        if self._staging_buffer.numel() < size_bytes or (
            pin_memory and not self._staging_buffer.is_pinned()
        ):
            self._staging_buffer = torch.empty(0, dtype=torch.uint8)  # frees the old one first
            self._staging_buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pin_memory)
        self._staging_buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        for entry, offset, tensor in zip(job.entries, offsets_bytes, tensors, strict=True):
            region = self._staging_buffer[offset : offset + entry.size_bytes].view(
                DTYPES[entry.dtype]
            )
            region.view(entry.size).copy_(tensor.detach(), non_blocking=pin_memory)
        for device in devices:
            if DEVICES[device.type].streams:
                torch.accelerator.current_stream(device).synchronize()
            else:
                torch.accelerator.synchronize(device)

    def _write_job(self, job: _SaveJob) -> None:
        """The thread's function; it ends WRITTEN or FAILED, whatever happens."""
        try:
            self._prepare_folder(job)
            entry = self._write_file(job)
            self._fault_point("save.part", job.step)
            _write_checked_json(
                job.path / part_file_name(self._rank),
                {"step": job.step, "generation": job.generation, "file": asdict(entry)},
            )
            self._status = SaveStatus.WRITTEN
        except (OSError, ValueError) as error:
            self._fail(job, error)
        finally:
            if self._status is SaveStatus.WRITING:
                self._fail(job, "the writing thread died")

    def _prepare_folder(self, job: _SaveJob) -> None:
        """Makes the folders; OSError for one with a complete checkpoint. Rank 0 removes what
        earlier saves left half-written, as it may be what fills the disk."""
        for folder in (self._folder, job.path):
            if not folder.is_dir():
                folder.mkdir(exist_ok=True)
                _fsync_folder(folder.parent)
        if os.path.lexists(job.path / MANIFEST):
            raise FileExistsError(errno.EEXIST, "there is a complete checkpoint already")
        if self._rank == 0:
            for stale_folder in _stale_folders(scan_step_folders(self._folder), job):
                _remove_checkpoint(stale_folder)
        self._owns_files = True

    def _write_file(self, job: _SaveJob) -> FileEntry:
        """Writes and fsyncs the staged file; a second thread hashes it meanwhile."""
        data = self._staging_buffer.numpy().data[: job.file_layout.size_bytes]
        chunks: list[str] = []

        def hash_chunks() -> None:
            for start in range(0, len(data), CHUNK_BYTES):
                chunks.append(chunk_checksum([data[start : start + CHUNK_BYTES]]))

        hash_thread = threading.Thread(target=hash_chunks, daemon=True)
        path, midpoint = job.path / file_name(self._rank), len(data) // 2
        path.unlink(missing_ok=True)  # what a failed save of this very step left
        hash_thread.start()
        try:
            with open(path, "xb", buffering=0) as file:
                for start, stop in ((0, midpoint), (midpoint, len(data))):
                    if start:
                        self._fault_point("save.write", job.step)
                    while start < stop:
                        start += file.write(data[start : min(start + CHUNK_BYTES, stop)])
                os.fsync(file.fileno())
        finally:
            hash_thread.join()  # it reads the staging buffer
        return FileEntry(file=path.name, bytes=len(data), chunks=tuple(chunks), pieces=job.entries)

    def _prune(self, job: _SaveJob) -> str | None:
        """Removes checkpoints beyond `keep_count` and half-written ones; a sentence if it fails."""
        try:
            self._fault_point("save.delete", job.step)
            for rank in range(self._world_size):
                (job.path / part_file_name(rank)).unlink(missing_ok=True)
            step_folders = scan_step_folders(self._folder)
        except OSError as error:
            return f"nothing was pruned: {error.strerror or error}"
        job_key = (job.step, job.generation)
        older_paths = [
            f.path for f in step_folders if f.is_complete and (f.step, f.generation) < job_key
        ]
        stale_paths = older_paths[self._keep_count - 1 :] + _stale_folders(step_folders, job)
        leftover_names = [path.name for path in stale_paths if not _remove_checkpoint(path)]
        return (
            f"these could not be removed: {', '.join(leftover_names)}" if leftover_names else None
        )


def _stale_folders(step_folders: Sequence[StepFolder], job: _SaveJob) -> list[Path]:
    """Half-written folders of earlier generations, and of earlier steps of this one."""
    job_key = (job.generation, job.step)
    half_written = [f for f in step_folders if f.is_folder and not f.is_complete]
    return [f.path for f in half_written if (f.generation, f.step) < job_key]


def _check_json(value: Any, depth: int = 0) -> None:
    """TypeError for keys that are no text (JSON makes "1" of 1), ValueError for deep nesting."""
    if depth > 100:
        raise ValueError("meta is nested more than 100 deep")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("meta has a key that is not text")
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_json(item, depth + 1)


def _read_part_file(job: _SaveJob, rank: int) -> dict[str, Any]:
    """What one rank wrote. ValueError or CheckpointError unless its files are of this save."""
    field_types = {"step": int, "generation": int, "file": dict}
    step, generation, file_fields = parse_fields(
        read_checked_json(job.path / part_file_name(rank)), field_types
    )
    if (step, generation, file_fields.get("file")) != (job.step, job.generation, file_name(rank)):
        raise ValueError(f"the part file of rank {rank} is of another save")
    if os.stat(job.path / file_name(rank)).st_size != file_fields.get("bytes"):
        raise ValueError(f"{file_name(rank)} has not the size its writer says")
    return dict(file_fields)


def _write_checked_json(
    path: Path, body: Mapping[str, Any], before_rename: Callable[[], None] = lambda: None
) -> None:
    """Writes it atomically and durably. OSError; ValueError when it is too long."""
    raw = encode_checked_json(body)
    if len(raw) > JSON_LIMIT_BYTES:
        raise ValueError(f"{path.name} would have {len(raw)} bytes; limit {JSON_LIMIT_BYTES}")
    temporary_path = path.with_name(path.name + ".tmp")
    temporary_path.unlink(missing_ok=True)
    with open(temporary_path, "xb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    before_rename()
    os.replace(temporary_path, path)
    _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where the file system can."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


def _remove_checkpoint(path: Path) -> bool:
    """Removes a checkpoint; whether nothing of it is left. Files that no save writes stay, and the
    folder with them. The manifest goes first, so that half a checkpoint never looks complete."""
    try:
        (path / MANIFEST).unlink(missing_ok=True)
        names = os.listdir(path)
    except OSError:
        return not os.path.lexists(path)
    own_names = [name for name in names if _OWN_FILE_NAME.fullmatch(name)]
    for name in own_names:
        with contextlib.suppress(OSError):
            (path / name).unlink()
    with contextlib.suppress(OSError):
        path.rmdir()
    return not any(os.path.lexists(path / name) for name in own_names) and (
        len(own_names) < len(names) or not os.path.lexists(path)
    )


def _remove_rank_files(path: Path, rank: int) -> None:
    """Removes what a rank wrote, as far as the disk allows, the manifest (rank 0) first."""
    names = [MANIFEST] if rank == 0 else []
    with contextlib.suppress(OSError):
        for name in [*names, part_file_name(rank), file_name(rank)]:
            for file in (path / name, path / f"{name}.tmp"):
                file.unlink(missing_ok=True)
