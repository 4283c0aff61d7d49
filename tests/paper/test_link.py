"""Messages between supervisors: who is let in, what is refused, what is noticed. Real sockets."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq

from cordee.elastic.connection_thread import MAX_STRANGERS, STRANGER, curve_keys
from cordee.elastic.handshake import (
    VERSION,
    FrameError,
    RefusalError,
    check_hello,
    differences,
    format_differences,
    pack,
    pack_hello,
    unpack,
)
from cordee.elastic.secret import make_secret, read_secret
from cordee.elastic.transport import Refusal, Transport
from cordee.errors import ConfigError
from cordee.hardware.system import open_tcp_connections, resident_bytes

SECRET, OTHER_SECRET = b"s" * 32, b"t" * 32
HELLO = {"version": "0.4.0", "torch": "2.13.0", "config": "abc", "data": "def", "about.host": "h"}


@contextmanager
def open_transports(
    *hellos: dict[str, Any], secrets: tuple[bytes, ...] = ()
) -> Iterator[list[Transport]]:
    """A link for each hello, on free ports."""
    with ExitStack() as stack:
        transports = []
        for index, hello in enumerate(hellos):
            secret = secrets[index] if secrets else SECRET
            transports.append(Transport.open("127.0.0.1:0", secret, hello))
            stack.callback(transports[-1].close)
        yield transports


def wait_until(condition: Callable[[], Any], within_s: float = 3.0) -> Any:
    """The first answer that is something."""
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        if answer := condition():
            return answer
        time.sleep(0.002)
    raise AssertionError(f"nothing within {within_s} s")


def receive_messages(
    transport: Transport, count: int, within_s: float = 5.0
) -> list[tuple[str, dict[str, Any]]]:
    """The next so many messages, waiting as the supervisor does."""
    messages: list[tuple[str, dict[str, Any]]] = []
    end_s = time.monotonic() + within_s
    while len(messages) < count:
        remaining_s = end_s - time.monotonic()
        assert remaining_s > 0, f"{len(messages)} of {count} messages within {within_s} s"
        if select.select([transport], [], [], remaining_s)[0]:
            messages += transport.receive()
    return messages


def address_of(transport: Transport) -> str:
    return transport.id.partition("#")[0]


def connect_to(transport: Transport) -> socket.socket:
    host, port = address_of(transport).rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=3)


def test_a_round_trip_starts_with_a_bare_address() -> None:
    with open_transports(HELLO, {**HELLO, "about.host": "i"}) as (a, b):
        a.send(address_of(b), {"say": "hallo", "n": [1, 2.5, None, "é"]})
        assert receive_messages(b, 1) == [(a.id, {"say": "hallo", "n": [1, 2.5, None, "é"]})]
        b.send(a.id, {"say": "hello"})
        assert receive_messages(a, 1) == [(b.id, {"say": "hello"})]
        assert (
            a.take_refusals()
            == b.take_refusals()
            == a.take_lost_peers()
            == b.take_lost_peers()
            == []
        )
        assert a.error_counts() == b.error_counts() == {}


def test_order_and_number_of_many_and_of_long_messages() -> None:
    with open_transports(HELLO, HELLO) as (a, b):
        for number in range(20_000):
            a.send(b.id, {"n": number})
        assert [m["n"] for _, m in receive_messages(b, 20_000, 20)] == list(range(20_000))
        text = "x" * (1 << 20)
        for number in range(8):
            b.send(a.id, {"n": number, "text": text})
        assert [m for _, m in receive_messages(a, 8, 20)] == [
            {"n": n, "text": text} for n in range(8)
        ]
        with pytest.raises(ValueError, match="at most"):
            a.send(b.id, {"text": "x" * (9 << 20)})
        with pytest.raises(ValueError):
            a.send(b.id, {"loss": float("nan")})


def test_both_dial_at_the_same_moment() -> None:
    for _ in range(20):
        with open_transports(HELLO, HELLO) as (a, b):
            for number in range(50):
                a.send(b.id, {"n": number})
                b.send(a.id, {"n": number})
            for transport, sender in ((a, b), (b, a)):
                messages = receive_messages(transport, 50)
                assert sorted(m["n"] for _, m in messages) == list(range(50))
                assert {sender_id for sender_id, _ in messages} == {sender.id}
            assert a.take_lost_peers() == b.take_lost_peers() == []


def test_a_wrong_secret_is_refused_and_both_are_told() -> None:
    with open_transports(HELLO, HELLO, secrets=(SECRET, OTHER_SECRET)) as (a, b):
        b.send(address_of(a), {"let": "me in"})
        b_refusals, a_refusals = wait_until(b.take_refusals, 1.0), wait_until(a.take_refusals, 1.0)
        assert b_refusals[0].peer == address_of(a) and "secret" in b_refusals[0].reason
        assert a_refusals[0].peer in ("127.0.0.1", STRANGER)
        assert "the secret differs" in a_refusals[0].reason
        b.send(address_of(a), {"let": "me in"})  # said once, however often it tries
        refused_count = a.error_counts()["refused"]
        wait_until(lambda: a.error_counts()["refused"] > refused_count)
        other_names = {"127.0.0.1", STRANGER} - {a_refusals[0].peer}
        assert {refusal.peer for refusal in a.take_refusals()} <= other_names
        assert a.receive() == [] and a.take_lost_peers() == []


@pytest.mark.parametrize("key", ["version", "torch", "config", "data"])
def test_another_run_is_refused_with_a_table(key: str) -> None:
    with open_transports(HELLO, HELLO, {**HELLO, key: "other"}) as (a, b, joiner):
        a.send(b.id, {"n": 1})
        receive_messages(b, 1)
        joiner.send(address_of(a), {"let": "me in"})
        (joiner_refusal,), (a_refusal,) = (
            wait_until(joiner.take_refusals, 1.0),
            wait_until(a.take_refusals, 1.0),
        )
        assert (
            isinstance(joiner_refusal, Refusal)
            and joiner_refusal.peer == a.id
            and a_refusal.peer == joiner.id
        )
        assert joiner_refusal.differences == ((key, "other", HELLO[key]),)
        assert a_refusal.differences == ((key, HELLO[key], "other"),)
        header, row = joiner_refusal.table.splitlines()
        assert header.split() == ["here", "there"] and row.split() == [key, "other", HELLO[key]]
        assert row.index("other") == header.index("here")
        a.send(b.id, {"n": 2})  # the others go on
        assert receive_messages(b, 1) == [(a.id, {"n": 2})]
        assert a.receive() == []


def test_what_is_a_difference() -> None:
    own_hello, peer_hello = (
        {"a": (1, 2), "b": 1, "c": None, "about.x": 1},
        {"a": [1, 2], "b": True, "d": 3},
    )
    assert differences(own_hello, peer_hello) == [("b", 1, True), ("d", None, 3)]
    assert format_differences([]) == ""
    assert "\x1b" not in format_differences([("k", "\x1b[2J", "v" * 500)])
    assert len(format_differences([("k", "\x1b[2J", "v" * 500)])) < 300


def test_a_process_that_took_the_address_of_another_gets_none_of_its_messages() -> None:
    with open_transports(HELLO, HELLO) as (a, b):
        old_id, address = b.id, address_of(b)
        b.close()
        c = Transport.open(address, SECRET, HELLO)
        try:
            a.send(old_id, {"for": "the old one"})
            assert wait_until(a.take_lost_peers) == [old_id]
            a.send(address, {"for": "whoever"})
            assert receive_messages(c, 1) == [(a.id, {"for": "whoever"})]
        finally:
            c.close()


@pytest.mark.parametrize(
    "body",
    [b"[" * 60_000, b"[]", b"{", b"\xff\xfe", b'{"a":NaN}', b'{"a":' + b"9" * 5000 + b"}", b""],
)
def test_hostile_json_is_a_broken_frame(body: bytes) -> None:
    with pytest.raises(FrameError):
        unpack(body)


def test_a_hello_of_another_version_or_without_an_id_is_refused() -> None:
    own_id, peer_id = "127.0.0.1:1#00000001", "127.0.0.1:2#00000002"
    assert check_hello(pack_hello(peer_id, HELLO), own_id, HELLO) == peer_id
    hello = {"link": VERSION, "id": peer_id, "hello": HELLO}
    for wrong_hello, reason in [
        ({**hello, "link": 1}, "version 1 of"), ({**hello, "link": "\ud800\x1b"}, "version"),
        ({**hello, "id": "nowhere#00000000"}, "id"), ({**hello, "id": 7}, "id"),
        ({**hello, "hello": 3}, "id"), ({}, "version"), ({**hello, "id": own_id}, "itself"),
    ]:  # fmt: skip
        with pytest.raises(RefusalError, match=reason):
            check_hello(pack(wrong_hello), own_id, HELLO)


# ---- strangers ----

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15 + 1 + 31)
"""What a dialler says first in ZMTP 3.1: signature, version, mechanism, that it is no server."""
HELLO_COMMAND = b"\x04\xc8\x05HELLO\x01\x00" + bytes(72)
"""The beginning of CURVE's first command: version and padding; key, nonce and box follow."""


def seconds_until_closed(stranger: socket.socket, within_s: float) -> float:
    """Seconds until the other side hangs up."""
    start_s = time.monotonic()
    stranger.settimeout(within_s)
    with suppress(ConnectionResetError):
        while stranger.recv(1 << 16):
            pass
    return time.monotonic() - start_s


@contextmanager
def insider(
    transport: Transport, acceptor_secret: bytes = SECRET, dialler_secret: bytes = SECRET
) -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """A socket that is connected to a link by CURVE and says what the test wants it to say, and one
    that is readable when the link has hung up."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.curve_serverkey = curve_keys(acceptor_secret, "acceptor")[0]
        dealer.curve_publickey, dealer.curve_secretkey = curve_keys(dialler_secret, "dialler")
        with dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
            dealer.connect(f"tcp://{address_of(transport)}")
            yield dealer, monitor
            dealer.disable_monitor()


INSIDER_ID = "127.0.0.1:9#00000000"


@pytest.mark.parametrize(
    "body",
    [b"[" * 200_000, b"{}" * 2, b'"text"', b"x" * ((8 << 20) + 1), b'{"a":"\\ud800"}'],
    ids=["deep", "two", "no object", "too long", "surrogate"],
)
def test_even_who_knows_the_secret_cannot_break_the_link(body: bytes) -> None:
    with open_transports(HELLO, HELLO) as (a, b), insider(a) as (dealer, monitor):
        dealer.send(pack_hello(INSIDER_ID, HELLO) + b"\n")
        assert check_hello(dealer.recv().rstrip(), INSIDER_ID, HELLO) == a.id
        for start in range(0, len(body) + 1, 60_000):  # the line's parts need not be where we cut
            dealer.send((body + b"\n")[start : start + 60_000])
        if b"ud800" in body:
            assert receive_messages(a, 1)[0][1] == {"a": "\ud800"}
        else:
            assert monitor.poll(2000)
            assert a.error_counts()["broken"] == 1
            assert wait_until(a.take_refusals)[0].peer == INSIDER_ID
        b.send(a.id, {"n": 1})
        assert receive_messages(a, 1) == [(b.id, {"n": 1})]


@pytest.mark.parametrize(
    "first_bytes",
    [b'{"n":1}\n', b"\n", b"\0\xff\n", pack({"link": 1}) + b"\n", b" " * 60_000,
     b"x" * 100_000, b""],
    ids=["message", "empty", "binary", "version", "endless", "chunk too long", "silent"],
)  # fmt: skip
def test_who_knows_the_secret_and_says_no_hello_is_dropped(first_bytes: bytes) -> None:
    with open_transports(HELLO) as (a,), insider(a) as (dealer, monitor):
        if first_bytes:
            dealer.send(first_bytes)
        assert monitor.poll(6000)
        assert a.receive() == []
        if len(first_bytes) < 100_000:  # else it is ZeroMQ that hangs up
            assert wait_until(a.take_refusals)[0].peer in ("127.0.0.1", STRANGER)


def test_a_key_that_is_not_the_runs_is_refused_even_with_the_acceptors() -> None:
    with open_transports(HELLO) as (a,), insider(a, SECRET, OTHER_SECRET) as (dealer, monitor):
        dealer.send(pack_hello(INSIDER_ID, HELLO) + b"\n")
        assert monitor.poll(2000) and not dealer.poll(100)
        assert a.receive() == [] and wait_until(a.take_refusals)[0].peer in ("127.0.0.1", STRANGER)


def test_who_skips_the_proof_is_refused() -> None:
    attempts = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b'\0\0\0\x07{"n":1}',
        b"\xff" * 64,
        GREETING[:12] + b"NULL" + bytes(48) + b"\x04\x05\x05READY",
        GREETING[:10] + b"\x01\x00",  # ZMTP 2.0, which knows no encryption
        GREETING + b"\0\x07" + b'{"n":1}',
        GREETING + HELLO_COMMAND + bytes(32 + 8 + 80),
        GREETING + HELLO_COMMAND + os.urandom(32 + 8 + 80),
        GREETING + b"\x04\x09\x08INITIATE",
        GREETING + b"\x04\x06\x05ERROR",
        GREETING + b"\x06" + (1 << 40).to_bytes(8, "big") + b"{",
        GREETING + b"\x06" + b"\xff" * 8,
        os.urandom(1).replace(b"\xff", b"\0") + os.urandom(400),
    ]
    with open_transports(HELLO) as (a,):
        for data in attempts:
            with connect_to(a) as stranger:
                stranger.sendall(data)
                assert seconds_until_closed(stranger, 2.0) < 0.9, data[:80]
        wait_until(lambda: a.error_counts().get("refused", 0) >= len(attempts))
        assert a.receive() == []
        assert {refusal.peer for refusal in a.take_refusals()} <= {"127.0.0.1", STRANGER}


def record_dialogue(a: Transport, b: Transport) -> tuple[bytes, bytes]:
    """All bytes of a dialogue that `a` begins through an intermediary: from a, and from b."""
    recordings = (bytearray(), bytearray())
    with socket.create_server(("127.0.0.1", 0)) as server:
        a.send(f"127.0.0.1:{server.getsockname()[1]}", {"text": "MARKER"})
        for is_probe in (True, False):
            dialler, _ = server.accept()
            with dialler, connect_to(b) as acceptor:
                answers: list[Any] = []
                while not answers and not is_probe:
                    for source in select.select([dialler, acceptor], [], [], 3)[0]:
                        data = source.recv(1 << 16)
                        recordings[source is acceptor].extend(data)
                        (dialler if source is acceptor else acceptor).sendall(data)
                    answers = b.receive()
    assert answers == [(a.id, {"text": "MARKER"})]
    return bytes(recordings[0]), bytes(recordings[1])


def test_a_recorded_dialogue_is_of_no_use_and_cannot_be_read() -> None:
    """All that a genuine dialler said, said again, word for word; and what an acceptor said."""
    with open_transports(HELLO, HELLO) as (a, b):
        dialler_bytes, acceptor_bytes = record_dialogue(a, b)
        for recording in (dialler_bytes, acceptor_bytes):
            assert len(recording) > 400
            for secret_text in (b"MARKER", b"torch", a.id.encode(), b.id.encode(), SECRET):
                assert secret_text not in recording
        for _ in range(5):
            with connect_to(b) as stranger:
                stranger.sendall(dialler_bytes)
                assert seconds_until_closed(stranger, 2.0) < 0.9
        assert b.receive() == []
        with socket.create_server(("127.0.0.1", 0)) as impostor:
            impostor_address = f"127.0.0.1:{impostor.getsockname()[1]}"
            a.send(impostor_address, {"n": 1})
            impostor.accept()[0].close()
            connection, _ = impostor.accept()
            with connection:
                connection.sendall(acceptor_bytes)
                assert seconds_until_closed(connection, 2.0) < 0.9
        assert "secret" in wait_until(a.take_refusals)[0].reason


def test_ones_own_words_reflected_are_of_no_use() -> None:
    with open_transports(HELLO) as (a,), connect_to(a) as stranger:
        start_s = time.monotonic()
        stranger.settimeout(5)
        with suppress(ConnectionError):
            while data := stranger.recv(1 << 16):
                stranger.sendall(data)
        assert time.monotonic() - start_s < 4
        assert a.receive() == [] and wait_until(a.take_refusals)[0].peer in ("127.0.0.1", STRANGER)


def test_a_false_acceptor_is_refused() -> None:
    """Whoever took the address of a host cannot pass for it."""
    with open_transports(HELLO, HELLO, secrets=(SECRET, OTHER_SECRET)) as (a, impostor):
        a.send(address_of(impostor), {"n": 1})
        assert "secret" in wait_until(a.take_refusals)[0].reason
        assert impostor.receive() == [] and a.take_lost_peers() == []


@pytest.mark.parametrize("pace", ["silent", "slow"])
def test_who_says_nothing_or_too_slowly_is_dropped(pace: str) -> None:
    with open_transports(HELLO) as (a,), connect_to(a) as stranger:
        stranger.settimeout(0.05)
        slow_bytes = iter(GREETING + b"\x04\xc8\x05HELLO" + bytes(100))
        start_s = time.monotonic()
        while time.monotonic() - start_s < 5:
            try:
                if pace == "slow":
                    stranger.send(bytes([next(slow_bytes)]))
                if not stranger.recv(1 << 10):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert 0.5 < time.monotonic() - start_s < 3
        assert wait_until(a.take_refusals)


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", ["half open", "hanging up", "wrong key"])
def test_a_flood_of_strangers_takes_no_descriptors_and_no_turns(kind: str) -> None:
    """A thousand connections at once: few of them are held, and hosts and newcomers get through."""
    with open_transports(HELLO, HELLO) as (a, b), ExitStack() as stack:
        a.send(b.id, {"n": -1})
        receive_messages(b, 1)
        before_count, most_count = count_descriptors(), 0
        for number in range(1000):
            with suppress(ConnectionResetError):  # it has made room for the next
                stranger = connect_to(b)
                if kind == "hanging up":
                    stranger.close()
                else:
                    stack.callback(stranger.close)
                    if kind == "wrong key":
                        stranger.sendall(GREETING + HELLO_COMMAND + os.urandom(120))
            if number % 10 == 0:
                a.send(b.id, {"n": number // 10})
                strangers_count = 0 if kind == "hanging up" else number + 1
                most_count = max(most_count, count_descriptors() - before_count - strangers_count)
        assert [m["n"] for _, m in receive_messages(b, 100)] == list(range(100))
        assert most_count < 2 * MAX_STRANGERS, "descriptors of the link itself"
        assert a.take_lost_peers() == b.take_lost_peers() == [] and len(b.take_refusals()) < 10
        with open_transports(HELLO) as (c,):
            c.send(address_of(b), {"n": 0})
            assert receive_messages(b, 1) == [(c.id, {"n": 0})]


def test_traffic_goes_on_among_garbage() -> None:
    with open_transports(HELLO, HELLO) as (a, b), ExitStack() as stack:
        for number in range(2 * MAX_STRANGERS):
            stranger = stack.enter_context(connect_to(b))
            if number % 4 == 0:
                stranger.sendall(os.urandom(64))
            a.send(b.id, {"n": number})
        messages = receive_messages(b, 2 * MAX_STRANGERS)
        assert [m["n"] for _, m in messages] == list(range(2 * MAX_STRANGERS))
        with open_transports(HELLO) as (c,):  # a newcomer gets in, though strangers hold all places
            c.send(address_of(b), {"n": 0})
            assert receive_messages(b, 1) == [(c.id, {"n": 0})]
        assert b.error_counts()["crowded out"] > 0 and a.take_lost_peers() == []
        assert len(b.take_refusals()) < 10


# ---- ends ----

PEER_SCRIPT = """
import select, sys, time
from cordee.elastic.transport import Transport
transport = Transport.open("127.0.0.1:0", b"s" * 32, {hello!r}, message_error={message_error})
print(transport.id, flush=True)
while True:
    select.select([transport], [], [])
    for sender, message in transport.receive():
        transport.send(sender, message)
"""


@contextmanager
def echo_peer(message_error: str = "lambda m: ''") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that returns what it gets, and its id."""
    code = PEER_SCRIPT.replace("{hello!r}", repr(HELLO)).replace("{message_error}", message_error)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_killed_peer_is_lost_without_asking() -> None:
    with open_transports(HELLO) as (a,), echo_peer() as (peer, peer_id):
        a.send(peer_id, {"n": 1})
        assert receive_messages(a, 1) == [(peer_id, {"n": 1})]
        peer.kill()
        assert select.select([a], [], [], 30)[0]
        assert a.take_lost_peers() == [peer_id] and a.take_lost_peers() == []
        a.send(peer_id, {"n": 2})
        assert wait_until(a.take_lost_peers) == [peer_id]
        assert a.receive() == []


def test_a_peer_that_only_dialled_us_is_lost_as_well() -> None:
    with open_transports(HELLO, HELLO) as (a, b):
        b.send(a.id, {"n": 1})
        receive_messages(a, 1)
        b.close()
        assert wait_until(a.take_lost_peers, 1.0) == [b.id]


def test_a_stopped_peer_is_silent_not_lost() -> None:
    with open_transports(HELLO) as (a,), echo_peer() as (peer, peer_id):
        a.send(peer_id, {"n": 1})
        receive_messages(a, 1)
        peer.send_signal(signal.SIGSTOP)
        a.send(peer_id, {"n": 2})
        time.sleep(0.3)
        assert a.take_lost_peers() == [] and a.receive() == []
        peer.send_signal(signal.SIGCONT)
        assert receive_messages(a, 1) == [(peer_id, {"n": 2})]


def test_a_connection_that_breaks_while_its_queues_are_full_does_no_harm() -> None:
    """ZeroMQ's pings end a process in which one is due on such a connection."""
    with echo_peer("lambda m: time.sleep(4) if m['n'] == 1 else ''") as (peer, peer_id):
        with open_transports(HELLO) as (a,):
            a.send(peer_id, {"n": 0})
            receive_messages(a, 1)
            for number in range(1, 60):
                a.send(peer_id, {"n": number, "text": "x" * 100_000})
            time.sleep(0.5)
        with open_transports(HELLO) as (b,):
            b.send(peer_id, {"n": 60})
            wait_until(lambda: b.send(peer_id, {"n": 60}) or b.receive(), 15.0)
            assert peer.poll() is None


def test_a_connection_over_which_nothing_comes_ends() -> None:
    """The other side is not gone: it is there again when it speaks."""
    with open_transports(HELLO) as (a,), echo_peer() as (peer, peer_id):
        a.send(peer_id, {"n": 1})
        receive_messages(a, 1)
        peer.send_signal(signal.SIGSTOP)
        wait_until(lambda: a.error_counts().get("broken"), 8.0)
        assert a.take_lost_peers() == []
        peer.send_signal(signal.SIGCONT)
        a.send(peer_id, {"n": 2})
        assert receive_messages(a, 1, 15.0) == [(peer_id, {"n": 2})]


def test_what_waits_for_a_silent_peer_is_bounded_in_bytes() -> None:
    with open_transports(HELLO) as (a,), echo_peer() as (peer, peer_id):
        a.send(peer_id, {"n": 0})
        receive_messages(a, 1)
        peer.send_signal(signal.SIGSTOP)
        text = "x" * (1 << 20)
        before_bytes = resident_bytes()
        for number in range(160):
            a.send(peer_id, {"n": number, "text": text})
        assert a.error_counts()["dropped"] >= 160 - 64 - 24  # the kernel has some
        assert resident_bytes() - before_bytes < 100 << 20
        assert a.take_lost_peers() == []


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_USER_TIMEOUT is Linux's")
def test_unacknowledged_bytes_end_a_connection_long_before_the_kernel_would() -> None:
    with open_transports(HELLO, HELLO) as (a, b):
        a.send(b.id, {"n": 0})
        receive_messages(b, 1)
        limits_ms = [
            connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            for connection in open_tcp_connections()
        ]
        assert limits_ms == [3000, 3000]


def test_an_address_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dead_address = f"127.0.0.1:{server.getsockname()[1]}"
    with open_transports(HELLO) as (a,):
        for _ in range(3):
            a.send(dead_address, {"n": 1})
            assert wait_until(a.take_lost_peers, 1.0) == [dead_address]
        a.send(a.id, {"to": "myself"})
        a.send("no-such-host.invalid:9", {"n": 1})
        assert "does not resolve" in wait_until(a.take_refusals, 20)[0].reason
        assert a.receive() == []


def test_round_trips_between_two_processes() -> None:
    with open_transports(HELLO) as (a,), echo_peer() as (_, peer_id):
        for number in range(300):
            a.send(peer_id, {"n": number})
            assert receive_messages(a, 1) == [(peer_id, {"n": number})]


# ---- opening ----


def test_a_taken_port_and_foreign_addresses_are_refused_with_a_fix() -> None:
    with open_transports(HELLO) as (a,):
        with pytest.raises(ConfigError, match="taken") as exc_info:
            Transport.open(address_of(a), SECRET, HELLO)
        assert exc_info.value.fix is not None
        Transport.open(exc_info.value.fix, SECRET, HELLO).close()
    for bind_address, message in [
        ("192.0.2.7:0", "not an address of this machine"),
        ("0.0.0.0:0", "cannot dial"),
        ("127.0.0.1", "not HOST:PORT"),
        ("::1:5", "not HOST:PORT"),
        ("127.0.0.1:99999", "not HOST:PORT"),
        ("no-such-host.invalid:0", "does not resolve"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Transport.open(bind_address, SECRET, HELLO)
    with pytest.raises(ConfigError, match="too long"):
        Transport.open("127.0.0.1:0", SECRET, {"digest": "x" * 70_000})
    with pytest.raises(ConfigError, match="too short"):
        Transport.open("127.0.0.1:0", b"short", HELLO)


def test_advertised_and_ipv6_addresses() -> None:
    wildcard_transport = Transport.open("0.0.0.0:0", SECRET, HELLO, advertise_address="localhost:0")
    try:
        assert wildcard_transport.id.startswith("localhost:")
        with open_transports(HELLO) as (a,):
            a.send(wildcard_transport.id, {"n": 1})
            assert receive_messages(wildcard_transport, 1) == [(a.id, {"n": 1})]
    finally:
        wildcard_transport.close()
    try:
        ipv6_transport = Transport.open("[::1]:0", SECRET, HELLO)
    except ConfigError:
        pytest.skip("this machine has no IPv6 loopback")
    with open_transports(HELLO) as (a,):
        a.send(ipv6_transport.id, {"n": 1})
        assert ipv6_transport.id.startswith("[::1]:") and receive_messages(ipv6_transport, 1) == [
            (a.id, {"n": 1})
        ]
    ipv6_transport.close()


def test_closing_sends_the_last_words_and_leaves_nothing() -> None:
    open_descriptors = set(os.listdir("/proc/self/fd"))
    with open_transports(HELLO, HELLO) as (a, b):
        a.send(b.id, {"n": 0})
        receive_messages(b, 1)
        for number in range(1000):
            a.send(b.id, {"n": number})
        a.close()
        assert len(receive_messages(b, 1000)) == 1000
        a.send(b.id, {"n": 1})
        a.close()
    assert set(os.listdir("/proc/self/fd")) <= open_descriptors


LIST_DESCRIPTORS = """
import contextlib, os
for number in os.listdir("/proc/self/fd"):
    with contextlib.suppress(OSError):  # the listing's own
        print(os.readlink(f"/proc/self/fd/{number}"))
"""


def test_child_processes_inherit_nothing_of_the_link() -> None:
    """A worker that held a socket of its supervisor would keep the dead one's connections open."""
    with open_transports(HELLO, HELLO) as (a, b):
        a.send(b.id, {"n": 0})
        receive_messages(b, 1)
        command = [sys.executable, "-c", LIST_DESCRIPTORS]
        for closes_descriptors in (True, False):  # what is not inheritable needs no closing
            child = subprocess.run(
                command, capture_output=True, text=True, close_fds=closes_descriptors
            )
            assert "pipe:" in child.stdout
            assert "socket:" not in child.stdout and "eventfd" not in child.stdout, child.stdout


def test_a_run_on_one_host_needs_no_zeromq() -> None:
    code = """if True:
        import sys
        sys.modules["zmq"] = None  # as if there were none
        import cordee.elastic.supervisor
        from cordee.config.load import load
        from cordee.elastic.transport import Transport
        from cordee.errors import ConfigError
        from cordee.launcher.rendezvous import check_rendezvous
        check_rendezvous(load(None, []).run)
        for open_it in (
            lambda: Transport.open("127.0.0.1:0", b"s" * 32, {}),
            lambda: check_rendezvous(load(None, ["launch.listen=127.0.0.1:0"]).run),
        ):
            try:
                open_it()
            except ConfigError as error:
                assert "pip install pyzmq" in str(error), error
            else:
                raise AssertionError("it opened")
    """
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the secret ----


def test_secret_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    secret = make_secret(path)
    assert len(secret) == 64 and path.stat().st_mode & 0o777 == 0o600
    assert make_secret(path) == read_secret(path) == secret
    path.chmod(0o400)
    assert read_secret(path) == secret
    for mode in (0o640, 0o604, 0o620, 0o700, 0o644):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            read_secret(path)
    path.chmod(0o600)
    symlink = tmp_path / "link"
    symlink.symlink_to(path)
    for bad_path, message in [
        (symlink, "symbolic link"),
        (tmp_path, "regular file"),
        (tmp_path / "none", "cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_secret(bad_path)
    with pytest.raises(ConfigError, match="symbolic link"):
        make_secret(symlink)
    for content in (b"short", b" \n" * 40, b"x" * 4097, b"x" * 9000):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="not 32 to 4096"):
            read_secret(path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="regular file"):
        read_secret(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_secret_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    make_secret(path)
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        read_secret(path)


def test_messages_are_json_and_nothing_else() -> None:
    body = pack({"a": 1})
    assert json.loads(body) == {"a": 1}
    with pytest.raises(TypeError):
        pack({"a": object()})
