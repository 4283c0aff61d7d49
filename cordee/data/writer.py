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

from cordee.data.dataset import fsync_path, write_checksums
from cordee.data.manifest import FORMAT, MANIFEST, Shard, Split, compute_fingerprint
from cordee.errors import DataError

SHARD_BYTES = 256 << 20


class ShardWriter:
    """Cuts a stream of byte tokens into shards; each is hashed from the disk and synced."""

    def __init__(self, folder: Path, split: str, shard_bytes: int) -> None:
        self._folder = folder
        self._split = split
        # Memory is taken as it fills, so a small corpus does not cost a whole shard.
        self._tokens = np.empty(shard_bytes, dtype=np.uint8)
        self._token_count = 0
        self._document_ends: list[int] = []
        self._shards: list[Shard] = []

    def add(self, tokens: NDArray[np.uint8]) -> None:
        """Appends uint8 (n,)."""
        while tokens.size:
            # Full shards are written only now, so that a document's end falls into its own shard.
            if self._token_count == self._tokens.size:
                self._write_shard()
            count = min(tokens.size, self._tokens.size - self._token_count)
            self._tokens[self._token_count : self._token_count + count] = tokens[:count]
            self._token_count += count
            tokens = tokens[count:]

    def end_document(self) -> None:
        """A document ends here."""
        self._document_ends.append(self._token_count)

    def close(self) -> Split:
        """Writes what is left; what was written in all."""
        if self._token_count:
            self._write_shard()
        return Split(tuple(self._shards), sum(shard.tokens for shard in self._shards))

    def _write_shard(self) -> None:
        path = self._folder / f"{self._split}-{len(self._shards):05d}.safetensors"
        ends = np.array(self._document_ends, dtype=np.uint64)
        save_file({"tokens": self._tokens[: self._token_count], "doc_ends": ends}, path)
        file_digest = write_checksums(path)
        size_bytes = os.stat(path).st_size
        self._shards.append(
            Shard(path.name, self._token_count, len(self._document_ends), size_bytes, file_digest)
        )
        self._token_count = 0
        self._document_ends = []


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes `dataset.json` with its fingerprint, last of all files."""
    # A token is a byte, the one that ends a document included: bits per byte are bits per token.
    content = {"format": FORMAT, "dtype": "uint8", "bytes_per_token": 1.0, **content}
    content["fingerprint"] = compute_fingerprint(content)
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="ascii")
    fsync_path(folder / MANIFEST)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` to write in; renamed to `folder` at the end, else removed.

    Its name is one that nobody else has: this host, process and moment are in it. What a killed
    process of this machine left behind is removed first. Of a link, the folder that it names.
    """
    if folder.is_symlink():
        folder = Path(os.path.realpath(folder))
    parent = folder.absolute().parent
    prefix = f".{folder.name}.{socket.gethostname()}."
    staging_folder = parent / f"{prefix}{os.getpid()}.{secrets.token_hex(4)}.partial"
    is_created = False
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(f"{glob.escape(prefix)}*.partial"):
            tail = re.fullmatch(r"([0-9]+)(\.[0-9a-f]{8})?\.partial", leftover.name[len(prefix) :])
            if (
                tail
                and leftover.is_dir()
                and not leftover.is_symlink()
                and not _is_running(tail[1])
            ):
                shutil.rmtree(leftover)
        staging_folder.mkdir()
        is_created = True
        yield staging_folder
        fsync_path(staging_folder)
        os.rename(staging_folder, folder)
        fsync_path(parent)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the dataset cannot be written: {error}",
            values={"folder": str(folder)},
            fix="a folder that can be written, on a disk with room",
        ) from error
    finally:
        if is_created:
            shutil.rmtree(staging_folder, ignore_errors=True)


def _is_running(pid_text: str) -> bool:
    """Whether the maker of a partial folder lives. With our own number it is a forerunner's:
    numbers come round again, above all in containers."""
    try:
        pid = int(pid_text)
        os.kill(pid, 0)
    except (OverflowError, PermissionError):
        return True
    except ProcessLookupError:
        return False
    return pid != os.getpid()
