"""Messages between a host's supervisor and its workers: JSON, one packet each, over a socketpair.

Both ends are processes of one machine that one made and the other inherited, so nothing is
authenticated here (hosts talk by `fault/link.py`). No torch. Packets keep their borders
(SOCK_SEQPACKET), so a reader never sees half a message, and a closed end is told by an empty one;
on a stream (SOCK_STREAM, where the system has no such packets) each has its length before it.
Traded away: messages of more than a few hundred KiB.
"""

from __future__ import annotations

import json
import socket
import struct
from collections import deque
from collections.abc import Mapping
from typing import Any

from cordee.system import packet_pair

PACKET_BYTES = 1 << 20
"""Largest packet that is read."""

LENGTH = struct.Struct("<I")
"""What stands before a message on a stream: its bytes."""

MARK = struct.Struct("<q32s")
"""What a worker notes in shared memory of where it is: step, phase."""


class Talk:
    """One end. Never blocks: what the other end does not take waits here, in order."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._stream = end.type == socket.SOCK_STREAM
        self._come = bytearray()
        """Of a stream: what came and is no whole message yet."""
        self._waiting: deque[bytes] = deque()
        self.closed = False

    def fileno(self) -> int:
        """Readable when `hear` has something."""
        return self._end.fileno()

    def say(self, message: Mapping[str, Any]) -> None:
        """Sends a message, or keeps it until `flush`; nothing when the other end is gone."""
        packet = json.dumps(message).encode()
        self._waiting.append(LENGTH.pack(len(packet)) + packet if self._stream else packet)
        self.flush()

    def flush(self) -> None:
        """Sends what waits, as far as the other end takes it."""
        try:
            while self._waiting and not self.closed:
                sent = self._end.send(self._waiting[0])
                packet = self._waiting.popleft()
                if sent < len(packet):  # a stream takes what it has room for
                    self._waiting.appendleft(packet[sent:])
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
            if not packet:
                self.closed = True
            elif self._stream:
                self._come += packet
                found += self._whole()
            else:
                found.append(json.loads(packet))
        return found

    def _whole(self) -> list[dict[str, Any]]:
        """The messages of a stream that have come whole."""
        found, at = [], 0
        while len(self._come) >= at + LENGTH.size:
            start = at + LENGTH.size
            stop = start + LENGTH.unpack_from(self._come, at)[0]
            if len(self._come) < stop:
                break
            found.append(json.loads(self._come[start:stop]))
            at = stop
        del self._come[:at]
        return found

    def close(self) -> None:
        """Ends the talk; the other end hears of it."""
        self.closed = True
        self._end.close()


def pair() -> tuple[Talk, socket.socket]:
    """The supervisor's end, and the socket that a worker inherits."""
    ours, theirs = packet_pair()
    return Talk(ours), theirs
