"""Messages between a host's supervisor and its workers: JSON, one packet each, over a socketpair.

Both ends are processes of one machine that one made and the other inherited, so nothing is
authenticated here (hosts talk by `fault/link.py`). No torch. Packets keep their borders
(SOCK_SEQPACKET), so a reader never sees half a message, and a closed end is told by an empty one.
Traded away: messages of more than a few hundred KiB.
"""

from __future__ import annotations

import json
import socket
import struct
from collections import deque
from collections.abc import Mapping
from typing import Any

PACKET_BYTES = 1 << 20
"""Largest packet that is read."""

MARK = struct.Struct("<q32s")
"""What a worker notes in shared memory of where it is: step, phase."""


class Talk:
    """One end. Never blocks: what the other end does not take waits here, in order."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._waiting: deque[bytes] = deque()
        self.closed = False

    def fileno(self) -> int:
        """Readable when `hear` has something."""
        return self._end.fileno()

    def say(self, message: Mapping[str, Any]) -> None:
        """Sends a message, or keeps it until `flush`; nothing when the other end is gone."""
        self._waiting.append(json.dumps(message).encode())
        self.flush()

    def flush(self) -> None:
        """Sends what waits, as far as the other end takes it."""
        try:
            while self._waiting and not self.closed:
                self._end.send(self._waiting[0])
                self._waiting.popleft()
        except BlockingIOError:
            return
        except OSError:
            self.closed = True

    def hear(self) -> list[dict[str, Any]]:
        """All messages that have come; `closed` is set when there will be no more."""
        found = []
        while not self.closed:
            try:
                packet = self._end.recv(PACKET_BYTES)
            except BlockingIOError:
                break
            except OSError:
                packet = b""
            if packet:
                found.append(json.loads(packet))
            else:
                self.closed = True
        return found

    def close(self) -> None:
        """Ends the talk; the other end hears of it."""
        self.closed = True
        self._end.close()


def pair() -> tuple[Talk, socket.socket]:
    """The supervisor's end, and the socket that a worker inherits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Talk(ours), theirs
