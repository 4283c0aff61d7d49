"""A connection, the wish for one, and the limits of both.

Not here: what happens to them (`switchboard.py`).
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass, field

from cordee.elastic import address
from cordee.elastic.event_loop import READ
from cordee.elastic.handshake import Handshake

AUTH_TIMEOUT_S = 1.0
"""A connection that is not made, or that has not proven itself, after this time is dropped."""
HANDSHAKE_TIMEOUT_S = 2.0
"""A connection whose handshake is not over after this time is dropped."""
FRAME_TIMEOUT_S = 30.0
"""A frame whose end has not come after this time breaks its connection."""
UNACKED_TIMEOUT_MS = 3000
"""Sent bytes that the other machine does not acknowledge for so long end a connection: a new one
is there at once when the network is back, TCP's next try would take up to two minutes."""
DIAL_INTERVAL_S = 0.05
"""Least time between two dials of one address; ten times that after a refused handshake."""
CHUNK_BYTES = 256 << 10
MAX_HANDSHAKES = 64
"""Connections at a time that have not proven themselves; the oldest makes room for the next."""
MAX_PEER_CONNECTIONS = 2
"""Connections that are kept with one peer: one that each side dialled."""

DISCONNECT_ERRORS = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE)
"""Ends of a connection that somebody said, as opposed to silence."""


@dataclass(eq=False)
class DialAttempt:
    """A wish for a connection to an id or address, and the places that are still to be tried."""

    target: str
    addresses: list[address.SocketAddress] = field(default_factory=list)
    reset_count: int = 0
    are_all_refused: bool = True

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self.target.rpartition("#")[0] or self.target


@dataclass(eq=False)
class Connection:
    """One connection: `dial` is None when the other side dialled; `peer_ip` is its IP address."""

    socket: socket.socket
    handshake: Handshake
    peer_ip: str
    dial: DialAttempt | None = None
    is_connected: bool = True
    is_ending: bool = False
    is_closed: bool = False
    send_buffer: bytearray = field(default_factory=bytearray)
    open_since_s: float = 0.0
    event_mask: int = READ
    has_frame_timer: bool = False

    @property
    def peer_name(self) -> str:
        """The id that was proven, else the address; an id that was only claimed is worth nothing,
        and there may be any number of them."""
        if self.handshake.is_authenticated:
            return self.handshake.peer_id
        return self.dial.target if self.dial is not None else self.peer_ip

    def check_connected(self) -> None:
        """OSError when the dial has failed."""
        error_number = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error_number:
            raise OSError(error_number, "no connection")
        if self.socket.getsockname() == self.socket.getpeername():
            # Nobody listens on a port of this machine, and TCP has met itself there.
            raise OSError(errno.ECONNREFUSED, "it is this socket itself")
        self.is_connected = True


def resolve_or_reason(host_port: str) -> tuple[list[address.SocketAddress], str]:
    """Where to dial HOST:PORT, or why that cannot be said."""
    try:
        return address.resolve(host_port), ""
    except OSError as cause:
        return [], f"{host_port} does not resolve: {cause.strerror or cause}"
