"""Bad networks between two links: late, cut in one or both directions, reset, one bit wrong."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.relay import BACK, FORWARD, Relay
from cordee.fault.link import Link
from tests.paper.test_link import HELLO, SECRET, until

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def apart() -> Iterator[tuple[Link, Link, Relay]]:
    """Two links; whoever dials the second goes through the relay, and the first is dialled by
    nobody: it says an address where nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        held.settimeout(0)
        port = held.getsockname()[1]
        with socket.create_server(("127.0.0.1", 0)) as chosen:
            inner = f"127.0.0.1:{chosen.getsockname()[1]}"
        with Relay(inner) as relay:
            b = Link.open(inner, SECRET, HELLO, advertise=relay.address)
            a = Link.open("127.0.0.1:0", SECRET, HELLO, advertise=f"127.0.0.1:{port}")
            try:
                yield a, b, relay
            finally:
                a.close()
                b.close()


def talk(a: Link, b: Link, within_s: float = 8.0) -> None:
    """Beats from both sides until each has heard a beat that was sent after this began."""
    word = time.monotonic()
    heard: set[str] = set()
    end = time.monotonic() + within_s
    while len(heard) < 2:
        assert time.monotonic() < end, f"{heard} within {within_s} s"
        a.send(b.id, {"word": word})
        b.send(a.id, {"word": word})
        time.sleep(0.02)
        for link in (a, b):
            heard |= {sender for sender, message in link.receive() if message.get("word") == word}


def test_a_good_network_carries_both_ways() -> None:
    with apart() as (a, b, relay):
        talk(a, b)
        text = "x" * (1 << 20)
        a.send(b.id, {"text": text})
        assert until(b.receive)[-1][1] == {"text": text}
        assert relay.connections == 1


@pytest.mark.parametrize("ways", [(FORWARD,), (BACK,), (FORWARD, BACK)], ids="+".join)
def test_a_partition_is_silence_and_heals(ways: tuple[str, ...]) -> None:
    with apart() as (a, b, relay):
        talk(a, b)
        relay.blackhole(*ways)
        a.receive(), b.receive()
        for _ in range(20):
            a.send(b.id, {"n": 1})
            b.send(a.id, {"n": 1})
            time.sleep(0.01)
        assert bool(a.receive()) == (BACK not in ways)
        assert bool(b.receive()) == (FORWARD not in ways)
        assert a.lost() == b.lost() == []
        relay.heal()
        talk(a, b)
        assert a.lost() == b.lost() == []


def test_nobody_gets_in_while_the_network_is_cut_and_everybody_afterwards() -> None:
    with apart() as (a, b, relay):
        relay.blackhole()
        began = time.monotonic()
        while time.monotonic() - began < 2.5:
            a.send(b.id, {"n": 1})
            time.sleep(0.05)
        assert b.receive() == [] and a.lost() == []
        relay.heal()
        talk(a, b)


def test_a_reset_in_the_middle_is_no_death() -> None:
    with apart() as (a, b, relay):
        for _ in range(10):
            talk(a, b)
            relay.reset()
        talk(a, b)
        time.sleep(0.1)
        assert a.lost() == b.lost() == []


@pytest.mark.parametrize("way", [FORWARD, BACK])
def test_a_bit_flipped_on_the_way_is_caught_and_the_link_goes_on(way: str) -> None:
    with apart() as (a, b, relay):
        talk(a, b)
        for nth in (0, 5, 30, 100):
            there = b if way == FORWARD else a
            before = there.counted().get("broken", 0)
            relay.flip(nth, way, bit=nth % 8)
            for _ in range(20):
                a.send(b.id, {"n": "x" * 20})
                b.send(a.id, {"n": "x" * 20})
            until(lambda there=there, before=before: there.counted().get("broken", 0) > before)
            for link in (a, b):
                assert all(message.get("n", "x" * 20) == "x" * 20 for _, message in link.receive())
            talk(a, b)
        assert a.lost() == b.lost() == []


def test_delay_jitter_and_rate() -> None:
    with apart() as (a, b, relay):
        talk(a, b)
        b.receive()
        relay.delay_s, relay.jitter_s = 0.2, 0.05
        time.sleep(0.1)
        b.receive()
        began = time.monotonic()
        for number in range(100):
            a.send(b.id, {"n": number})
        got: list[int] = []
        while len(got) < 100:
            got += [message["n"] for _, message in until(b.receive)]
        assert time.monotonic() - began > 0.2 and got == list(range(100))
        relay.heal()
        relay.rate_bytes_s = 2e6
        began = time.monotonic()
        a.send(b.id, {"text": "x" * (1 << 20)})
        until(b.receive)
        assert time.monotonic() - began > 0.3


def test_a_far_peer_gets_in() -> None:
    with apart() as (a, b, relay):
        relay.delay_s = 0.2
        a.send(b.id, {"n": 1})
        assert until(b.receive) == [(a.id, {"n": 1})]


def test_the_command() -> None:
    command = [sys.executable, "-m", "benchmarks.relay"]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "example" in shown.stdout
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        to = f"127.0.0.1:{server.getsockname()[1]}"
        args = [*command, "--to", to, "--flip", "1"]
        with subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, text=True) as relay:
            assert relay.stdout is not None
            try:
                host, port = relay.stdout.readline().strip().rsplit(":", 1)
                with socket.create_connection((host, int(port)), timeout=5) as near:
                    far, _ = server.accept()
                    with far:
                        near.sendall(b"abc")
                        assert far.recv(10) == b"acc"
                        far.sendall(b"abc")
                        assert near.recv(10) == b"abc"
            finally:
                relay.kill()
