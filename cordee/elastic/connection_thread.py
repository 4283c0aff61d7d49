"""The thread that holds the connections between supervisors: one ZeroMQ socket that accepts, dials,
encrypts and authenticates (CURVE), and what ZeroMQ leaves open: who is there, and who is gone.

Both key pairs, of who accepts and of who dials, are derived from the run's secret, so that whoever
completes a handshake knows it. A peer is *lost* only when its address refuses a new connection: one
that was merely reset is dialled again, and silence proves nothing (heartbeats judge it).
"""

from __future__ import annotations

import errno
import hmac
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from cordee.elastic.address import format_address, listening_endpoint
from cordee.elastic.handshake import (
    MAX_BODY_BYTES,
    MAX_HELLO_BYTES,
    FrameError,
    Refusal,
    RefusalError,
    check_hello,
    pack_hello,
    unpack,
)
from cordee.elastic.peer_queues import PeerQueues

HELLO_TIMEOUT_S = 2.5
"""A connection on which nobody has said who he is after this time is dropped."""
UNACKED_TIMEOUT_MS = 3000
"""Sent bytes that the other machine does not acknowledge for so long end a connection: a new one is
there at once when the network is back, TCP's next try would take up to two minutes."""
PING_INTERVAL_S, SILENCE_TIMEOUT_S = 1.0, 4.0
"""An empty line goes over each connection so often; one over which nothing comes for so long ends.
ZeroMQ's own pings end the process (4.3.5: "Assertion failed: !_io_error") when one is due on a
connection that broke while its queue was full."""
DIAL_INTERVAL_S = 0.05
"""Least time between two dials of one address; ten times that after a refusal."""
MAX_ENDS, MAX_RETRIES = 4, 8
"""After so many streams that were ended, or ended or reset, in its handshakes a dial has failed."""
CHUNK_BYTES = 64 << 10
"""Of the stream of lines in one ZeroMQ message. ZeroMQ bounds its queues by the number of messages,
so this, times CHUNKS, bounds their bytes; a stranger can make it hold no more either."""
CHUNKS = 16
MAX_STRANGERS = 256
"""Connections at a time on which nobody has said who he is; the oldest makes room for the next."""
MAX_PEER_CONNECTIONS = 2
"""Connections that are kept with one peer: one that each side dialled."""
RECONNECT_NEVER_MS = 10**9
"""Whether and when to dial again is decided here."""

STRANGER = "a stranger"
"""Who was gone before it could be asked for its address."""
NO_PROOF = "the secret differs: it does not know ours; or it is no cordee of this version"
WE_ARE_REFUSED = "it refused us, the secret differs: give this host the same secret file"
UNREACHABLE_ERRORS = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)

# Not HANDSHAKE_FAILED_PROTOCOL: telling of a forged frame makes ZeroMQ (4.3.5) forget to hang up.
MONITOR_EVENTS = (
    zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)  # fmt: skip


@dataclass(eq=False)
class Dial:
    """A wish for a connection to HOST:PORT, for the messages to `targets` (ids, or the address)."""

    address: str
    due_s: float
    targets: dict[str, None] = field(default_factory=dict)
    is_started: bool = False
    end_count: int = 0
    retry_count: int = 0


@dataclass(eq=False)
class Connection:
    """One connection. `dial` and `endpoint` are of one that we dialled; `names` are the targets
    whose messages go over it once it is open, the first is the peer's id."""

    start_s: float
    descriptor: int = -1
    routing_id: bytes = b""
    peer_ip: str = ""
    dial: Dial | None = None
    endpoint: str = ""
    names: dict[str, None] = field(default_factory=dict)
    open_since_s: float = 0.0
    last_heard_s: float = 0.0
    is_ending: bool = False
    hangup_error: int = 0
    send_buffer: bytearray = field(default_factory=bytearray)
    receive_buffer: bytearray = field(default_factory=bytearray)

    @property
    def peer_id(self) -> str:
        """The peer's id; empty until it has said who it is."""
        return next(iter(self.names), "")


class ConnectionThread(threading.Thread):
    """See the file's header. Owns its sockets; what it shares with others is `queues`."""

    def __init__(
        self,
        listener: socket.socket,
        own_id: str,
        secret: bytes,
        hello: Mapping[str, Any],
        message_error: Callable[[Any], str],
    ) -> None:
        """Takes over `listener`. `message_error(message)`: why its sender's connection is closed;
        "" for a good one."""
        super().__init__(name="cordee-link", daemon=True)
        self._message_error = message_error
        self.queues = PeerQueues()
        self._own_id, self._hello = own_id, dict(hello)
        self._acceptor_keys, self._dialler_keys = (
            curve_keys(secret, role) for role in ("acceptor", "dialler")
        )
        self._open_sockets(listener)
        self._by_descriptor: dict[int, Connection] = {}
        self._by_routing_id: dict[bytes, Connection] = {}
        self._by_endpoint: dict[str, Connection] = {}
        self._routes: dict[str, list[Connection]] = {}
        self._strangers: dict[Connection, None] = {}
        self._blocked: dict[Connection, None] = {}
        self._disconnected: list[Connection] = []
        self._hangup_error = 0
        self._dials: dict[str, Dial] = {}
        self._next_dial_s: dict[str, float] = {}
        self._dial_results: list[tuple[Dial, tuple[str, int] | OSError]] = []
        self._next_ping_s = 0.0
        self._stop_deadline_s: float | None = None

    def _open_sockets(self, listener: socket.socket) -> None:
        self._context = zmq.Context()
        # Whoever has the acceptor's public key may knock; this lets in the dialler's key alone.
        self._authenticator = self._context.socket(zmq.REP)
        self._authenticator.bind("inproc://zeromq.zap.01")
        self._router = router = self._context.socket(zmq.ROUTER)
        self._monitor = self._context.socket(zmq.PAIR)
        options = {
            zmq.ROUTER_MANDATORY: 1, zmq.LINGER: 0, zmq.ZAP_ENFORCE_DOMAIN: 1,
            zmq.RECONNECT_IVL: RECONNECT_NEVER_MS, zmq.SNDHWM: CHUNKS, zmq.RCVHWM: CHUNKS,
            zmq.MAXMSGSIZE: CHUNK_BYTES + 64, zmq.TCP_MAXRT: UNACKED_TIMEOUT_MS,
            zmq.HANDSHAKE_IVL: int(HELLO_TIMEOUT_S * 2000),
            zmq.CONNECT_TIMEOUT: int(HELLO_TIMEOUT_S * 1000),
        }  # fmt: skip
        for option, value in options.items():
            router.setsockopt(option, value)
        router.setsockopt(zmq.ZAP_DOMAIN, b"cordee")
        router.monitor("inproc://monitor", MONITOR_EVENTS)
        self._monitor.connect("inproc://monitor")
        router.curve_publickey, router.curve_secretkey = self._acceptor_keys
        router.curve_server = True
        host, self._port = listener.getsockname()[:2]
        router.ipv6 = ":" in host
        router.setsockopt(zmq.USE_FD, listener.detach())
        router.bind(f"tcp://{format_address(host, self._port)}")
        router.setsockopt(zmq.USE_FD, -1)
        # From here on the options are those of connections that this side dials.
        router.curve_server = False
        router.curve_publickey, router.curve_secretkey = self._dialler_keys
        router.curve_serverkey = self._acceptor_keys[0]
        self._poller = zmq.Poller()
        wakeup = self.queues.network_wakeup.read_end
        for source in (router, self._monitor, self._authenticator, wakeup):
            self._poller.register(source, zmq.POLLIN)

    def run(self) -> None:
        """Carries traffic until `stop`."""
        try:
            while not self._is_drained():
                self._poller.poll(self._poll_timeout_ms())
                self._run_once()
        except Exception as cause:  # a fault of ours: the supervisor must hear of it
            self.queues.report_failure(cause)
        finally:
            for connection in list(self._strangers):
                self._close(connection)
            self._router.disable_monitor()
            remaining_s = (self._stop_deadline_s or 0.0) - time.monotonic()
            self._router.close(linger=max(0, int(1000 * remaining_s)))
            self._context.destroy(linger=0)

    def stop(self, timeout_s: float) -> None:
        """Ends the thread as soon as all is sent, or after that time."""
        self._stop_deadline_s = time.monotonic() + timeout_s
        self.queues.wake_network()

    def _is_drained(self) -> bool:
        if self._stop_deadline_s is None:
            return False
        self._run_once()
        return not self._blocked or time.monotonic() > self._stop_deadline_s

    def _poll_timeout_ms(self) -> int | None:
        now = time.monotonic()
        due_times_s = [dial.due_s for dial in self._dials.values() if not dial.is_started]
        if self._strangers:
            due_times_s.append(next(iter(self._strangers)).start_s + HELLO_TIMEOUT_S)
        if self._routes:
            due_times_s.append(self._next_ping_s)
        if self._disconnected:
            due_times_s.append(now)
        if self._blocked:  # ZeroMQ does not say which of a socket's peers can be written to again
            due_times_s.append(now + 0.005)
        return max(0, int(1000 * (min(due_times_s) - now)) + 1) if due_times_s else None

    def _run_once(self) -> None:
        # What a peer sent before it hung up is in the socket when the monitor tells that it did; so
        # the ends of connections wait until the socket was read once more.
        disconnected, self._disconnected = self._disconnected, []
        messages = self._receive()
        while self._monitor.poll(0):
            self._on_event(parse_monitor_message(self._monitor.recv_multipart()))
        for routing_id, descriptor, chunk in messages:
            self._on_chunk(routing_id, descriptor, chunk)
        for connection in disconnected:
            self._on_connection_end(connection)
        while self._authenticator.poll(0):
            self._authenticate()
        self._take_requests()
        now = time.monotonic()
        for connection in list(self._strangers):
            if connection.start_s < now - HELLO_TIMEOUT_S:
                self._on_hello_timeout(connection)
        for dial in list(self._dials.values()):
            if not dial.is_started and dial.due_s <= now:
                dial.is_started = True
                threading.Thread(target=self._probe, args=(dial,), daemon=True).start()
        if now >= self._next_ping_s:
            self._next_ping_s = now + PING_INTERVAL_S
            self._ping(now)
        blocked, self._blocked = self._blocked, {}
        for connection in blocked:
            self._flush(connection)

    def _authenticate(self) -> None:
        """Answers ZeroMQ's question whether a key may connect (protocol ZAP, rfc.zeromq.org/27)."""
        version, request, _, _, _, mechanism, *credentials = self._authenticator.recv_multipart()
        key = z85.decode(self._dialler_keys[0])
        is_welcome = mechanism == b"CURVE" and hmac.compare_digest(b"".join(credentials), key)
        status = b"200" if is_welcome else b"400"
        self._authenticator.send_multipart([version, request, status, b"", b"", b""])

    # ---- what was put for others ----

    def _take_requests(self) -> None:
        targets, disconnects = self.queues.take_requests()
        while self._dial_results:
            self._on_dial_result(*self._dial_results.pop(0))
        for peer, reason in disconnects.items():
            for connection in list(self._routes.get(peer, ())):
                self._refuse(connection, RefusalError(reason))
        for target in targets:
            if target in (self._own_id, self._own_id.rpartition("#")[0]):
                self.queues.drop_outgoing(target)
            elif target in self._routes:
                self._flush(self._routes[target][0])
            elif self.queues.has_outgoing(target):
                self._dial(target)

    def _flush(self, connection: Connection) -> None:
        """Hands ZeroMQ what it takes of what waits for a peer."""
        while not connection.is_ending and connection.routing_id:
            for name in connection.names:
                free_bytes = CHUNK_BYTES - len(connection.send_buffer)
                if free_bytes > 0 and self._routes[name][0] is connection:
                    for body in self.queues.take_bodies(name, free_bytes):
                        connection.send_buffer += body + b"\n"
            if not connection.send_buffer:
                return
            chunk = bytes(memoryview(connection.send_buffer)[:CHUNK_BYTES])
            try:
                self._router.send_multipart([connection.routing_id, chunk], zmq.NOBLOCK)
            except zmq.Again:
                self._blocked[connection] = None
                return
            except zmq.ZMQError:  # it has ended, which the monitor tells next
                return
            del connection.send_buffer[: len(chunk)]

    def _ping(self, now: float) -> None:
        """Finds what no event tells of: silence, and a reader that waits for the end of a frame
        whose length was changed on the way."""
        for connection in {c: None for connections in self._routes.values() for c in connections}:
            if now - connection.last_heard_s > SILENCE_TIMEOUT_S:
                self._shut(connection)
                self._on_connection_end(connection)
            elif not connection.send_buffer:
                connection.send_buffer += b"\n"
                self._flush(connection)

    # ---- what comes ----

    def _receive(self) -> list[tuple[bytes, int, bytes]]:
        """(routing id, descriptor, bytes) of what has come, in order for each connection."""
        chunks = []
        with suppress(zmq.Again):
            for _ in range(1024):
                routing_id, *frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
                descriptor = int(frames[0].get(zmq.SRCFD))
                chunk = b"".join(frame.bytes for frame in frames)
                chunks.append((routing_id.bytes, descriptor, chunk))
        return chunks

    def _on_chunk(self, routing_id: bytes, descriptor: int, chunk: bytes) -> None:
        connection = self._by_routing_id.get(routing_id)
        if connection is None:  # the first chunk of an accepted one, which may have ended by now
            for candidate in (*self._disconnected, self._by_descriptor.get(descriptor)):
                if candidate and candidate.descriptor == descriptor and not candidate.routing_id:
                    connection = candidate
                    break
            else:
                return
            connection.routing_id = routing_id
            self._by_routing_id[routing_id] = connection
        if connection.is_ending:
            return
        connection.last_heard_s = time.monotonic()
        *lines, rest = chunk.split(b"\n")
        try:
            for line in lines:
                self._on_line(connection, bytes(connection.receive_buffer + line))
                connection.receive_buffer.clear()
                if connection.is_ending:
                    return
            connection.receive_buffer += rest
            self._check_length(connection, len(connection.receive_buffer))
        except RefusalError as cause:
            self.queues.counters["broken"] += isinstance(cause, FrameError)
            self._refuse(connection, cause)

    def _check_length(self, connection: Connection, length: int) -> None:
        limit = MAX_BODY_BYTES if connection.peer_id else MAX_HELLO_BYTES + 1024
        if length > limit:
            raise FrameError(f"a frame that is too long (over {limit} bytes)")

    def _on_line(self, connection: Connection, line: bytes) -> None:
        self._check_length(connection, len(line))
        if connection.peer_id:
            if line:  # else a ping
                message = unpack(line)
                if problem := self._message_error(message):
                    raise RefusalError(f"it sent {problem}")
                self.queues.deliver(connection.peer_id, message, len(line))
            return
        if connection.dial is None:  # whatever we think of it, it is to think the same of us
            connection.send_buffer += pack_hello(self._own_id, self._hello) + b"\n"
            self._flush(connection)
        self._on_hello(connection, check_hello(line, self._own_id, self._hello))

    def _on_hello(self, connection: Connection, peer_id: str) -> None:
        """The connection is open."""
        del self._strangers[connection]
        connection.open_since_s = time.monotonic()
        connection.names[peer_id] = None
        connections = self._routes.setdefault(peer_id, [])
        # Who dials though there is a connection has given that one up, unless both dialled at once.
        is_simultaneous = connections and connection.open_since_s - connections[0].open_since_s < 1
        connections.insert(1 if is_simultaneous else 0, connection)
        for surplus_connection in connections[MAX_PEER_CONNECTIONS:]:
            self._close(surplus_connection)
        if connection.dial is not None:
            self._dials.pop(connection.dial.address, None)
            self._serve_targets(connection, connection.dial)
        self._flush(connection)

    def _serve_targets(self, connection: Connection, dial: Dial) -> None:
        """Sends for a dial's targets over a connection to where it leads."""
        for target in dial.targets:
            if "#" not in target:
                connection.names[target] = None
                self._routes.setdefault(target, []).insert(0, connection)
            elif target != connection.peer_id:  # another process has its address: it is gone
                self._report_lost(target)
        self._flush(connection)

    # ---- a connection's life ----

    def _on_event(self, event: Any) -> None:
        kind, value, endpoint = event["event"], event["value"], event["endpoint"].decode()
        hangup_error, self._hangup_error = self._hangup_error, 0
        if kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:  # the next event says on which connection
            self._hangup_error = value
        elif kind == zmq.EVENT_ACCEPTED:
            connection = Connection(time.monotonic(), value, peer_ip=self._peer_ip(value))
            self._by_descriptor[value] = connection
            self._strangers[connection] = None
            if len(self._strangers) > MAX_STRANGERS:
                self.queues.counters["crowded out"] += 1
                self._close(next(c for c in self._strangers if c.dial is None))
        elif kind == zmq.EVENT_CONNECTED and endpoint in self._by_endpoint:
            self._by_descriptor[value] = self._by_endpoint[endpoint]
            self._by_endpoint[endpoint].descriptor = value
        elif kind == zmq.EVENT_DISCONNECTED and value in self._by_descriptor:
            connection = self._by_descriptor.pop(value)
            connection.hangup_error = hangup_error
            self._disconnected.append(connection)
        elif kind == zmq.EVENT_CLOSED and endpoint in self._by_endpoint:
            connection = self._by_endpoint[endpoint]
            connection.hangup_error = errno.ECONNRESET
            self._disconnected.append(connection)

    def _on_hello_timeout(self, connection: Connection) -> None:
        if connection.dial is not None:
            self._give_up(connection.dial)
        elif not connection.is_ending:
            reason = f"it did not prove who it is within {HELLO_TIMEOUT_S:g} s"
            self.queues.report_refusal(Refusal(connection.peer_ip, reason))
        self._close(connection)

    def _on_connection_end(self, connection: Connection) -> None:
        """A connection ended by itself."""
        was_ending, dial = connection.is_ending, connection.dial
        self._forget(connection)
        if was_ending:
            return
        if peer_id := connection.peer_id:
            self.queues.counters["broken"] += 1
            if peer_id in self._routes:
                self._flush(self._routes[peer_id][0])
            else:  # Is the process gone? A new dial will tell.
                self._dial(peer_id)
        elif dial is None:
            if not connection.hangup_error:  # else it has hung up by itself
                self.queues.report_refusal(Refusal(connection.peer_ip, NO_PROOF))
        elif not connection.hangup_error:
            self._give_up(dial, NO_PROOF)
        else:
            # An acceptor that cannot read our first box ends the stream; one that is crowded, or a
            # bad network, resets it. Who is about to end may do either once or twice.
            dial.end_count += connection.hangup_error == errno.EPIPE
            dial.retry_count += 1
            if dial.end_count == MAX_ENDS:
                self._give_up(dial, WE_ARE_REFUSED)
            elif dial.retry_count == MAX_RETRIES:
                self._give_up(dial)
            else:
                dial.due_s, dial.is_started = time.monotonic() + 0.02 * dial.retry_count, False

    def _refuse(self, connection: Connection, refusal: RefusalError) -> None:
        """Ends a connection and reports why."""
        dial, peer_id = connection.dial, connection.peer_id or refusal.peer_id
        names = [peer_id or connection.peer_ip]
        if dial is not None and not connection.peer_id:
            names = [peer_id] if peer_id else list(dial.targets)
            self._give_up(dial)
        for name in names:
            self.queues.report_refusal(Refusal(name, refusal.reason, refusal.differences))
        if dial is None and connection in self._strangers:
            connection.is_ending = True  # it hangs up when it has our hello, or runs out of time
        else:
            self._close(connection)

    def _close(self, connection: Connection) -> None:
        """Ends a connection from this side."""
        self._shut(connection)
        self._forget(connection)

    def _shut(self, connection: Connection) -> None:
        """Ends the socket of an accepted connection, for which ZeroMQ has no call: it sees the end
        of the stream, and resets."""
        if connection.dial is None:
            with suppress(OSError), self._accepted_socket(connection.descriptor) as accepted_socket:
                linger = struct.pack("ii", 1, 0)
                accepted_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                accepted_socket.shutdown(socket.SHUT_RD)

    def _accepted_socket(self, descriptor: int) -> socket.socket:
        """A second socket on an accepted connection. OSError: this descriptor is of another thing,
        as the connection has ended."""
        duplicate = os.dup(descriptor)
        try:
            accepted_socket = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)
            raise
        if accepted_socket.getsockname()[1:2] != (self._port,):
            accepted_socket.close()
            raise OSError(errno.ENOTCONN, "another socket")
        return accepted_socket

    def _peer_ip(self, descriptor: int) -> str:
        with suppress(OSError), self._accepted_socket(descriptor) as accepted_socket:
            return str(accepted_socket.getpeername()[0]).removeprefix("::ffff:")
        return STRANGER

    def _forget(self, connection: Connection) -> None:
        connection.is_ending = True
        self._strangers.pop(connection, None)
        self._by_routing_id.pop(connection.routing_id, None)
        if self._by_descriptor.get(connection.descriptor) is connection and connection.dial:
            del self._by_descriptor[connection.descriptor]
        if self._by_endpoint.pop(connection.endpoint, None) is not None:
            with suppress(zmq.ZMQError):
                self._router.disconnect(connection.endpoint)
        for name in connection.names:
            connections = self._routes.get(name, [])
            if connection in connections:
                connections.remove(connection)
            if not connections:
                self._routes.pop(name, None)

    # ---- dialling ----

    def _dial(self, target: str) -> None:
        address = target.rpartition("#")[0] or target
        if address not in self._dials:
            now = time.monotonic()
            due_s = max(now, self._next_dial_s.get(address, now))
            if len(self._next_dial_s) > 4096:
                self._next_dial_s = {k: v for k, v in self._next_dial_s.items() if v > now}
            self._next_dial_s[address] = due_s + DIAL_INTERVAL_S
            self._dials[address] = Dial(address, due_s)
        self._dials[address].targets[target] = None

    def _probe(self, dial: Dial) -> None:
        """In a thread of its own, as a name server may take its time: whether somebody listens.
        ZeroMQ would not say that a dial was refused."""
        result: tuple[str, int] | OSError
        try:
            result = listening_endpoint(dial.address)
        except OSError as cause:
            result = cause
        self._dial_results.append((dial, result))
        self.queues.wake_network()

    def _on_dial_result(self, dial: Dial, result: tuple[str, int] | OSError) -> None:
        if self._dials.get(dial.address) is not dial:
            return
        if isinstance(result, tuple):
            self._connect(dial, f"tcp://{format_address(*result)}", is_ipv6=":" in result[0])
        elif isinstance(result, ConnectionRefusedError):
            del self._dials[dial.address]
            for target in dial.targets:
                self._report_lost(target)
        elif isinstance(result, socket.gaierror) or result.errno == errno.EINVAL:
            self._give_up(dial, f"{dial.address} does not resolve: {result.strerror or result}")
        elif isinstance(result, TimeoutError) or result.errno in UNREACHABLE_ERRORS:
            self._give_up(dial)
        else:
            self._give_up(dial, f"cannot be dialled: {result.strerror or result}")

    def _connect(self, dial: Dial, endpoint: str, is_ipv6: bool) -> None:
        if (connection := self._by_endpoint.get(endpoint)) is not None:
            if connection.peer_id:  # the same place under another name
                del self._dials[dial.address]
                self._serve_targets(connection, dial)
            else:
                dial.due_s, dial.is_started = time.monotonic() + DIAL_INTERVAL_S, False
            return
        # ZeroMQ ends the process when a name is taken, and peers may choose their own.
        routing_id = b"d" + secrets.token_bytes(16)
        connection = Connection(time.monotonic(), -1, routing_id, dial=dial, endpoint=endpoint)
        self._router.ipv6 = is_ipv6
        self._router.setsockopt(zmq.CONNECT_ROUTING_ID, routing_id)
        self._router.connect(endpoint)
        self._by_routing_id[routing_id] = self._by_endpoint[endpoint] = connection
        self._strangers[connection] = None
        connection.send_buffer += pack_hello(self._own_id, self._hello) + b"\n"
        self._flush(connection)

    def _give_up(self, dial: Dial, reason: str = "") -> None:
        """A dial that came to nothing; the peer is not lost."""
        if self._dials.pop(dial.address, None) is not None:
            self._next_dial_s[dial.address] = time.monotonic() + 10 * DIAL_INTERVAL_S
        for target in dial.targets:
            if reason:
                self.queues.report_refusal(Refusal(target, reason))
            if target not in self._routes:
                self.queues.drop_outgoing(target)

    def _report_lost(self, target: str) -> None:
        if target not in self._routes:
            self.queues.drop_outgoing(target)
            self.queues.report_lost(target)


def curve_keys(secret: bytes, role: str) -> tuple[bytes, bytes]:
    """Public and secret key of a role: the same for all who know the run's secret."""
    secret_key = z85.encode(hmac.digest(secret, f"cordee link 2 {role}".encode(), "sha256"))
    return zmq.curve_public(secret_key), secret_key
