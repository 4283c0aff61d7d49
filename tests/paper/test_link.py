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

from cordee.errors import ConfigError
from cordee.fault.frames import BrokenFrame, Opener, Sealer, pack, unpack
from cordee.fault.handshake import Handshake, Refused
from cordee.fault.link import Link, Refusal, differences, table
from cordee.fault.secret import make_secret, read_secret

SECRET, OTHER = b"s" * 32, b"t" * 32
HELLO = {"version": "0.4.0", "torch": "2.13.0", "config": "abc", "data": "def", "about.host": "h"}


@contextmanager
def links(*hellos: dict[str, Any], secrets: tuple[bytes, ...] = ()) -> Iterator[list[Link]]:
    """A link for each hello, on free ports."""
    with ExitStack() as stack:
        made = []
        for index, hello in enumerate(hellos):
            secret = secrets[index] if secrets else SECRET
            made.append(Link.open("127.0.0.1:0", secret, hello))
            stack.callback(made[-1].close)
        yield made


def until(ask: Callable[[], Any], within_s: float = 3.0) -> Any:
    """The first answer that is something."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if answer := ask():
            return answer
        time.sleep(0.002)
    raise AssertionError(f"nothing within {within_s} s")


def take(link: Link, number: int, within_s: float = 5.0) -> list[tuple[str, dict[str, Any]]]:
    """The next so many messages, waiting as the supervisor does."""
    got: list[tuple[str, dict[str, Any]]] = []
    end = time.monotonic() + within_s
    while len(got) < number:
        left = end - time.monotonic()
        assert left > 0, f"{len(got)} of {number} messages within {within_s} s"
        if select.select([link], [], [], left)[0]:
            got += link.receive()
    return got


def address(link: Link) -> str:
    return link.id.partition("#")[0]


def dialled(link: Link) -> socket.socket:
    host, port = address(link).rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=3)


def test_a_round_trip_starts_with_a_bare_address() -> None:
    with links(HELLO, {**HELLO, "about.host": "i"}) as (a, b):
        a.send(address(b), {"say": "hallo", "n": [1, 2.5, None, "é"]})
        assert take(b, 1) == [(a.id, {"say": "hallo", "n": [1, 2.5, None, "é"]})]
        b.send(a.id, {"say": "hello"})
        assert take(a, 1) == [(b.id, {"say": "hello"})]
        assert a.local_ip(b.id) == a.local_ip(address(b)) == b.local_ip(a.id) == "127.0.0.1"
        assert (a.hello(b.id) or {})["about.host"] == "i"
        assert a.refused() == b.refused() == a.lost() == b.lost() == []
        assert a.counted() == b.counted() == {}


def test_order_and_number_of_many_and_of_long_messages() -> None:
    with links(HELLO, HELLO) as (a, b):
        for number in range(20_000):
            a.send(b.id, {"n": number})
        assert [m["n"] for _, m in take(b, 20_000, 20)] == list(range(20_000))
        text = "x" * (1 << 20)
        for number in range(8):
            b.send(a.id, {"n": number, "text": text})
        assert [m for _, m in take(a, 8, 20)] == [{"n": n, "text": text} for n in range(8)]
        with pytest.raises(ValueError, match="at most"):
            a.send(b.id, {"text": "x" * (9 << 20)})
        with pytest.raises(ValueError):
            a.send(b.id, {"loss": float("nan")})


def test_both_dial_at_the_same_moment() -> None:
    for _ in range(20):
        with links(HELLO, HELLO) as (a, b):
            for number in range(50):
                a.send(b.id, {"n": number})
                b.send(a.id, {"n": number})
            for link, sender in ((a, b), (b, a)):
                got = take(link, 50)
                assert sorted(m["n"] for _, m in got) == list(range(50))
                assert {who for who, _ in got} == {sender.id}
            assert a.lost() == b.lost() == []


def test_a_wrong_secret_is_refused_and_both_are_told() -> None:
    with links(HELLO, HELLO, secrets=(SECRET, OTHER)) as (a, b):
        b.send(address(a), {"let": "me in"})
        there, here = until(b.refused, 1.0), until(a.refused, 1.0)
        assert there[0].who == address(a) and "secret" in there[0].why
        assert here[0].who == "127.0.0.1" and "secret" in here[0].why
        b.send(address(a), {"let": "me in"})  # said once, however often it tries
        until(lambda: a.counted().get("refused") == 2)
        assert a.refused() == [] and a.receive() == [] and a.lost() == []


@pytest.mark.parametrize("key", ["version", "torch", "config", "data"])
def test_another_run_is_refused_with_a_table(key: str) -> None:
    with links(HELLO, HELLO, {**HELLO, key: "other"}) as (a, b, joiner):
        a.send(b.id, {"n": 1})
        take(b, 1)
        joiner.send(address(a), {"let": "me in"})
        (there,), (here,) = until(joiner.refused, 1.0), until(a.refused, 1.0)
        assert isinstance(there, Refusal) and there.who == a.id and here.who == joiner.id
        assert there.differences == ((key, "other", HELLO[key]),)
        assert here.differences == ((key, HELLO[key], "other"),)
        head, row = there.table.splitlines()
        assert head.split() == ["here", "there"] and row.split() == [key, "other", HELLO[key]]
        assert row.index("other") == head.index("here")
        a.send(b.id, {"n": 2})  # the others go on
        assert take(b, 1) == [(a.id, {"n": 2})]
        assert a.receive() == []


def test_what_is_a_difference() -> None:
    ours, theirs = {"a": (1, 2), "b": 1, "c": None, "about.x": 1}, {"a": [1, 2], "b": True, "d": 3}
    assert differences(ours, theirs) == [("b", 1, True), ("d", None, 3)]
    assert table([]) == ""
    assert "\x1b" not in table([("k", "\x1b[2J", "v" * 500)])
    assert len(table([("k", "\x1b[2J", "v" * 500)])) < 300


def test_a_process_that_took_the_address_of_another_gets_none_of_its_messages() -> None:
    with links(HELLO, HELLO) as (a, b):
        old, where = b.id, address(b)
        b.close()
        c = Link.open(where, SECRET, HELLO)
        try:
            a.send(old, {"for": "the old one"})
            assert until(a.lost) == [old]
            a.send(where, {"for": "whoever"})
            assert take(c, 1) == [(a.id, {"for": "whoever"})]
        finally:
            c.close()


# ---- frames ----


def pair() -> tuple[Sealer, Opener]:
    sealer, opener = Sealer(), Opener()
    sealer.use(b"k" * 32)
    opener.use(b"k" * 32)
    return sealer, opener


def opened(opener: Opener, data: bytes) -> list[bytes]:
    opener.feed(data)
    found = []
    while (body := opener.next()) is not None:
        found.append(body)
    return found


def test_frames_open_however_the_bytes_are_cut() -> None:
    sealer, opener = pair()
    bodies = [pack({"n": n}) for n in range(20)]
    stream = b"".join(map(sealer.seal, bodies))
    found = [body for i in range(len(stream)) for body in opened(opener, stream[i : i + 1])]
    assert found == bodies and not opener.partial


def test_a_flipped_bit_anywhere_is_refused_at_once() -> None:
    frame = pair()[0].seal(pack({"commit": 17, "members": ["a", "b"]}))
    for place in range(len(frame)):
        for bit in range(8):
            wrong = bytearray(frame)
            wrong[place] ^= 1 << bit
            with pytest.raises(BrokenFrame):
                opened(pair()[1], bytes(wrong))


def test_replayed_moved_and_left_out_frames_are_refused() -> None:
    sealer = pair()[0]
    one, two, three = (sealer.seal(pack({"n": n})) for n in range(3))
    for stream in (one + one, two + one, one + three, two, one + two + three + one):
        with pytest.raises(BrokenFrame):
            opened(pair()[1], stream)
    other = Opener()
    other.use(b"o" * 32)
    with pytest.raises(BrokenFrame):
        opened(other, one)


@pytest.mark.parametrize(
    "body",
    [b"[" * 60_000, b"[]", b"{", b"\xff\xfe", b'{"a":NaN}', b'{"a":' + b"9" * 5000 + b"}", b""],
)
def test_hostile_json_is_a_broken_frame(body: bytes) -> None:
    with pytest.raises(BrokenFrame):
        unpack(body)


def dialogue(change: Callable[[int, bytes], bytes]) -> tuple[Handshake, Handshake]:
    """Both sides of a handshake, the bytes of each turn changed on the way."""
    acceptor = Handshake(SECRET, "127.0.0.1:1#00000001", HELLO, dials=False)
    dialler = Handshake(SECRET, "127.0.0.1:2#00000002", HELLO, dials=True)
    said, sides = acceptor.first(), (dialler, acceptor)
    for turn in range(4):
        side = sides[turn % 2]
        side.opener.feed(change(turn, said))
        said = b""
        while (body := side.opener.next()) is not None:
            said += side.take(body)
    return acceptor, dialler


def test_a_handshake_with_any_bit_flipped_comes_to_nothing() -> None:
    lengths: dict[int, int] = {}

    def count(turn: int, said: bytes) -> bytes:
        lengths[turn] = len(said)
        return said

    assert all(side.done for side in dialogue(count))
    for at, length in lengths.items():
        for place in range(length):

            def flip(turn: int, said: bytes, at: int = at, place: int = place) -> bytes:
                flipped = bytearray(said)
                if turn == at and said:
                    flipped[place] ^= 1 << place % 8
                return bytes(flipped)

            try:
                acceptor, dialler = dialogue(flip)
            except (BrokenFrame, Refused):
                continue
            assert not acceptor.done, f"byte {place} of turn {at}"
            assert not (dialler.done and at < 3), f"byte {place} of turn {at}"


@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_garbage_ends_a_handshake_and_nothing_else(data: bytes, dials: bool, framed: bool) -> None:
    side = Handshake(SECRET, "127.0.0.1:1#00000001", HELLO, dials=dials)
    side.first()
    try:
        for body in opened(side.opener, Sealer().seal(data) if framed else data):
            side.take(body)
    except (BrokenFrame, Refused):
        pass
    assert not side.proven


# ---- strangers ----


def ended(stranger: socket.socket, within_s: float) -> float:
    """Seconds until the other side hangs up."""
    began = time.monotonic()
    stranger.settimeout(within_s)
    try:
        while stranger.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - began


def plain(message: dict[str, Any]) -> bytes:
    return Sealer().seal(pack(message))


def enter(stranger: socket.socket, talk: Handshake) -> list[bytes]:
    """Does the handshake as the dialler; returns what was said."""
    said = []
    while not talk.done:
        talk.opener.feed(stranger.recv(1 << 16))
        while (body := talk.opener.next()) is not None:
            said.append(talk.take(body))
            stranger.sendall(said[-1])
    return said


@pytest.mark.parametrize(
    "body",
    [b"[" * 200_000, b"{}" * 2, b'"text"', b"x" * ((8 << 20) + 1), b'{"a":"\\ud800"}'],
    ids=["deep", "two", "no object", "too long", "surrogate"],
)
def test_even_who_knows_the_secret_cannot_break_the_link(body: bytes) -> None:
    with links(HELLO, HELLO) as (a, b), dialled(a) as stranger:
        talk = Handshake(SECRET, "127.0.0.1:9#00000000", HELLO, dials=True)
        enter(stranger, talk)
        frame = talk.sealer.seal(body)
        stranger.sendall(frame[: 1 << 20])
        if b"ud800" in body:
            assert take(a, 1)[0][1] == {"a": "\ud800"}
        else:
            assert ended(stranger, 2.0) < 0.9
            assert a.counted()["broken"] == 1 and until(a.refused)[0].who == talk._own_id
        b.send(a.id, {"n": 1})
        assert take(a, 1) == [(b.id, {"n": 1})]


def test_who_skips_the_proof_is_refused() -> None:
    card = {"link": 1, "id": "127.0.0.1:9#00000000", "nonce": "0" * 64}
    tries = [
        plain({"n": 1}),
        plain(card),
        plain({**card, "proof": ""}),
        plain({**card, "proof": 7}),
        plain({**card, "proof": "\ud800" * 64}),
        plain({**card, "link": "\ud800\x1b"}),
        plain({**card, "refused": []}),
        plain({**card, "proof": "0" * 64}) + plain({"n": 1}),
        plain({**card, "link": 0}),
        plain({**card, "id": "nowhere#00000000", "proof": "0" * 64}),
        plain(HELLO) + plain({"n": 1}),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        (1 << 20).to_bytes(4, "big") + b"{",
        (64 * 1024).to_bytes(4, "big") + b"[" * (64 * 1024),
    ]
    with links(HELLO) as (a,):
        for data in tries:
            with dialled(a) as stranger:
                stranger.sendall(data)
                assert ended(stranger, 2.0) < 0.9, data[:80]
        assert a.receive() == [] and a.counted()["refused"] == len(tries)
        assert {refusal.who for refusal in a.refused()} == {"127.0.0.1"}


def test_a_false_acceptor_is_refused() -> None:
    """Whoever took the address of a host cannot pass for it, nor use our proof elsewhere."""
    with links(HELLO) as (a,), socket.create_server(("127.0.0.1", 0)) as false:
        false.settimeout(3)
        shown = f"127.0.0.1:{false.getsockname()[1]}"
        a.send(shown, {"n": 1})
        caught, _ = false.accept()
        with caught:
            talk = Handshake(OTHER, shown + "#00000000", HELLO, dials=False)
            caught.sendall(talk.first())
            card = unpack(opened(Opener(), caught.recv(1 << 16))[0])
            caught.sendall(plain({"proof": card["proof"]}))
            assert ended(caught, 2.0) < 0.9
        assert "secret" in until(a.refused)[0].why


def test_a_recorded_dialogue_is_of_no_use() -> None:
    """All that a genuine dialler said, said again, word for word."""
    said: list[bytes] = []
    with links(HELLO) as (a,):
        for again in (False, True):
            with dialled(a) as stranger:
                talk = Handshake(SECRET, "127.0.0.1:9#00000000", HELLO, dials=True)
                if again:
                    stranger.sendall(b"".join(said))
                    assert ended(stranger, 2.0) < 0.9
                    break
                said += enter(stranger, talk)
                said.append(talk.sealer.seal(pack({"n": 1})))
                stranger.sendall(said[-1])
                assert take(a, 1)[0][1] == {"n": 1}
        assert a.receive() == []
        assert "secret" in until(a.refused)[0].why


@pytest.mark.parametrize("how", ["silent", "slow"])
def test_who_says_nothing_or_too_slowly_is_dropped(how: str) -> None:
    with links(HELLO) as (a,), dialled(a) as stranger:
        stranger.settimeout(0.05)
        letters = iter(b"\0\0\x40\0" + b" " * 100)
        began = time.monotonic()
        while time.monotonic() - began < 5:
            try:
                if how == "slow":
                    stranger.send(bytes([next(letters)]))
                if not stranger.recv(1 << 10):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert 0.5 < time.monotonic() - began < 3
        assert until(a.refused)


def test_traffic_goes_on_among_garbage() -> None:
    with links(HELLO, HELLO) as (a, b), ExitStack() as stack:
        for number in range(200):
            stranger = stack.enter_context(dialled(b))
            if number % 2:
                stranger.sendall(os.urandom(64))
            a.send(b.id, {"n": number})
        assert [m["n"] for _, m in take(b, 200)] == list(range(200))
        with links(HELLO) as (c,):  # a newcomer gets in, though strangers hold all places
            c.send(address(b), {"n": 0})
            assert take(b, 1) == [(c.id, {"n": 0})]
        assert b.counted()["crowded out"] > 0 and a.lost() == []
        assert len(b.refused()) < 10


# ---- ends ----

PEER = """
import select, sys
from cordee.fault.link import Link
link = Link.open("127.0.0.1:0", b"s" * 32, {hello!r})
print(link.id, flush=True)
while True:
    select.select([link], [], [])
    for sender, message in link.receive():
        link.send(sender, message)
"""


@contextmanager
def echo() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that returns what it gets, and its id."""
    code = PEER.replace("{hello!r}", repr(HELLO))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as made:
        assert made.stdout is not None
        try:
            yield made, made.stdout.readline().strip()
        finally:
            made.kill()


def test_a_killed_peer_is_lost_without_asking() -> None:
    with links(HELLO) as (a,), echo() as (peer, name):
        a.send(name, {"n": 1})
        assert take(a, 1) == [(name, {"n": 1})]
        peer.kill()
        assert select.select([a], [], [], 30)[0]
        assert a.lost() == [name] and a.lost() == []
        a.send(name, {"n": 2})
        assert until(a.lost) == [name]
        assert a.local_ip(name) is None and a.receive() == []


def test_a_peer_that_only_dialled_us_is_lost_as_well() -> None:
    with links(HELLO, HELLO) as (a, b):
        b.send(a.id, {"n": 1})
        take(a, 1)
        b.close()
        assert until(a.lost, 1.0) == [b.id]


def test_a_stopped_peer_is_silent_not_lost() -> None:
    with links(HELLO) as (a,), echo() as (peer, name):
        a.send(name, {"n": 1})
        take(a, 1)
        peer.send_signal(signal.SIGSTOP)
        a.send(name, {"n": 2})
        time.sleep(0.3)
        assert a.lost() == [] and a.receive() == []
        peer.send_signal(signal.SIGCONT)
        assert take(a, 1) == [(name, {"n": 2})]


def test_an_address_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
    with links(HELLO) as (a,):
        for _ in range(3):
            a.send(nobody, {"n": 1})
            assert until(a.lost, 1.0) == [nobody]
        a.send(a.id, {"to": "myself"})
        a.send("no-such-host.invalid:9", {"n": 1})
        assert "does not resolve" in until(a.refused, 20)[0].why
        assert a.receive() == []


def test_round_trips_between_two_processes() -> None:
    with links(HELLO) as (a,), echo() as (_, name):
        for number in range(300):
            a.send(name, {"n": number})
            assert take(a, 1) == [(name, {"n": number})]


# ---- opening ----


def test_a_taken_port_and_foreign_addresses_are_refused_with_a_fix() -> None:
    with links(HELLO) as (a,):
        with pytest.raises(ConfigError, match="taken") as caught:
            Link.open(address(a), SECRET, HELLO)
        assert caught.value.fix is not None
        Link.open(caught.value.fix, SECRET, HELLO).close()
    for bind, why in [
        ("192.0.2.7:0", "not an address of this machine"),
        ("0.0.0.0:0", "cannot dial"),
        ("127.0.0.1", "not HOST:PORT"),
        ("::1:5", "not HOST:PORT"),
        ("127.0.0.1:99999", "not HOST:PORT"),
        ("no-such-host.invalid:0", "does not resolve"),
    ]:
        with pytest.raises(ConfigError, match=why):
            Link.open(bind, SECRET, HELLO)
    with pytest.raises(ConfigError, match="too long"):
        Link.open("127.0.0.1:0", SECRET, {"digest": "x" * 70_000})
    with pytest.raises(ConfigError, match="too short"):
        Link.open("127.0.0.1:0", b"short", HELLO)


def test_advertised_and_ipv6_addresses() -> None:
    wide = Link.open("0.0.0.0:0", SECRET, HELLO, advertise="localhost:0")
    try:
        assert wide.id.startswith("localhost:")
        with links(HELLO) as (a,):
            a.send(wide.id, {"n": 1})
            assert take(wide, 1) == [(a.id, {"n": 1})]
    finally:
        wide.close()
    try:
        six = Link.open("[::1]:0", SECRET, HELLO)
    except ConfigError:
        pytest.skip("this machine has no IPv6 loopback")
    with links(HELLO) as (a,):
        a.send(six.id, {"n": 1})
        assert six.id.startswith("[::1]:") and take(six, 1) == [(a.id, {"n": 1})]
        assert a.local_ip(six.id) == "::1"
    six.close()


def test_closing_sends_the_last_words_and_leaves_nothing() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with links(HELLO, HELLO) as (a, b):
        a.send(b.id, {"n": 0})
        take(b, 1)
        for number in range(1000):
            a.send(b.id, {"n": number})
        a.close()
        assert len(take(b, 1000)) == 1000
        a.send(b.id, {"n": 1})
        a.close()
    assert set(os.listdir("/proc/self/fd")) == before


# ---- the secret ----


def test_secret_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    made = make_secret(path)
    assert len(made) == 64 and path.stat().st_mode & 0o777 == 0o600
    assert make_secret(path) == read_secret(path) == made
    path.chmod(0o400)
    assert read_secret(path) == made
    for mode in (0o640, 0o604, 0o620, 0o700, 0o644):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            read_secret(path)
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    for wrong, why in [
        (link, "symbolic link"),
        (tmp_path, "regular file"),
        (tmp_path / "none", "cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=why):
            read_secret(wrong)
    with pytest.raises(ConfigError, match="symbolic link"):
        make_secret(link)
    for text in (b"short", b" \n" * 40, b"x" * 4097, b"x" * 9000):
        path.write_bytes(text)
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
