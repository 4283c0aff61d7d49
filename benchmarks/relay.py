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
CHUNK_BYTES, CHUNKS = 64 << 10, 64


def split(address: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT"; IPv6 in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


@dataclass(eq=False)
class Pair:
    """One connection on both sides of the relay; `owed` says that an end was swallowed."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter | None = None
    owed: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def reset(self) -> None:
        """Ends both sides at once, as a reset, not as an orderly end."""
        for side in (self.near, self.far):
            if side is not None:
                made = side.get_extra_info("socket")
                if made is not None and made.fileno() >= 0:
                    linger = struct.pack("ii", 1, 0)
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                side.transport.abort()


class Relay:
    """A relay in a thread of its own, as a context. Settings may be changed at any time, by any
    thread: `delay_s`, `jitter_s` (uniform, order is kept), `rate_bytes_s` (each direction of each
    connection; 0 is no limit)."""

    def __init__(self, to: str, listen: str = "127.0.0.1:0", seed: int = 0) -> None:
        self.delay_s = self.jitter_s = self.rate_bytes_s = 0.0
        self.address = ""
        self._to, self._listen = to, listen
        self._random = Random(seed)
        self._deaf: frozenset[str] = frozenset()
        self._flips: dict[str, tuple[int, int]] = {}
        self._pairs: set[Pair] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # ---- faults ----

    def blackhole(self, *ways: str) -> None:
        """Swallows all bytes, and ends, in these directions (default: both); nobody is told."""
        self._do(partial(setattr, self, "_deaf", frozenset(ways or (FORWARD, BACK))))

    def flip(self, nth: int, way: str = FORWARD, bit: int = 0) -> None:
        """Flips a bit in the nth byte (from 0, from now on) that goes this way, once."""
        self._do(partial(self._flips.__setitem__, way, (nth, bit)))

    def reset(self) -> None:
        """Resets every connection that there is; new ones are carried."""
        self._do(self._reset)

    def heal(self) -> None:
        """A good network from now on. Connections whose end was swallowed are reset."""
        self._do(self._heal)

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._pairs)

    def _do(self, what: Callable[[], object]) -> None:
        """Does something in the relay's thread, and waits until it is done."""
        done = threading.Event()

        def call() -> None:
            what()
            done.set()

        self._loop.call_soon_threadsafe(call)
        done.wait(5)

    def _reset(self) -> None:
        for pair in list(self._pairs):
            pair.reset()

    def _heal(self) -> None:
        self.delay_s = self.jitter_s = self.rate_bytes_s = 0.0
        self._deaf = frozenset()
        self._flips.clear()
        for pair in list(self._pairs):
            if pair.owed:
                pair.reset()

    # ---- carrying ----

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            host, port = split(self._listen)
            starting = asyncio.start_server(self._carry, host, port)
            server = self._loop.run_until_complete(starting)
            host, port = server.sockets[0].getsockname()[:2]
            self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        except OSError as cause:
            self._failure = cause
            return
        finally:
            self._ready.set()
        self._loop.run_forever()
        server.close()
        self._reset()
        rest = asyncio.all_tasks(self._loop)
        for task in rest:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        self._loop.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = Pair(writer)
        self._pairs.add(pair)
        try:
            try:
                other, pair.far = await asyncio.open_connection(*split(self._to))
            except OSError:
                while self._deaf:  # a cut network does not tell that nobody listens
                    await asyncio.sleep(0.01)
                pair.reset()
                return
            for side in (writer, pair.far):
                made = side.get_extra_info("socket")
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ways = ((reader, pair.far, FORWARD), (other, writer, BACK))
            await asyncio.gather(*(self._one_way(pair, *way) for way in ways))
        except OSError:
            pair.reset()
        finally:
            self._pairs.discard(pair)
            for side in (writer, pair.far):
                if side is not None:
                    side.close()

    async def _one_way(
        self, pair: Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str
    ) -> None:
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS)
        writing = asyncio.ensure_future(self._write(pair, line, writer, way))
        try:
            while True:
                try:
                    data = await reader.read(CHUNK_BYTES)
                except OSError:
                    if way not in self._deaf:
                        raise
                    data = b""
                if way in self._deaf:
                    if data:
                        continue
                    pair.owed = True
                    return
                due_s = time.monotonic() + self.delay_s + self.jitter_s * self._random.random()
                await line.put((due_s, self._flipped(data, way)))
                if not data:
                    await writing
                    return
        finally:
            if pair.owed:
                # Held as it is: only healing, or the relay's end, ends it.
                while way in self._deaf:
                    await asyncio.sleep(0.01)
            writing.cancel()

    async def _write(
        self,
        pair: Pair,
        line: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
        way: str,
    ) -> None:
        while True:
            due_s, data = await line.get()
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            if way in self._deaf:
                pair.owed |= not data
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

    def _flipped(self, data: bytes, way: str) -> bytes:
        if way not in self._flips or not data:
            return data
        nth, bit = self._flips[way]
        if nth >= len(data):
            self._flips[way] = (nth - len(data), bit)
            return data
        del self._flips[way]
        return data[:nth] + bytes([data[nth] ^ 1 << bit]) + data[nth + 1 :]


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
    asked = parser.parse_args()
    with Relay(asked.to, asked.listen, asked.seed) as relay:
        relay.delay_s, relay.jitter_s, relay.rate_bytes_s = asked.delay, asked.jitter, asked.rate
        if asked.deaf:
            relay.blackhole(*((FORWARD, BACK) if asked.deaf == "both" else (asked.deaf,)))
        if asked.flip is not None:
            relay.flip(asked.flip)
        print(relay.address, flush=True)
        moments = [(asked.reset_after, relay.reset), (asked.heal_after, relay.heal)]
        began = time.monotonic()
        for after_s, what in sorted((m for m in moments if m[0] is not None), key=lambda m: m[0]):
            time.sleep(max(0.0, began + after_s - time.monotonic()))
            what()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
