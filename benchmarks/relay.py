"""A TCP relay that makes a network bad: late, slow, cut, deaf in one direction, wrong in one bit.

    python -m benchmarks.relay --to HOST:PORT [--listen 127.0.0.1:0] [--delay S] [--jitter S]
                               [--rate BYTES_S] [--deaf forward|back|both] [--flip N]
                               [--reset-after S] [--heal-after S]

For drills, without root. Whoever dials the relay's address reaches `to`; *forward* is from who
dialled to `to`, *back* is the other way. Not here: lost or reordered packets (TCP hides them as
delay). Traded away: speed; one thread carries everything.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from types import TracebackType

FORWARD, BACK = "forward", "back"
CHUNK_BYTES, MAX_CHUNKS = 64 << 10, 64


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT"; IPv6 in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


@dataclass(eq=False)
class ConnectionPair:
    """One connection on both sides of the relay; `has_swallowed_end` says that an end was
    swallowed."""

    client_writer: asyncio.StreamWriter
    server_writer: asyncio.StreamWriter | None = None
    has_swallowed_end: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def reset(self) -> None:
        """Ends both sides at once, as a reset, not as an orderly end."""
        for writer in (self.client_writer, self.server_writer):
            if writer is not None:
                peer_socket = writer.get_extra_info("socket")
                if peer_socket is not None and peer_socket.fileno() >= 0:
                    linger = struct.pack("ii", 1, 0)
                    peer_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()


class Relay:
    """A relay in a thread of its own, as a context. Settings may be changed at any time, by any
    thread: `delay_s`, `jitter_s` (uniform, order is kept), `rate_bytes_s` (each direction of each
    connection; 0 is no limit)."""

    def __init__(self, target: str, listen: str = "127.0.0.1:0", seed: int = 0) -> None:
        self.delay_s = self.jitter_s = self.rate_bytes_s = 0.0
        self.address = ""
        self._target, self._listen = target, listen
        self._random = Random(seed)
        self._dropped_directions: frozenset[str] = frozenset()
        self._bit_flips: dict[str, tuple[int, int]] = {}
        self._pairs: set[ConnectionPair] = set()
        self._loop = asyncio.new_event_loop()
        self._ready_event = threading.Event()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._run_loop, name="relay", daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        self._ready_event.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # ---- faults ----

    def blackhole(self, *directions: str) -> None:
        """Swallows all bytes, and ends, in these directions (default: both); nobody is told."""
        self._run_in_loop(
            partial(setattr, self, "_dropped_directions", frozenset(directions or (FORWARD, BACK)))
        )

    def flip(self, offset: int, direction: str = FORWARD, bit: int = 0) -> None:
        """Flips a bit in the nth byte (from 0, from now on) that goes this way, once."""
        self._run_in_loop(partial(self._bit_flips.__setitem__, direction, (offset, bit)))

    def reset(self) -> None:
        """Resets every connection that there is; new ones are carried."""
        self._run_in_loop(self._reset)

    def heal(self) -> None:
        """A good network from now on. Connections whose end was swallowed are reset."""
        self._run_in_loop(self._heal)

    @property
    def connection_count(self) -> int:
        """How many there are."""
        return len(self._pairs)

    def _run_in_loop(self, action: Callable[[], object]) -> None:
        """Does something in the relay's thread, and waits until it is done."""
        completion = threading.Event()

        def run_action() -> None:
            action()
            completion.set()

        self._loop.call_soon_threadsafe(run_action)
        completion.wait(5)

    def _reset(self) -> None:
        for pair in list(self._pairs):
            pair.reset()

    def _heal(self) -> None:
        self.delay_s = self.jitter_s = self.rate_bytes_s = 0.0
        self._dropped_directions = frozenset()
        self._bit_flips.clear()
        for pair in list(self._pairs):
            if pair.has_swallowed_end:
                pair.reset()

    # ---- carrying ----

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            host, port = parse_address(self._listen)
            server_start = asyncio.start_server(self._relay_connection, host, port)
            server = self._loop.run_until_complete(server_start)
            host, port = server.sockets[0].getsockname()[:2]
            self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        except OSError as cause:
            self._failure = cause
            return
        finally:
            self._ready_event.set()
        self._loop.run_forever()
        server.close()
        self._reset()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _relay_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        pair = ConnectionPair(writer)
        self._pairs.add(pair)
        try:
            try:
                server_reader, pair.server_writer = await asyncio.open_connection(
                    *parse_address(self._target)
                )
            except OSError:
                while self._dropped_directions:  # a cut network does not tell that nobody listens
                    await asyncio.sleep(0.01)
                pair.reset()
                return
            for side in (writer, pair.server_writer):
                peer_socket = side.get_extra_info("socket")
                peer_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            routes = ((reader, pair.server_writer, FORWARD), (server_reader, writer, BACK))
            await asyncio.gather(*(self._forward(pair, *route) for route in routes))
        except OSError:
            pair.reset()
        finally:
            self._pairs.discard(pair)
            for side in (writer, pair.server_writer):
                if side is not None:
                    side.close()

    async def _forward(
        self,
        pair: ConnectionPair,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        direction: str,
    ) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_CHUNKS)
        write_task = asyncio.ensure_future(self._write_chunks(pair, queue, writer, direction))
        try:
            while True:
                try:
                    data = await reader.read(CHUNK_BYTES)
                except OSError:
                    if direction not in self._dropped_directions:
                        raise
                    data = b""
                if direction in self._dropped_directions:
                    if data:
                        continue
                    pair.has_swallowed_end = True
                    return
                due_s = time.monotonic() + self.delay_s + self.jitter_s * self._random.random()
                await queue.put((due_s, self._apply_flip(data, direction)))
                if not data:
                    await write_task
                    return
        finally:
            if pair.has_swallowed_end:
                # Held as it is: only healing, or the relay's end, ends it.
                while direction in self._dropped_directions:
                    await asyncio.sleep(0.01)
            write_task.cancel()

    async def _write_chunks(
        self,
        pair: ConnectionPair,
        queue: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
        direction: str,
    ) -> None:
        while True:
            due_s, data = await queue.get()
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            if direction in self._dropped_directions:
                pair.has_swallowed_end |= not data
                continue
            if not data:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            writer.write(data)
            try:
                await writer.drain()
            except OSError:
                pair.reset()
                return
            if self.rate_bytes_s:
                await asyncio.sleep(len(data) / self.rate_bytes_s)

    def _apply_flip(self, data: bytes, direction: str) -> bytes:
        if direction not in self._bit_flips or not data:
            return data
        offset, bit = self._bit_flips[direction]
        if offset >= len(data):
            self._bit_flips[direction] = (offset - len(data), bit)
            return data
        del self._bit_flips[direction]
        return data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :]


def main() -> None:
    """Prints the relay's address and carries until it is interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.relay",
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="example: python -m benchmarks.relay --to 127.0.0.1:29500 --deaf back --flip 100",
    )
    parser.add_argument("--to", required=True, help="HOST:PORT that is reached through the relay")
    parser.add_argument("--listen", default="127.0.0.1:0", help="HOST:PORT that others dial")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds each way")
    parser.add_argument("--jitter", type=float, default=0.0, help="most seconds more, at random")
    parser.add_argument("--rate", type=float, default=0.0, help="bytes a second each way")
    parser.add_argument("--deaf", choices=[FORWARD, BACK, "both"], help="swallow this direction")
    parser.add_argument("--flip", type=int, help="flip a bit in the Nth byte forward")
    parser.add_argument("--reset-after", type=float, help="seconds until all is reset, once")
    parser.add_argument("--heal-after", type=float, help="seconds until the network is good")
    parser.add_argument("--seed", type=int, default=0, help="of the jitter")
    args = parser.parse_args()
    with Relay(args.to, args.listen, args.seed) as relay:
        relay.delay_s, relay.jitter_s, relay.rate_bytes_s = args.delay, args.jitter, args.rate
        if args.deaf:
            relay.blackhole(*((FORWARD, BACK) if args.deaf == "both" else (args.deaf,)))
        if args.flip is not None:
            relay.flip(args.flip)
        print(relay.address, flush=True)
        schedule = [(args.reset_after, relay.reset), (args.heal_after, relay.heal)]
        start_s = time.monotonic()
        for after_s, action in sorted(
            (entry for entry in schedule if entry[0] is not None), key=lambda entry: entry[0]
        ):
            time.sleep(max(0.0, start_s + after_s - time.monotonic()))
            action()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
