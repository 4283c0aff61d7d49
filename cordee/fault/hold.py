"""The hold on a run's folder: who founds a run takes it alone, then its hosts share it.

So that nobody founds a second run there while one host of the first lives, whichever that is, and
frozen ones too. A lock of the system, freed by any death. Not here: who leads. Traded away: file
systems on which locks are not seen by all hosts (NFS without its lock service).
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path


class Hold:
    """One process's hold on a lock file. OSError: the file cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "a+")  # noqa: SIM115 - closed by `close`
        self._held = False

    def take(self) -> bool:
        """Alone; False while another process holds or shares the folder."""
        if not self._lock(fcntl.LOCK_EX):
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

    def _lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._stream, kind | fcntl.LOCK_NB)
        except OSError:
            self._held = False  # a lock is given back before it is changed
            return False
        self._held = True
        return True
