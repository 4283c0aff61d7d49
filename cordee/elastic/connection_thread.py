"""The thread that holds the connections of a link: accepts, dials, reads, writes, times out.

A peer is *lost* only when its address answers a new dial with a refusal: a connection that was
merely reset is dialled again, and silence proves nothing (heartbeats judge it). Not here: what
frames mean (`frames.py`), who may talk (`handshake.py`). Traded away: one thread, one select; a
supervisor talks to hundreds of hosts, not to hundreds of thousands.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from cordee.elastic import address
from cordee.elastic.event_loop import READ, WRITE, EventLoop
from cordee.elastic.frames import FrameError, unpack
from cordee.elastic.handshake import Handshake, Refusal, RefusalError
from cordee.elastic.peer_queues import PeerQueues
from cordee.elastic.tcp import (
    AUTH_TIMEOUT_S,
    CHUNK_BYTES,
    DIAL_INTERVAL_S,
    DISCONNECT_ERRORS,
    FRAME_TIMEOUT_S,
    HANDSHAKE_TIMEOUT_S,
    MAX_HANDSHAKES,
    MAX_PEER_CONNECTIONS,
    UNACKED_TIMEOUT_MS,
    Connection,
    DialAttempt,
    resolve_or_reason,
)
from cordee.hardware.system import set_tcp_user_timeout


class ConnectionThread(threading.Thread):
    """See the file's header. Owns its sockets; what it shares with others is `queues`, and
    `peer_info`: id -> our IP address on the connection to it, and its hello."""

    def __init__(
        self,
        listener: socket.socket,
        own_id: str,
        secret: bytes,
        hello: Mapping[str, Any],
        message_error: Callable[[Any], str],
    ) -> None:
        """`fault_of(message)`: why its sender's connection is closed; "" for a good one."""
        super().__init__(name="cordee-link", daemon=True)
        self._message_error = message_error
        self.queues = PeerQueues()
        self.peer_info: dict[str, tuple[str, Mapping[str, Any]]] = {}
        self.aliases: dict[str, str] = {}
        self._listener, self._own_id = listener, own_id
        self._secret, self._hello = secret, dict(hello)
        self._event_loop = EventLoop()
        self._connections: dict[str, list[Connection]] = {}
        self._handshaking: dict[Connection, None] = {}
        self._dials: dict[str, DialAttempt] = {}
        self._next_dial_s: dict[str, float] = {}
        self._resolutions: deque[tuple[DialAttempt, list[address.SocketAddress], str]] = deque()
        self._stop_deadline_s: float | None = None

    def run(self) -> None:
        """Carries traffic until `stop_run`."""
        try:
            self._event_loop.register(self._listener, READ, self._accept)
            self._event_loop.register(self.queues.network_wakeup.read_end, READ, self._on_wakeup)
            while not self._is_drained():
                self._event_loop.run_once(None if self._stop_deadline_s is None else 0.01)
        except Exception as cause:  # a fault of ours: the supervisor must hear of it
            self.queues.report_failure(cause)
        finally:
            self._listener.close()
            self._event_loop.close()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread as soon as all is sent, or after that time."""
        self._stop_deadline_s = time.monotonic() + timeout_s
        self.queues.wake_network()

    def _is_drained(self) -> bool:
        if self._stop_deadline_s is None:
            return False
        self._on_wakeup()
        has_unsent = any(
            connection.send_buffer
            for connections in self._connections.values()
            for connection in connections
        )
        return not has_unsent or time.monotonic() > self._stop_deadline_s

    # ---- what was put for others ----

    def _on_wakeup(self, _: int = 0) -> None:
        while self._resolutions:
            self._on_resolved(*self._resolutions.popleft())
        for peer, reason in self.queues.take_disconnects():
            for connection in list(self._connections.get(peer, ())):
                self._refuse(connection, RefusalError(reason))
        for target in self.queues.take_new_targets():
            self._send_pending(target)

    def _send_pending(self, target: str) -> None:
        """Sends what waits for a peer, or sees to it that there is a connection."""
        if not self.queues.has_outgoing(target):
            return
        if target in (self._own_id, self._own_id.rpartition("#")[0]):
            self.queues.drop_outgoing(target)
            return
        connection = self._connection_to(target)
        if connection is None:
            self._dial(target)
        elif self._fill_buffer(connection, target):
            self._flush(connection)

    def _connection_to(self, target: str) -> Connection | None:
        """The connection on which messages for an id or address go."""
        connections = self._connections.get(self.aliases.get(target, target))
        return connections[0] if connections else None

    def _fill_buffer(self, connection: Connection, target: str) -> bool:
        free_bytes = CHUNK_BYTES - len(connection.send_buffer)
        if free_bytes <= 0:
            return False
        for body in self.queues.take_bodies(target, free_bytes):
            connection.send_buffer += connection.handshake.encoder.encode(body)
        return True

    def _refill_buffer(self, connection: Connection) -> bool:
        peer_id = connection.handshake.peer_id
        if (
            not connection.handshake.is_complete
            or connection.is_ending
            or self._connection_to(peer_id) is not connection
        ):
            return False
        for target in (
            peer_id,
            *(name for name, owner in self.aliases.items() if owner == peer_id),
        ):
            self._fill_buffer(connection, target)
        return bool(connection.send_buffer)

    def _flush(self, connection: Connection) -> None:
        """Writes what the socket takes, and refills as long as it takes all."""
        while (
            not connection.is_closed
            and connection.is_connected
            and (connection.send_buffer or self._refill_buffer(connection))
        ):
            try:
                sent_bytes = connection.socket.send(
                    memoryview(connection.send_buffer)[:CHUNK_BYTES]
                )
            except BlockingIOError:
                break
            except OSError as cause:
                self._on_connection_end(connection, cause)
                return
            del connection.send_buffer[:sent_bytes]
        if connection.is_ending and not connection.send_buffer:
            self._close(connection)
        mask = READ | (WRITE if connection.send_buffer or not connection.is_connected else 0)
        if not connection.is_closed and connection.event_mask != mask:
            connection.event_mask = mask
            self._event_loop.modify(
                connection.socket, mask, partial(self._on_socket_event, connection)
            )

    # ---- a connection's life ----

    def _accept(self, _: int = 0) -> None:
        try:
            new_socket, sockaddr = self._listener.accept()
            connection = self._add_connection(new_socket, address.sockaddr_ip(sockaddr), None)
        except OSError as cause:
            if cause.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                # Nothing to accept with: look again a little later instead of spinning.
                self._event_loop.unregister(self._listener)
                resume_accepting = partial(
                    self._event_loop.register, self._listener, READ, self._accept
                )
                self._event_loop.call_later(0.1, resume_accepting)
            return
        while len(self._handshaking) > MAX_HANDSHAKES:  # the oldest has had more time than it needs
            self.queues.counters["crowded out"] += 1
            self._close(next(iter(self._handshaking)))
        connection.send_buffer += connection.handshake.first_bytes()
        self._flush(connection)

    def _add_connection(
        self, new_socket: socket.socket, peer_ip: str, dial: DialAttempt | None
    ) -> Connection:
        new_socket.setblocking(False)
        new_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_tcp_user_timeout(new_socket, UNACKED_TIMEOUT_MS)
        handshake = Handshake(self._secret, self._own_id, self._hello, is_dialler=dial is not None)
        connection = Connection(new_socket, handshake, peer_ip, dial, is_connected=dial is None)
        connection.event_mask = READ if connection.is_connected else READ | WRITE
        self._event_loop.register(
            new_socket, connection.event_mask, partial(self._on_socket_event, connection)
        )
        if dial is None:
            self._handshaking[connection] = None
        self._event_loop.call_later(
            AUTH_TIMEOUT_S, partial(self._on_handshake_timeout, connection, False)
        )
        self._event_loop.call_later(
            HANDSHAKE_TIMEOUT_S, partial(self._on_handshake_timeout, connection, True)
        )
        return connection

    def _on_handshake_timeout(self, connection: Connection, is_final: bool) -> None:
        """Ends a handshake that takes too long: `is_final`, or in its first part."""
        handshake = connection.handshake
        is_late = (
            not handshake.is_complete
            if is_final or connection.is_ending
            else not (handshake.is_authenticated or connection.dial)
        )
        if connection.is_closed or not (is_late or not connection.is_connected):
            return
        if connection.dial is not None and not connection.is_ending:
            self._on_connection_end(connection, TimeoutError(errno.ETIMEDOUT, "no answer"))
        elif connection.is_ending:
            self._close(connection)
        else:
            self._refuse(
                connection, RefusalError(f"it did not prove who it is within {AUTH_TIMEOUT_S:g} s")
            )

    def _on_socket_event(self, connection: Connection, mask: int) -> None:
        if connection.is_closed:  # by an event of the same round
            return
        try:
            if not connection.is_connected:
                connection.check_connected()
            if mask & READ:
                self._read(connection)
            if mask & WRITE and not connection.is_closed:
                self._flush(connection)
        except BlockingIOError:
            return
        except (FrameError, RecursionError) as cause:
            self.queues.counters["broken"] += 1
            self._refuse(connection, RefusalError(str(cause)))
        except RefusalError as cause:
            self._refuse(connection, cause)
        except OSError as cause:
            self._on_connection_end(connection, cause)

    def _read(self, connection: Connection) -> None:
        data = connection.socket.recv(CHUNK_BYTES)
        if not data:
            self._on_connection_end(connection, None)
        if not data or connection.is_ending:
            return
        handshake, messages = connection.handshake, list[tuple[dict[str, Any], int]]()
        handshake.decoder.feed(data)
        try:
            while not connection.is_closed and (body := handshake.decoder.next_body()) is not None:
                if handshake.is_complete:
                    message = unpack(body)
                    if problem := self._message_error(message):
                        raise RefusalError(f"it sent {problem}")
                    messages.append((message, len(body)))
                    continue
                connection.send_buffer += handshake.receive(body)
                if handshake.is_authenticated:
                    self._handshaking.pop(connection, None)
                if handshake.is_complete:
                    self._on_handshake_done(connection)
        finally:
            if messages:
                self.queues.deliver(handshake.peer_id, messages)
        if handshake.decoder.has_partial_frame and not connection.has_frame_timer:
            connection.has_frame_timer = True
            self._event_loop.call_later(
                FRAME_TIMEOUT_S,
                partial(self._on_frame_timeout, connection, handshake.decoder.frame_count),
            )
        if connection.send_buffer:
            self._flush(connection)

    def _on_frame_timeout(self, connection: Connection, frame_count: int) -> None:
        connection.has_frame_timer = False
        decoder = connection.handshake.decoder
        if connection.is_closed or not decoder.has_partial_frame:
            return
        if decoder.frame_count == frame_count:
            self.queues.counters["broken"] += 1
            self._refuse(connection, RefusalError("a frame whose end never came"))
        else:
            connection.has_frame_timer = True
            self._event_loop.call_later(
                FRAME_TIMEOUT_S, partial(self._on_frame_timeout, connection, decoder.frame_count)
            )

    def _on_handshake_done(self, connection: Connection) -> None:
        """The handshake is over; closes the wire when it is not the process that was dialled."""
        peer_id, dial = connection.handshake.peer_id, connection.dial
        connection.open_since_s = time.monotonic()
        if dial is not None:
            self._dials.pop(dial.target, None)
            if "#" not in dial.target:
                self.aliases[dial.target] = peer_id
            elif (
                dial.target != peer_id
            ):  # another process has taken its address: the old one is gone
                self._close(connection)
                self._report_lost(dial.target)
                return
        connections = self._connections.setdefault(peer_id, [])
        # Who dials though there is a connection has given that one up, unless both dialled at once.
        is_simultaneous = (
            connections and connection.open_since_s - connections[0].open_since_s < AUTH_TIMEOUT_S
        )
        connections.insert(1 if is_simultaneous else 0, connection)
        self.peer_info[peer_id] = (
            address.sockaddr_ip(connection.socket.getsockname()),
            connection.handshake.peer_hello,
        )
        for surplus_connection in connections[MAX_PEER_CONNECTIONS:]:
            self._close(surplus_connection)
        self._refill_buffer(connection)

    def _refuse(self, connection: Connection, refusal: RefusalError) -> None:
        """Notes why a connection ends, tells the other side if there is something to tell."""
        self.queues.report_refusal(
            Refusal(connection.peer_name, refusal.reason, refusal.differences)
        )
        dial = connection.dial
        if connection.handshake.is_complete:
            connection.send_buffer.clear()
        elif dial is not None and self._dials.get(dial.target) is dial:
            del self._dials[dial.target]
            self._next_dial_s[dial.target] = time.monotonic() + 10 * DIAL_INTERVAL_S
            self.queues.drop_outgoing(dial.target)
        connection.send_buffer += refusal.final_bytes
        connection.is_ending = True
        self._event_loop.call_later(AUTH_TIMEOUT_S, partial(self._close, connection))
        self._flush(connection)

    def _on_connection_end(self, connection: Connection, cause: OSError | None) -> None:
        """A connection ended by itself; `cause` None is an orderly end by the other side."""
        self._close(connection)
        is_explicit = cause is None or cause.errno in DISCONNECT_ERRORS
        dial = connection.dial
        if connection.handshake.is_complete:
            # Is the process gone? A new dial will tell.
            if (
                is_explicit
                and not connection.is_ending
                and self._connection_to(connection.handshake.peer_id) is None
            ):
                self._dial(connection.handshake.peer_id)
        elif dial is None or self._dials.get(dial.target) is not dial:
            return
        elif connection.is_connected and is_explicit:
            self._retry_dial(dial)
        else:
            dial.are_all_refused &= cause is not None and cause.errno == errno.ECONNREFUSED
            self._try_next_address(dial)

    def _close(self, connection: Connection) -> None:
        if connection.is_closed:
            return
        connection.is_closed = True
        self._handshaking.pop(connection, None)
        self._event_loop.unregister(connection.socket)
        connection.socket.close()
        peer_id = connection.handshake.peer_id
        connections = self._connections.get(peer_id, [])
        if connection not in connections:
            return
        connections.remove(connection)
        if connections:
            self._flush(connections[0])
            return
        del self._connections[peer_id]
        self.peer_info.pop(peer_id, None)
        for name in [name for name, owner in self.aliases.items() if owner == peer_id]:
            del self.aliases[name]

    # ---- dialling ----

    def _dial(self, target: str) -> None:
        if target in self._dials:
            return
        self._dials[target] = dial = DialAttempt(target)
        now = time.monotonic()
        dial_time_s = max(now, self._next_dial_s.get(target, now))
        if len(self._next_dial_s) > 4096:
            self._next_dial_s = {k: v for k, v in self._next_dial_s.items() if v > now}
        self._next_dial_s[target] = dial_time_s + DIAL_INTERVAL_S
        if dial_time_s > now:
            self._event_loop.call_later(dial_time_s - now, partial(self._start_dial, dial))
        else:
            self._start_dial(dial)

    def _start_dial(self, dial: DialAttempt) -> None:
        if self._dials.get(dial.target) is not dial:
            return
        if address.is_ip_literal(address.parse_address(dial.address)[0]):
            self._on_resolved(dial, *resolve_or_reason(dial.address))
        else:  # a name server may take its time
            thread = threading.Thread(target=self._resolve_in_thread, args=(dial,), daemon=True)
            thread.start()

    def _resolve_in_thread(self, dial: DialAttempt) -> None:
        """In a thread of its own."""
        self._resolutions.append((dial, *resolve_or_reason(dial.address)))
        self.queues.wake_network()

    def _on_resolved(
        self, dial: DialAttempt, addresses: list[address.SocketAddress], reason: str
    ) -> None:
        if reason:
            self.queues.report_refusal(Refusal(dial.target, reason))
        dial.addresses, dial.are_all_refused = addresses, bool(addresses)
        self._try_next_address(dial)

    def _try_next_address(self, dial: DialAttempt) -> None:
        """Dials the next place; when there is none left the peer is lost, or merely silent."""
        if not dial.addresses:
            self._dials.pop(dial.target, None)
            if dial.are_all_refused:
                self._report_lost(dial.target)
            else:
                self.queues.drop_outgoing(dial.target)
            return
        family, sockaddr = dial.addresses.pop(0)
        try:
            new_socket = socket.socket(family, socket.SOCK_STREAM)
        except OSError as cause:  # no descriptors left, or no IPv6 here
            self.queues.report_refusal(Refusal(dial.target, f"cannot be dialled: {cause.strerror}"))
            dial.are_all_refused = False
            self._try_next_address(dial)
            return
        connection = self._add_connection(new_socket, address.sockaddr_ip(sockaddr), dial)
        error_number = connection.socket.connect_ex(sockaddr)
        if error_number not in (0, errno.EINPROGRESS):
            self._on_connection_end(connection, OSError(error_number, "no connection"))

    def _retry_dial(self, dial: DialAttempt) -> None:
        """A listener that hangs up at once is closing down, or crowded: see a little later."""
        dial.reset_count += 1
        if dial.reset_count > 3:
            self._dials.pop(dial.target, None)
            self.queues.drop_outgoing(dial.target)
            return
        self._event_loop.call_later(0.02 * dial.reset_count, partial(self._start_dial, dial))

    def _report_lost(self, target: str) -> None:
        if self._connection_to(target) is None:
            self.queues.drop_outgoing(target)
            self.queues.report_lost(target)
