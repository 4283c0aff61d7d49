"""Writing a dataset folder: byte tokens into shards, the manifest, and all of it or nothing.

Not here: where tokens come from (`prepare`, `records`), reading them back (`source`). Traded away:
other widths than a byte; a writer holds at most one shard in memory.
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from cordee.data.manifest import FORMAT, MANIFEST, Shard, Split, fingerprint_of
from cordee.data.source import sync, write_sums
from cordee.errors import DataError

SHARD_BYTES = 256 << 20


class ShardWriter:
    """Cuts a stream of byte tokens into shards; each is hashed from the disk and synced."""

    def __init__(self, place: Path, split: str, shard_bytes: int) -> None:
        self._place = place
        self._split = split
        # Memory is taken as it fills, so a small corpus does not cost a whole shard.
        self._tokens = np.empty(shard_bytes, dtype=np.uint8)
        self._filled = 0
        self._ends: list[int] = []
        self._shards: list[Shard] = []

    def add(self, tokens: NDArray[np.uint8]) -> None:
        """Appends uint8 (n,)."""
        while tokens.size:
            # Full shards are written only now, so that a document's end falls into its own shard.
            if self._filled == self._tokens.size:
                self._write()
            taken = min(tokens.size, self._tokens.size - self._filled)
            self._tokens[self._filled : self._filled + taken] = tokens[:taken]
            self._filled += taken
            tokens = tokens[taken:]

    def end_document(self) -> None:
        """A document ends here."""
        self._ends.append(self._filled)

    def close(self) -> Split:
        """Writes what is left; what was written in all."""
        if self._filled:
            self._write()
        return Split(tuple(self._shards), sum(shard.tokens for shard in self._shards))

    def _write(self) -> None:
        path = self._place / f"{self._split}-{len(self._shards):05d}.safetensors"
        ends = np.array(self._ends, dtype=np.uint64)
        save_file({"tokens": self._tokens[: self._filled], "doc_ends": ends}, path)
        whole = write_sums(path)
        size = os.stat(path).st_size
        self._shards.append(Shard(path.name, self._filled, len(self._ends), size, whole))
        self._filled = 0
        self._ends = []


def write_manifest(place: Path, content: dict[str, Any]) -> None:
    """Writes `dataset.json` with its fingerprint, last of all files."""
    # A token is a byte, the one that ends a document included: bits per byte are bits per token.
    content = {"format": FORMAT, "dtype": "uint8", "bytes_per_token": 1.0, **content}
    content["fingerprint"] = fingerprint_of(content)
    (place / MANIFEST).write_text(json.dumps(content, indent=1), encoding="ascii")
    sync(place / MANIFEST)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` to write in; renamed to `folder` at the end, else removed.

    Its name is one that nobody else has: this host, process and moment are in it. What a killed
    process of this machine left behind is removed first. Of a link, the folder that it names.
    """
    if folder.is_symlink():
        folder = Path(os.path.realpath(folder))
    parent = folder.absolute().parent
    prefix = f".{folder.name}.{socket.gethostname()}."
    place = parent / f"{prefix}{os.getpid()}.{secrets.token_hex(4)}.partial"
    own = False
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f"{glob.escape(prefix)}*.partial"):
            tail = re.fullmatch(r"([0-9]+)(\.[0-9a-f]{8})?\.partial", left.name[len(prefix) :])
            if tail and left.is_dir() and not left.is_symlink() and not _is_running(tail[1]):
                shutil.rmtree(left)
        place.mkdir()
        own = True
        yield place
        sync(place)
        os.rename(place, folder)
        sync(parent)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the dataset cannot be written: {error}",
            values={"folder": str(folder)},
            fix="a folder that can be written, on a disk with room",
        ) from error
    finally:
        if own:
            shutil.rmtree(place, ignore_errors=True)


def _is_running(process: str) -> bool:
    """Whether the maker of a partial folder lives. With our own number it is a forerunner's:
    numbers come round again, above all in containers."""
    try:
        number = int(process)
        os.kill(number, 0)
    except (OverflowError, PermissionError):
        return True
    except ProcessLookupError:
        return False
    return number != os.getpid()
