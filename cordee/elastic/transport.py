"""Messages between the supervisors of hosts: encrypted, authenticated, in order per connection,
never blocking. Every process has an id, HOST:PORT#nonce, fresh each time, so that nothing meant for
a process reaches its successor. Messages may be lost without a word (their receiver was away, a
queue was full): views and heartbeats (`membership.py`) are made for that.

ZeroMQ is imported when a transport is opened: a run on one host needs none.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cordee.elastic import address
from cordee.elastic.handshake import MAX_HELLO_BYTES, Refusal, pack
from cordee.elastic.secret import SECRET_BYTES
from cordee.errors import ConfigError

if TYPE_CHECKING:
    from cordee.elastic.connection_thread import ConnectionThread

__all__ = ["Refusal", "Transport"]

_FLUSH_TIMEOUT_S = 0.5


class Transport:
    """This process's end of the traffic with all other supervisors. Made by `open`; used by one
    thread. `id` is how the others call this process."""

    def __init__(self, own_id: str, connections: ConnectionThread) -> None:
        self.id = own_id
        self._connections = connections
        self._queues = connections.queues

    @classmethod
    def open(
        cls,
        bind_address: str,
        secret: bytes,
        hello: Mapping[str, Any],
        advertise_address: str = "",
        message_error: Callable[[Any], str] = lambda message: "",
    ) -> Transport:
        """Listens on `bind_address` (HOST:PORT, port 0: any free one) and lets in who knows the
        secret and says the same `hello` (keys that begin with "about." are not compared).
        Others dial `advertise_address` (default, and for its port 0: what is bound). Who sends a
        message that `message_error` finds wrong loses that connection. ConfigError when that cannot
        be.
        """
        if len(secret) < SECRET_BYTES[0]:
            problem = "the secret is too short"
            fix = f"at least {SECRET_BYTES[0]} random bytes"
            raise ConfigError(problem, values={"bytes": len(secret)}, fix=fix)
        if len(pack(hello)) > MAX_HELLO_BYTES:
            raise ConfigError(
                "the hello is too long", fix=f"at most {MAX_HELLO_BYTES} bytes of JSON"
            )
        if advertise_address:
            address.parse_address(advertise_address)
        cls.check_installed()
        from cordee.elastic.connection_thread import ConnectionThread

        listener = _open_listener(bind_address, bool(advertise_address))
        host, port = listener.getsockname()[:2]
        if advertise_address:
            advertised_host, advertised_port = address.parse_address(advertise_address)
            own_address = address.format_address(advertised_host, advertised_port or port)
        else:
            own_address = address.format_address(host, port)
        own_id = f"{own_address}#{secrets.token_hex(4)}"
        connections = ConnectionThread(listener, own_id, secret, hello, message_error)
        connections.start()
        return cls(own_id, connections)

    @staticmethod
    def check_installed() -> None:
        """ConfigError when ZeroMQ is not there."""
        if find_spec("zmq") is None:
            raise ConfigError(
                "runs on several hosts need the package pyzmq", fix="pip install pyzmq"
            )

    @staticmethod
    def check_bind(bind_address: str) -> None:
        """ConfigError when `open` could not listen on `bind_address`; nothing listens there
        afterwards."""
        _open_listener(bind_address).close()

    def fileno(self) -> int:
        """Readable when `receive`, `take_lost_peers` or `take_refusals` has something."""
        return self._queues.supervisor_wakeup.read_end

    def receive(self) -> list[tuple[str, dict[str, Any]]]:
        """(sender's id, message) of all that has come, without waiting; RunError when the thread
        of the connections has failed."""
        return self._queues.take(self._queues.inbox)

    def take_lost_peers(self) -> list[str]:
        """Ids (or dialled addresses) where, since the last call, nobody listens any more: their
        process is gone. Silence is not in here."""
        return list(dict.fromkeys(self._queues.take(self._queues.lost_peers)))

    def take_refusals(self) -> list[Refusal]:
        """Peers that we refused or that refused us since the last call; each kind is told once."""
        return self._queues.take(self._queues.refusals)

    def send(self, target: str, message: Mapping[str, Any]) -> None:
        """Sends to an id or a HOST:PORT, dialling when needed. Never waits; the oldest messages go
        when 64 MiB or 65,536 of them wait. ConfigError for what is no address, ValueError for
        what is too long (8 MiB), TypeError for what is no JSON."""
        address.parse_address(target.rpartition("#")[0] or target)
        self._queues.enqueue(target, pack(message))

    def disconnect(self, peer: str, reason: str) -> None:
        """Ends the connections with a peer, and tells of it (`take_refusals`); it may dial
        again."""
        self._queues.disconnect(peer, reason)

    def error_counts(self) -> dict[str, int]:
        """How often something went wrong: refused, broken (frames), crowded out (connections),
        dropped (messages to send), unread (messages that were not received in time)."""
        return {name: count for name, count in self._queues.counters.items() if count}

    def close(self) -> None:
        """Sends what can be sent within half a second, closes all connections."""
        if self._connections.is_alive():
            self._connections.stop(_FLUSH_TIMEOUT_S)
            self._connections.join()
        self._queues.close()


def _open_listener(bind_address: str, is_advertised: bool = False) -> socket.socket:
    """A listening socket at an address that others can dial. ConfigError."""
    listener = address.open_listener(bind_address)
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::") and not is_advertised:
        listener.close()
        problem = "others cannot dial this address"
        fix = f"bind or advertise {address.format_address(address.outbound_ip(), port)}"
        raise ConfigError(problem, values={"bind": bind_address}, fix=fix)
    return listener
