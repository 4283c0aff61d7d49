"""A connection, the wish for one, and the limits of both.

Not here: what happens to them (`switchboard.py`).
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass, field

from cordee.fault import address
from cordee.fault.handshake import Handshake
from cordee.fault.loop import READ

EARLY_S = 1.0
"""A connection that is not made, or that has not proven itself, after this time is dropped."""
HANDSHAKE_S = 2.0
"""A connection whose handshake is not over after this time is dropped."""
FRAME_S = 30.0
"""A frame whose end has not come after this time breaks its connection."""
UNANSWERED_MS = 3000
"""Sent bytes that the other machine does not acknowledge for so long end a connection: a new one
is there at once when the network is back, TCP's next try would take up to two minutes."""
AGAIN_S = 0.05
"""Least time between two dials of one address; ten times that after a refused handshake."""
CHUNK_BYTES = 256 << 10
MOST_EARLY = 64
"""Connections at a time that have not proven themselves; the oldest makes room for the next."""
MOST_WIRES = 2
"""Connections that are kept with one peer: one that each side dialled."""

GONE = (errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE)
"""Ends of a connection that somebody said, as opposed to silence."""


@dataclass(eq=False)
class Dial:
    """A wish for a connection to an id or address, and the places that are still to be tried."""

    to: str
    places: list[address.Place] = field(default_factory=list)
    resets: int = 0
    all_refused: bool = True

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self.to.rpartition("#")[0] or self.to


@dataclass(eq=False)
class Wire:
    """One connection: `dial` is None when the other side dialled; `there` is its IP address."""

    socket: socket.socket
    talk: Handshake
    there: str
    dial: Dial | None = None
    connected: bool = True
    ending: bool = False
    closed: bool = False
    out: bytearray = field(default_factory=bytearray)
    since_s: float = 0.0
    mask: int = READ
    timed: bool = False

    @property
    def who(self) -> str:
        """The id that was proven, else the address; an id that was only claimed is worth nothing,
        and there may be any number of them."""
        if self.talk.proven:
            return self.talk.peer
        return self.dial.to if self.dial is not None else self.there

    def check_connected(self) -> None:
        """OSError when the dial has failed."""
        number = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, "no connection")
        if self.socket.getsockname() == self.socket.getpeername():
            # Nobody listens on a port of this machine, and TCP has met itself there.
            raise OSError(errno.ECONNREFUSED, "it is this socket itself")
        self.connected = True


def look_up(place: str) -> tuple[list[address.Place], str]:
    """Where to dial HOST:PORT, or why that cannot be said."""
    try:
        return address.resolve(place), ""
    except OSError as cause:
        return [], f"{place} does not resolve: {cause.strerror or cause}"
