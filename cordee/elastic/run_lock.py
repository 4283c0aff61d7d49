"""The lock on a run's folder: the founder takes it alone, then the run's hosts share it.

So nobody founds a second run while a host of the first lives, even a frozen one. A lock of the
system, freed by any death; NFS needs its lock service for it.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from pathlib import Path


class RunLock:
    """One process's hold on a lock file. OSError: the file cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "a+", errors="replace")  # noqa: SIM115 - closed by `close`
        self._is_locked = False

    def is_lock_file(self) -> bool:
        """Whether the file holds what `acquire_exclusive` writes, or nothing: else it is somebody's
        own."""
        self._file.seek(0)
        return re.fullmatch(r"([0-9]+ on [^\n]*)?", self._file.read(400)) is not None

    def acquire_exclusive(self) -> bool:
        """Alone; False while another process holds or shares the folder, or when the file is no
        longer the one in the folder: a start that was refused took it along."""
        if not self._try_lock(fcntl.LOCK_EX) or not self._is_same_file():
            return False
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} on {socket.gethostname()}")
        self._file.flush()
        return True

    def acquire_shared(self, from_exclusive: bool = False) -> bool:
        """With other hosts, from now on; `from_exclusive`: also when it is held alone."""
        return (self._is_locked and not from_exclusive) or self._try_lock(fcntl.LOCK_SH)

    def is_only_holder(self) -> bool:
        """Whether no other process holds or shares the folder now."""
        is_exclusive = self._try_lock(fcntl.LOCK_EX)
        self._try_lock(fcntl.LOCK_SH)
        return is_exclusive

    def holder(self) -> str:
        """Who took it last: a process id and a host."""
        self._file.seek(0)
        return self._file.read().strip() or "unknown"

    def close(self) -> None:
        """Gives it back."""
        self._file.close()

    def _is_same_file(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except OSError:
            return False

    def _try_lock(self, operation: int) -> bool:
        try:
            fcntl.flock(self._file, operation | fcntl.LOCK_NB)
        except OSError:
            self._is_locked = False  # a lock is given back before it is changed
            return False
        self._is_locked = True
        return True
