"""A run's own copy of its data, with a marker that says what was asked for and who made it.

The marker lies in the dataset folder and appears with it, whole. What a run finds in the place of
its snapshot is used, removed and made anew only as far as the marker proves. Not here: when that is
asked (`begin`), what a dataset folder is (`prepare`).
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
from cordee.data.builtin import BUILTINS, listed_files
from cordee.data.manifest import FORMAT, MANIFEST, DatasetInfo, is_dataset, read_info
from cordee.data.mixed import is_mixture, sources_of
from cordee.data.prepare import check_length, prepare
from cordee.data.records import RECORDS, check_images, is_images
from cordee.data.shards import making
from cordee.data.source import sync

MARKER = "snapshot.json"
MARKER_FORMAT = "cordee-snapshot-1"
_LIMIT_BYTES = 64 << 20

State = Literal["free", "same", "own", "other"]
"""Of the place of a snapshot: nothing is there; what is asked for; another snapshot that was made
there, untouched; or something else, which is nobody's to remove."""


@dataclass(frozen=True)
class Marker:
    """What `snapshot.json` says: the `request`, a digest of the `sources` as they were then, the
    `files` with their bytes, and the folder itself: its `path` and its `inode`."""

    request: Mapping[str, Any]
    sources: str
    files: Mapping[str, int]
    path: str
    inode: int


def request_of(run: Run) -> dict[str, Any]:
    """What of a run decides its snapshot, with absolute paths."""
    data, path = run.data, run.data.path
    return {
        "format": FORMAT,
        "path": [os.path.abspath(p) if p not in BUILTINS else p for p in _paths(path)],
        "kind": "mixture" if is_mixture(path) else "images" if is_images(path) else "text",
        "weights": data.weights,
        "tokens": data.tokens,
        "held_out": data.held_out,
        "seed": run.run.seed,
        "image": asdict(run.model.image) if is_images(path) else None,
    }


def state_of(place: Path, run: Run) -> State:
    """What lies in the place of the run's snapshot."""
    if not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir())):
        return "free"
    marker = read_marker(place)
    if marker is None or not _is_own(place, marker):
        return "other"
    same = marker.request == request_of(run) and marker.sources == _stamp(run.data.path)
    return "same" if same and is_dataset(place) else "own"


def is_of(place: Path, run: Run) -> bool:
    """Whether a snapshot of what the run asks for lies in `place`, be its sources as they may."""
    marker = read_marker(place)
    return marker is not None and is_dataset(place) and marker.request == request_of(run)


def make(run: Run, place: Path) -> DatasetInfo:
    """Makes the run's snapshot in `place`, or nothing; a former one of its own there is replaced
    once the new one is whole. DataError as `prepare`, and when the run cannot use it."""
    data, image = run.data, run.model.image
    tokens, stamp = data.tokens or None, _stamp(data.path)
    with making(place) as folder:
        inner = folder / "dataset"
        prepare(
            data.path, inner, data.held_out, run.run.seed, tokens, image=image, weights=data.weights
        )
        info = read_info(inner)
        check_images(info, run.model)
        check_length(info, data.sequence)
        for entry in list(inner.iterdir()):
            os.rename(entry, folder / entry.name)
        inner.rmdir()
        files = {name: (folder / name).stat().st_size for name in _files(folder)}
        inode = os.stat(folder).st_ino
        marker = Marker(request_of(run), stamp, files, _path_of(place), inode)
        _write_marker(folder, marker)
        remove(place)
    return read_info(place)


def remove(place: Path) -> None:
    """Removes the snapshot in `place`, file by file as its marker lists them; nothing when it is
    not one that was made there and left as it was. OSError: the disk refuses."""
    marker = read_marker(place)
    if marker is None or not _is_own(place, marker):
        return
    place = Path(os.path.realpath(place))
    # The manifest first: half a dataset is none. The marker last: the rest is still known by it.
    for name in sorted(marker.files, key=lambda name: name != MANIFEST):
        (place / name).unlink(missing_ok=True)
    for folder in {Path(name).parent for name in marker.files} - {Path()}:
        with suppress(FileNotFoundError):
            (place / folder).rmdir()
    (place / MARKER).unlink()
    place.rmdir()


def read_marker(place: Path) -> Marker | None:
    """The marker in a folder; None when there is none, or it is not as it was written."""
    path = place / MARKER
    try:
        if not path.is_file() or path.stat().st_size > _LIMIT_BYTES:
            return None
        plain = json.loads(path.read_bytes())
        digest = plain.pop("digest")
        if plain.pop("format") == MARKER_FORMAT and digest == _digest(plain):
            return Marker(**plain)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return None


def _write_marker(folder: Path, marker: Marker) -> None:
    plain = asdict(marker)
    content = {"format": MARKER_FORMAT, "digest": _digest(plain), **plain}
    (folder / MARKER).write_text(json.dumps(content, indent=1), encoding="ascii")
    sync(folder / MARKER)


def _digest(plain: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True).encode())


def _is_own(place: Path, marker: Marker) -> bool:
    """Whether the folder is the very one that the marker was written in (not a copy, not one that
    was moved to where it does not belong), with no file but those, each of its size."""
    try:
        here = (_path_of(place), os.stat(place).st_ino)
        # A removal that was cut short leaves folders without files.
        names = set(_files(place)) - {MARKER, *(str(Path(name).parent) for name in marker.files)}
        return (
            here == (marker.path, marker.inode)
            and names <= marker.files.keys()
            and all((place / name).lstat().st_size == marker.files[name] for name in names)
        )
    except OSError:
        return False


def _path_of(place: Path) -> str:
    """Where a place is, whatever links lead to it. One that is a link itself is where that lies:
    another run's snapshot is not this run's for being linked."""
    return os.path.join(os.path.realpath(place.parent), place.name)


def _files(folder: Path) -> list[str]:
    """Everything below a folder that is no folder of its own, and empty folders' names; relative.
    Links are not followed."""
    names = []
    for here, folders, files in os.walk(folder):
        linked = [name for name in folders if os.path.islink(os.path.join(here, name))]
        empty = ["."] if not folders and not files and Path(here) != folder else []
        names += [os.path.relpath(os.path.join(here, n), folder) for n in [*files, *linked, *empty]]
    return names


def _stamp(path_spec: str) -> str:
    """A digest of the sources as they are now: names, sizes and times of all files."""
    rows: list[list[Any]] = []
    for path in _paths(path_spec) if is_mixture(path_spec) else [path_spec]:
        if is_dataset(Path(path)):
            files = [Path(path) / MANIFEST]
        elif is_images(path_spec):
            files = [Path(name) for name in _paths(path_spec) if name not in BUILTINS]
        else:
            files = listed_files(path)
        rows += map(_status_of, files)
    return xxhash.xxh3_128_hexdigest(json.dumps(rows).encode())


def _status_of(file: Path) -> list[Any]:
    try:
        status = file.stat()
    except OSError:
        return [str(file.absolute()), None, None]
    return [str(file.absolute()), status.st_size, status.st_mtime_ns]


def _paths(path_spec: str) -> list[str]:
    """The paths in a data.path, in order."""
    if is_mixture(path_spec):
        return sources_of(path_spec)
    if os.path.exists(path_spec):
        return [path_spec]
    return [word.strip() for word in path_spec.removeprefix(RECORDS).split(",") if word.strip()]
