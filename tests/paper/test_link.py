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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.elastic.frames import FrameDecoder, FrameEncoder, FrameError, pack, unpack
from cordee.elastic.handshake import Handshake, RefusalError
from cordee.elastic.secret import make_secret, read_secret
from cordee.elastic.transport import Refusal, Transport, differences, format_differences
from cordee.errors import ConfigError

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
        assert a.local_ip(b.id) == a.local_ip(address_of(b)) == b.local_ip(a.id) == "127.0.0.1"
        assert (a.peer_hello(b.id) or {})["about.host"] == "i"
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
        assert a_refusals[0].peer == "127.0.0.1" and "secret" in a_refusals[0].reason
        b.send(address_of(a), {"let": "me in"})  # said once, however often it tries
        wait_until(lambda: a.error_counts().get("refused") == 2)
        assert a.take_refusals() == [] and a.receive() == [] and a.take_lost_peers() == []


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


# ---- frames ----


def make_codec() -> tuple[FrameEncoder, FrameDecoder]:
    encoder, decoder = FrameEncoder(), FrameDecoder()
    encoder.set_key(b"k" * 32)
    decoder.set_key(b"k" * 32)
    return encoder, decoder


def decode_bodies(decoder: FrameDecoder, data: bytes) -> list[bytes]:
    decoder.feed(data)
    bodies = []
    while (body := decoder.next_body()) is not None:
        bodies.append(body)
    return bodies


def test_frames_open_however_the_bytes_are_cut() -> None:
    encoder, decoder = make_codec()
    bodies = [pack({"n": n}) for n in range(20)]
    stream = b"".join(map(encoder.encode, bodies))
    decoded_bodies = [
        body for i in range(len(stream)) for body in decode_bodies(decoder, stream[i : i + 1])
    ]
    assert decoded_bodies == bodies and not decoder.has_partial_frame


def test_a_flipped_bit_anywhere_is_refused_at_once() -> None:
    frame = make_codec()[0].encode(pack({"commit": 17, "members": ["a", "b"]}))
    for byte_index in range(len(frame)):
        for bit in range(8):
            corrupt_frame = bytearray(frame)
            corrupt_frame[byte_index] ^= 1 << bit
            with pytest.raises(FrameError):
                decode_bodies(make_codec()[1], bytes(corrupt_frame))


def test_replayed_moved_and_left_out_frames_are_refused() -> None:
    encoder = make_codec()[0]
    one, two, three = (encoder.encode(pack({"n": n})) for n in range(3))
    for stream in (one + one, two + one, one + three, two, one + two + three + one):
        with pytest.raises(FrameError):
            decode_bodies(make_codec()[1], stream)
    other_decoder = FrameDecoder()
    other_decoder.set_key(b"o" * 32)
    with pytest.raises(FrameError):
        decode_bodies(other_decoder, one)


@pytest.mark.parametrize(
    "body",
    [b"[" * 60_000, b"[]", b"{", b"\xff\xfe", b'{"a":NaN}', b'{"a":' + b"9" * 5000 + b"}", b""],
)
def test_hostile_json_is_a_broken_frame(body: bytes) -> None:
    with pytest.raises(FrameError):
        unpack(body)


def run_handshake(alter: Callable[[int, bytes], bytes]) -> tuple[Handshake, Handshake]:
    """Both sides of a handshake, the bytes of each turn changed on the way."""
    acceptor = Handshake(SECRET, "127.0.0.1:1#00000001", HELLO, is_dialler=False)
    dialler = Handshake(SECRET, "127.0.0.1:2#00000002", HELLO, is_dialler=True)
    sent_bytes, sides = acceptor.first_bytes(), (dialler, acceptor)
    for turn in range(4):
        side = sides[turn % 2]
        side.decoder.feed(alter(turn, sent_bytes))
        sent_bytes = b""
        while (body := side.decoder.next_body()) is not None:
            sent_bytes += side.receive(body)
    return acceptor, dialler


def test_a_handshake_with_any_bit_flipped_comes_to_nothing() -> None:
    lengths: dict[int, int] = {}

    def record_length(turn: int, data: bytes) -> bytes:
        lengths[turn] = len(data)
        return data

    assert all(side.is_complete for side in run_handshake(record_length))
    for flip_turn, length in lengths.items():
        for byte_index in range(length):

            def flip(
                turn: int, data: bytes, flip_turn: int = flip_turn, byte_index: int = byte_index
            ) -> bytes:
                corrupt_data = bytearray(data)
                if turn == flip_turn and data:
                    corrupt_data[byte_index] ^= 1 << byte_index % 8
                return bytes(corrupt_data)

            try:
                acceptor, dialler = run_handshake(flip)
            except (FrameError, RefusalError):
                continue
            assert not acceptor.is_complete, f"byte {byte_index} of turn {flip_turn}"
            assert not (dialler.is_complete and flip_turn < 3), (
                f"byte {byte_index} of turn {flip_turn}"
            )


@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_garbage_ends_a_handshake_and_nothing_else(
    data: bytes, is_dialler: bool, is_framed: bool
) -> None:
    handshake = Handshake(SECRET, "127.0.0.1:1#00000001", HELLO, is_dialler=is_dialler)
    handshake.first_bytes()
    try:
        for body in decode_bodies(
            handshake.decoder, FrameEncoder().encode(data) if is_framed else data
        ):
            handshake.receive(body)
    except (FrameError, RefusalError):
        pass
    assert not handshake.is_authenticated


# ---- strangers ----


def seconds_until_closed(stranger: socket.socket, within_s: float) -> float:
    """Seconds until the other side hangs up."""
    start_s = time.monotonic()
    stranger.settimeout(within_s)
    try:
        while stranger.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - start_s


def plain_frame(message: dict[str, Any]) -> bytes:
    return FrameEncoder().encode(pack(message))


def dial_handshake(stranger: socket.socket, handshake: Handshake) -> list[bytes]:
    """Does the handshake as the dialler; returns what was said."""
    sent_messages = []
    while not handshake.is_complete:
        handshake.decoder.feed(stranger.recv(1 << 16))
        while (body := handshake.decoder.next_body()) is not None:
            sent_messages.append(handshake.receive(body))
            stranger.sendall(sent_messages[-1])
    return sent_messages


@pytest.mark.parametrize(
    "body",
    [b"[" * 200_000, b"{}" * 2, b'"text"', b"x" * ((8 << 20) + 1), b'{"a":"\\ud800"}'],
    ids=["deep", "two", "no object", "too long", "surrogate"],
)
def test_even_who_knows_the_secret_cannot_break_the_link(body: bytes) -> None:
    with open_transports(HELLO, HELLO) as (a, b), connect_to(a) as stranger:
        handshake = Handshake(SECRET, "127.0.0.1:9#00000000", HELLO, is_dialler=True)
        dial_handshake(stranger, handshake)
        frame = handshake.encoder.encode(body)
        stranger.sendall(frame[: 1 << 20])
        if b"ud800" in body:
            assert receive_messages(a, 1)[0][1] == {"a": "\ud800"}
        else:
            assert seconds_until_closed(stranger, 2.0) < 0.9
            assert (
                a.error_counts()["broken"] == 1
                and wait_until(a.take_refusals)[0].peer == handshake._own_id
            )
        b.send(a.id, {"n": 1})
        assert receive_messages(a, 1) == [(b.id, {"n": 1})]


def test_who_skips_the_proof_is_refused() -> None:
    identity = {"link": 1, "id": "127.0.0.1:9#00000000", "nonce": "0" * 64}
    attempts = [
        plain_frame({"n": 1}),
        plain_frame(identity),
        plain_frame({**identity, "proof": ""}),
        plain_frame({**identity, "proof": 7}),
        plain_frame({**identity, "proof": "\ud800" * 64}),
        plain_frame({**identity, "link": "\ud800\x1b"}),
        plain_frame({**identity, "refused": []}),
        plain_frame({**identity, "proof": "0" * 64}) + plain_frame({"n": 1}),
        plain_frame({**identity, "link": 0}),
        plain_frame({**identity, "id": "nowhere#00000000", "proof": "0" * 64}),
        plain_frame(HELLO) + plain_frame({"n": 1}),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        (1 << 20).to_bytes(4, "big") + b"{",
        (64 * 1024).to_bytes(4, "big") + b"[" * (64 * 1024),
    ]
    with open_transports(HELLO) as (a,):
        for data in attempts:
            with connect_to(a) as stranger:
                stranger.sendall(data)
                assert seconds_until_closed(stranger, 2.0) < 0.9, data[:80]
        assert a.receive() == [] and a.error_counts()["refused"] == len(attempts)
        assert {refusal.peer for refusal in a.take_refusals()} == {"127.0.0.1"}


def test_a_false_acceptor_is_refused() -> None:
    """Whoever took the address of a host cannot pass for it, nor use our proof elsewhere."""
    with open_transports(HELLO) as (a,), socket.create_server(("127.0.0.1", 0)) as impostor:
        impostor.settimeout(3)
        impostor_address = f"127.0.0.1:{impostor.getsockname()[1]}"
        a.send(impostor_address, {"n": 1})
        connection, _ = impostor.accept()
        with connection:
            handshake = Handshake(
                OTHER_SECRET, impostor_address + "#00000000", HELLO, is_dialler=False
            )
            connection.sendall(handshake.first_bytes())
            identity = unpack(decode_bodies(FrameDecoder(), connection.recv(1 << 16))[0])
            connection.sendall(plain_frame({"proof": identity["proof"]}))
            assert seconds_until_closed(connection, 2.0) < 0.9
        assert "secret" in wait_until(a.take_refusals)[0].reason


def test_a_recorded_dialogue_is_of_no_use() -> None:
    """All that a genuine dialler said, said again, word for word."""
    recording: list[bytes] = []
    with open_transports(HELLO) as (a,):
        for is_replay in (False, True):
            with connect_to(a) as stranger:
                handshake = Handshake(SECRET, "127.0.0.1:9#00000000", HELLO, is_dialler=True)
                if is_replay:
                    stranger.sendall(b"".join(recording))
                    assert seconds_until_closed(stranger, 2.0) < 0.9
                    break
                recording += dial_handshake(stranger, handshake)
                recording.append(handshake.encoder.encode(pack({"n": 1})))
                stranger.sendall(recording[-1])
                assert receive_messages(a, 1)[0][1] == {"n": 1}
        assert a.receive() == []
        assert "secret" in wait_until(a.take_refusals)[0].reason


@pytest.mark.parametrize("pace", ["silent", "slow"])
def test_who_says_nothing_or_too_slowly_is_dropped(pace: str) -> None:
    with open_transports(HELLO) as (a,), connect_to(a) as stranger:
        stranger.settimeout(0.05)
        slow_bytes = iter(b"\0\0\x40\0" + b" " * 100)
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


def test_traffic_goes_on_among_garbage() -> None:
    with open_transports(HELLO, HELLO) as (a, b), ExitStack() as stack:
        for number in range(200):
            stranger = stack.enter_context(connect_to(b))
            if number % 2:
                stranger.sendall(os.urandom(64))
            a.send(b.id, {"n": number})
        assert [m["n"] for _, m in receive_messages(b, 200)] == list(range(200))
        with open_transports(HELLO) as (c,):  # a newcomer gets in, though strangers hold all places
            c.send(address_of(b), {"n": 0})
            assert receive_messages(b, 1) == [(c.id, {"n": 0})]
        assert b.error_counts()["crowded out"] > 0 and a.take_lost_peers() == []
        assert len(b.take_refusals()) < 10


# ---- ends ----

PEER_SCRIPT = """
import select, sys
from cordee.elastic.transport import Transport
link = Transport.open("127.0.0.1:0", b"s" * 32, {hello!r})
print(link.id, flush=True)
while True:
    select.select([link], [], [])
    for sender, message in link.receive():
        link.send(sender, message)
"""


@contextmanager
def echo_peer() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that returns what it gets, and its id."""
    code = PEER_SCRIPT.replace("{hello!r}", repr(HELLO))
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
        assert a.local_ip(peer_id) is None and a.receive() == []


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
        assert a.local_ip(ipv6_transport.id) == "::1"
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
    assert set(os.listdir("/proc/self/fd")) == open_descriptors


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
