"""Messages between a host's supervisor and its workers: JSON, one packet each, over a socketpair.

The worker inherited its end, so nothing is authenticated. Packets keep their borders
(SOCK_SEQPACKET), and an empty one is the end; on a stream (SOCK_STREAM, where the system has none)
each has its length before it. A message is at most a few hundred KiB.
"""

from __future__ import annotations

import json
import socket
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cordee.hardware.system import packet_pair

MAX_PACKET_BYTES = 1 << 20
"""Largest packet that is read."""

LENGTH_PREFIX = struct.Struct("<I")
"""What stands before a message on a stream: its bytes."""

PROGRESS_RECORD = struct.Struct("<q32s")
"""What a worker notes in shared memory of where it is: step, phase."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A worker's place in a generation; number 0 is the one generation of ranks without our
    supervisor. A supervisor sends it as it is, by field names."""

    rank: int
    size: int
    local_rank: int
    generation: int = 0
    plan: str = ""
    """The generation's plan (JSON); empty: the one that the process was started with."""
    drill: str = ""
    """The fault that is armed in this generation."""
    verdicts: Sequence[Mapping[str, Any]] = ()
    """Events that led to this generation and that nobody has recorded yet."""
    members: Sequence[Mapping[str, Any]] = ()
    """Every rank's host and pid, by rank."""
    previous_end_s: float = 0.0
    """Monotonic time of this host at which the generation before ended; 0: there was none."""
    is_emergency: bool = False
    """Not to train: to save, with the others, what is left of the run, and to wait."""


class MessageSocket:
    """One end. Never blocks: what the other end does not take waits here, in order."""

    def __init__(self, endpoint: socket.socket) -> None:
        endpoint.setblocking(False)
        self._socket = endpoint
        self._is_stream = endpoint.type == socket.SOCK_STREAM
        self._buffer = bytearray()
        """Of a stream: what came and is no whole message yet."""
        self._outbox: deque[bytes] = deque()
        self.is_closed = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message, or keeps it until `flush`; nothing when the other end is gone."""
        packet = json.dumps(message).encode()
        self._outbox.append(LENGTH_PREFIX.pack(len(packet)) + packet if self._is_stream else packet)
        self.flush()

    def flush(self) -> None:
        """Sends what waits, as far as the other end takes it."""
        try:
            while self._outbox and not self.is_closed:
                sent_bytes = self._socket.send(self._outbox[0])
                packet = self._outbox.popleft()
                if sent_bytes < len(packet):  # a stream takes what it has room for
                    self._outbox.appendleft(packet[sent_bytes:])
        except BlockingIOError:
            return
        except OSError:
            self.is_closed = True

    def receive(self) -> list[dict[str, Any]]:
        """All messages that have come; `is_closed` is set when there will be no more."""
        messages = []
        while not self.is_closed:
            try:
                packet = self._socket.recv(MAX_PACKET_BYTES)
            except BlockingIOError:
                break
            except OSError:
                packet = b""
            if not packet:
                self.is_closed = True
            elif self._is_stream:
                self._buffer += packet
                messages += self._complete_messages()
            else:
                messages.append(json.loads(packet))
        return messages

    def _complete_messages(self) -> list[dict[str, Any]]:
        """The messages of a stream that have come whole."""
        messages, offset = [], 0
        while len(self._buffer) >= offset + LENGTH_PREFIX.size:
            start = offset + LENGTH_PREFIX.size
            stop = start + LENGTH_PREFIX.unpack_from(self._buffer, offset)[0]
            if len(self._buffer) < stop:
                break
            messages.append(json.loads(self._buffer[start:stop]))
            offset = stop
        del self._buffer[:offset]
        return messages

    def close(self) -> None:
        self.is_closed = True
        self._socket.close()


def make_socket_pair() -> tuple[MessageSocket, socket.socket]:
    """The supervisor's end, and the socket that a worker inherits."""
    supervisor_end, worker_end = packet_pair()
    return MessageSocket(supervisor_end), worker_end
