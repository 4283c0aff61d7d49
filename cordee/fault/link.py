"""Messages between the supervisors of hosts: authentic, in order per connection, never blocking.

Every process has an id, HOST:PORT#nonce, fresh each time, so that nothing meant for a process
reaches its successor. Messages may be lost (their receiver was away, a queue was full) and say
nothing about it: views and heartbeats (`members.py`) are made for that. Not here: what messages
mean. Traded away: secrecy; bodies are authentic but readable on the wire, data traffic too.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Mapping
from typing import Any

from cordee.errors import ConfigError
from cordee.fault import address
from cordee.fault.frames import EARLY_BYTES, pack
from cordee.fault.handshake import Refusal, differences, table
from cordee.fault.secret import SECRET_BYTES
from cordee.fault.switchboard import Switchboard

__all__ = ["Link", "Refusal", "differences", "table"]

_LAST_WORDS_S = 0.5


class Link:
    """This process's end of the traffic with all other supervisors. Made by `open`; used by one
    thread. `id` is how the others call this process."""

    def __init__(self, own_id: str, switchboard: Switchboard) -> None:
        self.id = own_id
        self._board = switchboard
        self._post = switchboard.post

    @classmethod
    def open(
        cls,
        bind: str,
        secret: bytes,
        hello: Mapping[str, Any],
        advertise: str = "",
        fault_of: Callable[[Any], str] = lambda message: "",
    ) -> Link:
        """Listens on `bind` (HOST:PORT, port 0: any free one) and lets in who knows the secret and
        has the same `hello` (keys that begin with "about." are told, not compared). Others dial
        `advertise` (default, and for its port 0: what is bound). Who sends a message that
        `fault_of` finds wrong loses that connection. ConfigError when that cannot be.
        """
        if len(secret) < SECRET_BYTES[0]:
            what = "the secret is too short"
            fix = f"at least {SECRET_BYTES[0]} random bytes"
            raise ConfigError(what, values={"bytes": len(secret)}, fix=fix)
        if len(pack(hello)) > EARLY_BYTES:
            raise ConfigError("the hello is too long", fix=f"at most {EARLY_BYTES} bytes of JSON")
        if advertise:
            address.split(advertise)
        listener = _listen(bind, bool(advertise))
        host, port = listener.getsockname()[:2]
        if advertise:
            named, given = address.split(advertise)
            shown = address.joined(named, given or port)
        else:
            shown = address.joined(host, port)
        own_id = f"{shown}#{secrets.token_hex(4)}"
        board = Switchboard(listener, own_id, secret, hello, fault_of)
        board.start()
        return cls(own_id, board)

    @staticmethod
    def check(bind: str) -> None:
        """ConfigError when `open` could not listen on `bind`; nothing listens there afterwards."""
        _listen(bind).close()

    def fileno(self) -> int:
        """Readable when `receive`, `lost` or `refused` has something."""
        return self._post.outward.read_end

    def receive(self) -> list[tuple[str, dict[str, Any]]]:
        """(sender's id, message) of all that has come, without waiting; RunError when the thread
        of the connections has failed."""
        return self._post.take_messages()

    def lost(self) -> list[str]:
        """Ids (or dialled addresses) where, since the last call, nobody listens any more: their
        process is gone. Silence is not in here."""
        return self._post.take_lost()

    def refused(self) -> list[Refusal]:
        """Peers that we refused or that refused us since the last call; each kind is told once."""
        return self._post.take_refused()

    def send(self, to: str, message: Mapping[str, Any]) -> None:
        """Sends to an id or a HOST:PORT, dialling when needed. Never waits; the oldest messages go
        when 64 MiB or 65,536 of them wait. ConfigError for what is no address, ValueError for
        what is too long (8 MiB), TypeError for what is no JSON."""
        address.split(to.rpartition("#")[0] or to)
        self._post.put(to, pack(message))

    def dismiss(self, peer: str, why: str) -> None:
        """Ends the connections with a peer, and tells of it (`refused`); it may dial again."""
        self._post.dismiss(peer, why)

    def local_ip(self, to: str) -> str | None:
        """Our IP address on the connection to a peer, None while there is none."""
        known = self._board.known.get(self._board.alias.get(to, to))
        return known[0] if known else None

    def hello(self, to: str) -> Mapping[str, Any] | None:
        """What a peer told of itself, None while there is no connection."""
        known = self._board.known.get(self._board.alias.get(to, to))
        return known[1] if known else None

    def counted(self) -> dict[str, int]:
        """How often something went wrong: refused, broken (frames), crowded out (connections),
        dropped (messages to send), unread (messages that were not received in time)."""
        return {name: number for name, number in self._post.counted.items() if number}

    def close(self) -> None:
        """Sends what can be sent within half a second, closes all connections."""
        if self._board.is_alive():
            self._board.stop(_LAST_WORDS_S)
            self._board.join()
        self._post.close()


def _listen(bind: str, advertised: bool = False) -> socket.socket:
    """A listening socket at an address that others can dial. ConfigError."""
    listener = address.listen(bind)
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::") and not advertised:
        listener.close()
        what = "others cannot dial this address"
        fix = f"bind or advertise {address.joined(address.own_ip(), port)}"
        raise ConfigError(what, values={"bind": bind}, fix=fix)
    return listener
