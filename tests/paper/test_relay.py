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
from cordee.elastic.transport import Transport
from tests.paper.test_link import HELLO, SECRET, wait_until

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def relayed_transports() -> Iterator[tuple[Transport, Transport, Relay]]:
    """Two links; whoever dials the second goes through the relay, and the first is dialled by
    nobody: it says an address where nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent_server:
        silent_server.settimeout(0)
        port = silent_server.getsockname()[1]
        with socket.create_server(("127.0.0.1", 0)) as port_server:
            inner_address = f"127.0.0.1:{port_server.getsockname()[1]}"
        with Relay(inner_address) as relay:
            b = Transport.open(inner_address, SECRET, HELLO, advertise_address=relay.address)
            a = Transport.open("127.0.0.1:0", SECRET, HELLO, advertise_address=f"127.0.0.1:{port}")
            try:
                yield a, b, relay
            finally:
                a.close()
                b.close()


def exchange_heartbeats(a: Transport, b: Transport, within_s: float = 8.0) -> None:
    """Beats from both sides until each has heard a beat that was sent after this began."""
    marker = time.monotonic()
    senders: set[str] = set()
    end_s = time.monotonic() + within_s
    while len(senders) < 2:
        assert time.monotonic() < end_s, f"{senders} within {within_s} s"
        a.send(b.id, {"word": marker})
        b.send(a.id, {"word": marker})
        time.sleep(0.02)
        for transport in (a, b):
            senders |= {
                sender for sender, message in transport.receive() if message.get("word") == marker
            }


def test_a_good_network_carries_both_ways() -> None:
    with relayed_transports() as (a, b, relay):
        exchange_heartbeats(a, b)
        text = "x" * (1 << 20)
        a.send(b.id, {"text": text})
        assert wait_until(b.receive)[-1][1] == {"text": text}
        assert relay.connection_count == 1


@pytest.mark.parametrize("directions", [(FORWARD,), (BACK,), (FORWARD, BACK)], ids="+".join)
def test_a_partition_is_silence_and_heals(directions: tuple[str, ...]) -> None:
    with relayed_transports() as (a, b, relay):
        exchange_heartbeats(a, b)
        relay.blackhole(*directions)
        a.receive(), b.receive()
        for _ in range(20):
            a.send(b.id, {"n": 1})
            b.send(a.id, {"n": 1})
            time.sleep(0.01)
        assert bool(a.receive()) == (BACK not in directions)
        assert bool(b.receive()) == (FORWARD not in directions)
        assert a.take_lost_peers() == b.take_lost_peers() == []
        relay.heal()
        exchange_heartbeats(a, b)
        assert a.take_lost_peers() == b.take_lost_peers() == []


def test_nobody_gets_in_while_the_network_is_cut_and_everybody_afterwards() -> None:
    with relayed_transports() as (a, b, relay):
        relay.blackhole()
        start_s = time.monotonic()
        while time.monotonic() - start_s < 2.5:
            a.send(b.id, {"n": 1})
            time.sleep(0.05)
        assert b.receive() == [] and a.take_lost_peers() == []
        relay.heal()
        exchange_heartbeats(a, b)


def test_a_reset_in_the_middle_is_no_death() -> None:
    with relayed_transports() as (a, b, relay):
        for _ in range(10):
            exchange_heartbeats(a, b)
            relay.reset()
        exchange_heartbeats(a, b)
        time.sleep(0.1)
        assert a.take_lost_peers() == b.take_lost_peers() == []


@pytest.mark.parametrize("direction", [FORWARD, BACK])
def test_a_bit_flipped_on_the_way_is_caught_and_the_link_goes_on(direction: str) -> None:
    """No message is ever wrong. A bit of a message breaks its connection; one of the transport's
    frame around it (its first ten bytes) may do no harm, or hold the frame until a ping is missed.
    """
    with relayed_transports() as (a, b, relay):
        exchange_heartbeats(a, b)
        receiver = b if direction == FORWARD else a
        for offset in (0, 1, 2, 5, 8, 30, 60):
            broken_count = receiver.error_counts().get("broken", 0)
            relay.flip(offset, direction, bit=offset % 8)
            for _ in range(20):
                a.send(b.id, {"n": "x" * 20})
                b.send(a.id, {"n": "x" * 20})
            if offset >= 30:
                wait_until(
                    lambda broken_count=broken_count: (
                        receiver.error_counts().get("broken", 0) > broken_count
                    )
                )
            for transport in (a, b):
                assert all(
                    message.get("n", "x" * 20) == "x" * 20 for _, message in transport.receive()
                )
            exchange_heartbeats(a, b)
        assert a.take_lost_peers() == b.take_lost_peers() == []


def test_delay_jitter_and_rate() -> None:
    with relayed_transports() as (a, b, relay):
        exchange_heartbeats(a, b)
        b.receive()
        relay.delay_s, relay.jitter_s = 0.2, 0.05
        time.sleep(0.1)
        b.receive()
        start_s = time.monotonic()
        for number in range(100):
            a.send(b.id, {"n": number})
        numbers: list[int] = []
        while len(numbers) < 100:
            numbers += [message["n"] for _, message in wait_until(b.receive)]
        assert time.monotonic() - start_s > 0.2 and numbers == list(range(100))
        relay.heal()
        relay.rate_bytes_s = 2e6
        start_s = time.monotonic()
        a.send(b.id, {"text": "x" * (1 << 20)})
        wait_until(b.receive)
        assert time.monotonic() - start_s > 0.3


def test_a_far_peer_gets_in() -> None:
    with relayed_transports() as (a, b, relay):
        relay.delay_s = 0.2
        a.send(b.id, {"n": 1})
        assert wait_until(b.receive) == [(a.id, {"n": 1})]


def test_the_command() -> None:
    command = [sys.executable, "-m", "benchmarks.relay"]
    help_result = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert help_result.returncode == 0 and "example" in help_result.stdout
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        target = f"127.0.0.1:{server.getsockname()[1]}"
        command_line = [*command, "--to", target, "--flip", "1"]
        with subprocess.Popen(
            command_line, cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as relay_process:
            assert relay_process.stdout is not None
            try:
                host, port = relay_process.stdout.readline().strip().rsplit(":", 1)
                with socket.create_connection((host, int(port)), timeout=5) as client:
                    connection, _ = server.accept()
                    with connection:
                        client.sendall(b"abc")
                        assert connection.recv(10) == b"acc"
                        connection.sendall(b"abc")
                        assert client.recv(10) == b"abc"
            finally:
                relay_process.kill()
