"""The hold on a run's folder: who founds a run takes it alone, then its hosts share it.

So that nobody founds a second run there while one host of the first lives, whichever that is, and
frozen ones too. A lock of the system, freed by any death. Not here: who leads. Traded away: file
systems on which locks are not seen by all hosts (NFS without its lock service).
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from pathlib import Path


class Hold:
    """One process's hold on a lock file. OSError: the file cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = open(path, "a+", errors="replace")  # noqa: SIM115 - closed by `close`
        self._held = False

    def is_lock(self) -> bool:
        """Whether the file holds what `take` writes, or nothing: else it is somebody's own."""
        self._stream.seek(0)
        return re.fullmatch(r"([0-9]+ on [^\n]*)?", self._stream.read(400)) is not None

    def take(self) -> bool:
        """Alone; False while another process holds or shares the folder, or when the file is no
        longer the one in the folder: a start that was refused took it along."""
        if not self._lock(fcntl.LOCK_EX) or not self._is_current():
            return False
        self._stream.truncate(0)
        self._stream.write(f"{os.getpid()} on {socket.gethostname()}")
        self._stream.flush()
        return True

    def share(self, anew: bool = False) -> bool:
        """With other hosts, from now on; `anew`: also when it is held alone."""
        return (self._held and not anew) or self._lock(fcntl.LOCK_SH)

    def is_alone(self) -> bool:
        """Whether no other process holds or shares the folder now."""
        alone = self._lock(fcntl.LOCK_EX)
        self._lock(fcntl.LOCK_SH)
        return alone

    def holder(self) -> str:
        """Who took it last: a process id and a host."""
        self._stream.seek(0)
        return self._stream.read().strip() or "unknown"

    def close(self) -> None:
        """Gives it back."""
        self._stream.close()

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._stream.fileno()), os.stat(self._path))
        except OSError:
            return False

    def _lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._stream, kind | fcntl.LOCK_NB)
        except OSError:
            self._held = False  # a lock is given back before it is changed
            return False
        self._held = True
        return True
