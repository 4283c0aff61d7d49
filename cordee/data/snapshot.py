"""A run's own copy of its data, with a marker that says what was asked for and who made it.

The marker lies in the dataset folder and appears with it, whole. What a run finds in the place of
its snapshot is used, removed and made anew only as far as the marker proves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from cordee.config.run import Run
from cordee.data.corpora import BUILTINS, list_files
from cordee.data.dataset import fsync_path
from cordee.data.manifest import FORMAT, MANIFEST, DatasetInfo, is_dataset, read_info
from cordee.data.prepare import check_split_lengths, prepare
from cordee.data.writer import atomic_folder, is_mixture, split_sources

MARKER_FILE = "snapshot.json"
MARKER_FORMAT = "cordee-snapshot-1"
_MAX_MARKER_BYTES = 64 << 20

SnapshotState = Literal["free", "same", "own", "other"]
"""Of the place of a snapshot: nothing is there; what is asked for; another snapshot that was made
there, untouched; or something else, which is nobody's to remove."""


@dataclass(frozen=True)
class SnapshotMarker:
    """What `snapshot.json` says: the `request`, a digest of the `sources` as they were then, the
    `files` with their bytes, and the folder itself: its `path` and its `inode`."""

    request: Mapping[str, Any]
    sources: str
    files: Mapping[str, int]
    path: str
    inode: int


def make_request(run: Run) -> dict[str, Any]:
    """What of a run decides its snapshot, with absolute paths."""
    data, path = run.data, run.data.path
    return {
        "format": FORMAT,
        "path": [os.path.abspath(p) if p not in BUILTINS else p for p in _split_paths(path)],
        "kind": "mixture" if is_mixture(path) else "text",
        "weights": data.weights,
        "tokens": data.tokens,
        "held_out": data.held_out,
        "seed": run.run.seed,
    }


def classify_snapshot(snapshot_folder: Path, run: Run) -> SnapshotState:
    """What lies in the place of the run's snapshot."""
    if not os.path.lexists(snapshot_folder) or (
        snapshot_folder.is_dir() and not any(snapshot_folder.iterdir())
    ):
        return "free"
    marker = read_marker(snapshot_folder)
    if marker is None or not _is_unmodified(snapshot_folder, marker):
        return "other"
    if not matches_request(snapshot_folder, run):
        return "own"
    return "same" if marker.sources == _digest_sources(run.data.path) else "own"


def matches_request(snapshot_folder: Path, run: Run) -> bool:
    """Whether a snapshot of what the run asks for lies there, be its sources as they may."""
    marker = read_marker(snapshot_folder)
    is_same = marker is not None and marker.request == make_request(run)
    return is_same and is_dataset(snapshot_folder)


def make_snapshot(run: Run, snapshot_folder: Path) -> DatasetInfo:
    """Makes the run's snapshot in `snapshot_folder`, or nothing; a former one of its own there is
    replaced once the new one is whole. DataError as `prepare`, and when the run cannot use it."""
    data = run.data
    tokens, source_digest = data.tokens or None, _digest_sources(data.path)
    with atomic_folder(snapshot_folder) as staging_folder:
        dataset_folder = staging_folder / "dataset"
        prepare(
            data.path, dataset_folder, data.held_out, run.run.seed, tokens, weights=data.weights
        )
        info = read_info(dataset_folder)
        check_split_lengths(info, data.sequence)
        for entry in list(dataset_folder.iterdir()):
            os.rename(entry, staging_folder / entry.name)
        dataset_folder.rmdir()
        marker = SnapshotMarker(
            make_request(run),
            source_digest,
            {n: (staging_folder / n).stat().st_size for n in _list_files(staging_folder)},
            _real_path(snapshot_folder),
            os.stat(staging_folder).st_ino,
        )
        _write_marker(staging_folder, marker)
        remove_snapshot(snapshot_folder)
    return read_info(snapshot_folder)


def remove_snapshot(snapshot_folder: Path) -> None:
    """Removes the snapshot in `snapshot_folder`, file by file as its marker lists them; nothing
    when it is not one that was made there and left as it was. OSError: the disk refuses."""
    marker = read_marker(snapshot_folder)
    if marker is None or not _is_unmodified(snapshot_folder, marker):
        return
    snapshot_folder = Path(os.path.realpath(snapshot_folder))
    # The manifest first: half a dataset is none. The marker last: the rest is still known by it.
    for name in sorted(marker.files, key=lambda name: name != MANIFEST):
        (snapshot_folder / name).unlink(missing_ok=True)
    for folder in {Path(name).parent for name in marker.files} - {Path()}:
        with suppress(FileNotFoundError):
            (snapshot_folder / folder).rmdir()
    (snapshot_folder / MARKER_FILE).unlink()
    snapshot_folder.rmdir()


def read_marker(snapshot_folder: Path) -> SnapshotMarker | None:
    """The marker in a folder; None when there is none, or it is not as it was written."""
    path = snapshot_folder / MARKER_FILE
    try:
        if not path.is_file() or path.stat().st_size > _MAX_MARKER_BYTES:
            return None
        content = json.loads(path.read_bytes())
        digest = content.pop("digest")
        if content.pop("format") == MARKER_FORMAT and digest == _marker_digest(content):
            return SnapshotMarker(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return None


def _write_marker(folder: Path, marker: SnapshotMarker) -> None:
    fields = asdict(marker)
    content = {"format": MARKER_FORMAT, "digest": _marker_digest(fields), **fields}
    (folder / MARKER_FILE).write_text(json.dumps(content, indent=1), encoding="ascii")
    fsync_path(folder / MARKER_FILE)


def _marker_digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _is_unmodified(snapshot_folder: Path, marker: SnapshotMarker) -> bool:
    """Whether the folder is the very one that the marker was written in (not a copy, not one that
    was moved to where it does not belong), with no file but those, each of its size."""
    try:
        identity = (_real_path(snapshot_folder), os.stat(snapshot_folder).st_ino)
        # A removal that was cut short leaves folders without files.
        names = set(_list_files(snapshot_folder)) - {MARKER_FILE}
        names -= {str(Path(name).parent) for name in marker.files}
        if identity != (marker.path, marker.inode) or not names <= marker.files.keys():
            return False
        return all((snapshot_folder / n).lstat().st_size == marker.files[n] for n in names)
    except OSError:
        return False


def _real_path(snapshot_folder: Path) -> str:
    """Where a place is, whatever links lead to it. One that is a link itself is where that lies:
    another run's snapshot is not this run's for being linked."""
    return os.path.join(os.path.realpath(snapshot_folder.parent), snapshot_folder.name)


def _list_files(folder: Path) -> list[str]:
    """Everything below a folder that is no folder of its own, and empty folders' names; relative.
    Links are not followed."""
    names = []
    for parent, folders, files in os.walk(folder):
        names += [os.path.join(parent, name) for name in files]
        names += [p for name in folders if os.path.islink(p := os.path.join(parent, name))]
        if not folders and not files and Path(parent) != folder:
            names.append(parent)
    return [os.path.relpath(name, folder) for name in names]


def _digest_sources(path_spec: str) -> str:
    """A digest of the sources as they are now: names, sizes and times of all files."""
    rows: list[list[Any]] = []
    for path in split_sources(path_spec):
        is_prepared = is_dataset(Path(path))
        files = [Path(path) / MANIFEST] if is_prepared else list_files(path)
        rows += map(_file_status, files)
    return xxhash.xxh3_128_hexdigest(json.dumps(rows).encode())


def _file_status(file: Path) -> list[Any]:
    try:
        status = file.stat()
    except OSError:
        return [str(file.absolute()), None, None]
    return [str(file.absolute()), status.st_size, status.st_mtime_ns]


def _split_paths(path_spec: str) -> list[str]:
    """The paths in a data.path, in order."""
    if is_mixture(path_spec):
        return split_sources(path_spec)
    if os.path.exists(path_spec):
        return [path_spec]
    return [word.strip() for word in path_spec.split(",") if word.strip()]
