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

from cordee.fault import address
from cordee.fault.frames import BrokenFrame, unpack
from cordee.fault.handshake import Handshake, Refusal, Refused
from cordee.fault.loop import READ, WRITE, Loop
from cordee.fault.post import Post
from cordee.fault.wires import (
    AGAIN_S,
    CHUNK_BYTES,
    EARLY_S,
    FRAME_S,
    GONE,
    HANDSHAKE_S,
    MOST_EARLY,
    MOST_WIRES,
    UNANSWERED_MS,
    Dial,
    Wire,
    look_up,
)
from cordee.system import limit_unanswered


class Switchboard(threading.Thread):
    """See the file's header. Owns its sockets; what it shares with others is `post`, and `known`:
    id -> our IP address on the connection to it, and its hello."""

    def __init__(
        self,
        listener: socket.socket,
        own_id: str,
        secret: bytes,
        hello: Mapping[str, Any],
        fault_of: Callable[[Any], str],
    ) -> None:
        """`fault_of(message)`: why its sender's connection is closed; "" for a good one."""
        super().__init__(name="cordee-link", daemon=True)
        self._fault_of = fault_of
        self.post = Post()
        self.known: dict[str, tuple[str, Mapping[str, Any]]] = {}
        self.alias: dict[str, str] = {}
        self._listener, self._own_id = listener, own_id
        self._secret, self._hello = secret, dict(hello)
        self._loop = Loop()
        self._wires: dict[str, list[Wire]] = {}
        self._early: dict[Wire, None] = {}
        self._dials: dict[str, Dial] = {}
        self._not_before: dict[str, float] = {}
        self._answers: deque[tuple[Dial, list[address.Place], str]] = deque()
        self._stop_s: float | None = None

    def run(self) -> None:
        """Carries traffic until `stop`."""
        try:
            self._loop.watch(self._listener, READ, self._accept)
            self._loop.watch(self.post.inward.read_end, READ, self._woken)
            while not self._may_end():
                self._loop.turn(None if self._stop_s is None else 0.01)
        except Exception as cause:  # a fault of ours: the supervisor must hear of it
            self.post.fail(cause)
        finally:
            self._listener.close()
            self._loop.close()

    def stop(self, within_s: float) -> None:
        """Ends the thread as soon as all is sent, or after that time."""
        self._stop_s = time.monotonic() + within_s
        self.post.wake()

    def _may_end(self) -> bool:
        if self._stop_s is None:
            return False
        self._woken()
        unsent = any(wire.out for wires in self._wires.values() for wire in wires)
        return not unsent or time.monotonic() > self._stop_s

    # ---- what was put for others ----

    def _woken(self, _: int = 0) -> None:
        while self._answers:
            self._resolved(*self._answers.popleft())
        for peer, why in self.post.take_dismissed():
            for wire in list(self._wires.get(peer, ())):
                self._refuse(wire, Refused(why))
        for to in self.post.take_touched():
            self._serve(to)

    def _serve(self, to: str) -> None:
        """Sends what waits for a peer, or sees to it that there is a connection."""
        if not self.post.waits(to):
            return
        if to in (self._own_id, self._own_id.rpartition("#")[0]):
            self.post.forget(to)
            return
        wire = self._current(to)
        if wire is None:
            self._dial(to)
        elif self._fill(wire, to):
            self._flush(wire)

    def _current(self, to: str) -> Wire | None:
        """The connection on which messages for an id or address go."""
        wires = self._wires.get(self.alias.get(to, to))
        return wires[0] if wires else None

    def _fill(self, wire: Wire, to: str) -> bool:
        room = CHUNK_BYTES - len(wire.out)
        if room <= 0:
            return False
        for body in self.post.take_bodies(to, room):
            wire.out += wire.talk.sealer.seal(body)
        return True

    def _refill(self, wire: Wire) -> bool:
        peer = wire.talk.peer
        if not wire.talk.done or wire.ending or self._current(peer) is not wire:
            return False
        for to in (peer, *(name for name, of in self.alias.items() if of == peer)):
            self._fill(wire, to)
        return bool(wire.out)

    def _flush(self, wire: Wire) -> None:
        """Writes what the socket takes, and refills as long as it takes all."""
        while not wire.closed and wire.connected and (wire.out or self._refill(wire)):
            try:
                sent = wire.socket.send(memoryview(wire.out)[:CHUNK_BYTES])
            except BlockingIOError:
                break
            except OSError as cause:
                self._broke(wire, cause)
                return
            del wire.out[:sent]
        if wire.ending and not wire.out:
            self._close(wire)
        mask = READ | (WRITE if wire.out or not wire.connected else 0)
        if not wire.closed and wire.mask != mask:
            wire.mask = mask
            self._loop.change(wire.socket, mask, partial(self._ready, wire))

    # ---- a connection's life ----

    def _accept(self, _: int = 0) -> None:
        try:
            made, place = self._listener.accept()
            wire = self._adopt(made, address.ip_of(place), None)
        except OSError as cause:
            if cause.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                # Nothing to accept with: look again a little later instead of spinning.
                self._loop.leave(self._listener)
                again = partial(self._loop.watch, self._listener, READ, self._accept)
                self._loop.after(0.1, again)
            return
        while len(self._early) > MOST_EARLY:  # the oldest has had more time than it needs
            self.post.counted["crowded out"] += 1
            self._close(next(iter(self._early)))
        wire.out += wire.talk.first()
        self._flush(wire)

    def _adopt(self, made: socket.socket, there: str, dial: Dial | None) -> Wire:
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit_unanswered(made, UNANSWERED_MS)
        talk = Handshake(self._secret, self._own_id, self._hello, dials=dial is not None)
        wire = Wire(made, talk, there, dial, connected=dial is None)
        wire.mask = READ if wire.connected else READ | WRITE
        self._loop.watch(made, wire.mask, partial(self._ready, wire))
        if dial is None:
            self._early[wire] = None
        self._loop.after(EARLY_S, partial(self._expire, wire, False))
        self._loop.after(HANDSHAKE_S, partial(self._expire, wire, True))
        return wire

    def _expire(self, wire: Wire, at_all: bool) -> None:
        """Ends a handshake that takes too long: `at_all`, or in its first part."""
        talk = wire.talk
        late = not talk.done if at_all or wire.ending else not (talk.proven or wire.dial)
        if wire.closed or not (late or not wire.connected):
            return
        if wire.dial is not None and not wire.ending:
            self._broke(wire, TimeoutError(errno.ETIMEDOUT, "no answer"))
        elif wire.ending:
            self._close(wire)
        else:
            self._refuse(wire, Refused(f"it did not prove who it is within {EARLY_S:g} s"))

    def _ready(self, wire: Wire, mask: int) -> None:
        if wire.closed:  # by an event of the same round
            return
        try:
            if not wire.connected:
                wire.check_connected()
            if mask & READ:
                self._read(wire)
            if mask & WRITE and not wire.closed:
                self._flush(wire)
        except BlockingIOError:
            return
        except (BrokenFrame, RecursionError) as cause:
            self.post.counted["broken"] += 1
            self._refuse(wire, Refused(str(cause)))
        except Refused as cause:
            self._refuse(wire, cause)
        except OSError as cause:
            self._broke(wire, cause)

    def _read(self, wire: Wire) -> None:
        data = wire.socket.recv(CHUNK_BYTES)
        if not data:
            self._broke(wire, None)
        if not data or wire.ending:
            return
        talk, come = wire.talk, list[tuple[dict[str, Any], int]]()
        talk.opener.feed(data)
        try:
            while not wire.closed and (body := talk.opener.next()) is not None:
                if talk.done:
                    message = unpack(body)
                    if fault := self._fault_of(message):
                        raise Refused(f"it sent {fault}")
                    come.append((message, len(body)))
                    continue
                wire.out += talk.take(body)
                if talk.proven:
                    self._early.pop(wire, None)
                if talk.done:
                    self._open(wire)
        finally:
            if come:
                self.post.deliver(talk.peer, come)
        if talk.opener.partial and not wire.timed:
            wire.timed = True
            self._loop.after(FRAME_S, partial(self._stalled, wire, talk.opener.opened))
        if wire.out:
            self._flush(wire)

    def _stalled(self, wire: Wire, opened: int) -> None:
        wire.timed = False
        opener = wire.talk.opener
        if wire.closed or not opener.partial:
            return
        if opener.opened == opened:
            self.post.counted["broken"] += 1
            self._refuse(wire, Refused("a frame whose end never came"))
        else:
            wire.timed = True
            self._loop.after(FRAME_S, partial(self._stalled, wire, opener.opened))

    def _open(self, wire: Wire) -> None:
        """The handshake is over; closes the wire when it is not the process that was dialled."""
        peer, dial = wire.talk.peer, wire.dial
        wire.since_s = time.monotonic()
        if dial is not None:
            self._dials.pop(dial.to, None)
            if "#" not in dial.to:
                self.alias[dial.to] = peer
            elif dial.to != peer:  # another process has taken its address: the old one is gone
                self._close(wire)
                self._lose(dial.to)
                return
        wires = self._wires.setdefault(peer, [])
        # Who dials though there is a connection has given that one up, unless both dialled at once.
        at_once = wires and wire.since_s - wires[0].since_s < EARLY_S
        wires.insert(1 if at_once else 0, wire)
        self.known[peer] = (address.ip_of(wire.socket.getsockname()), wire.talk.theirs)
        for old in wires[MOST_WIRES:]:
            self._close(old)
        self._refill(wire)

    def _refuse(self, wire: Wire, cause: Refused) -> None:
        """Notes why a connection ends, tells the other side if there is something to tell."""
        self.post.refuse(Refusal(wire.who, cause.why, cause.differences))
        dial = wire.dial
        if wire.talk.done:
            wire.out.clear()
        elif dial is not None and self._dials.get(dial.to) is dial:
            del self._dials[dial.to]
            self._not_before[dial.to] = time.monotonic() + 10 * AGAIN_S
            self.post.forget(dial.to)
        wire.out += cause.last
        wire.ending = True
        self._loop.after(EARLY_S, partial(self._close, wire))
        self._flush(wire)

    def _broke(self, wire: Wire, cause: OSError | None) -> None:
        """A connection ended by itself; `cause` None is an orderly end by the other side."""
        self._close(wire)
        said = cause is None or cause.errno in GONE
        dial = wire.dial
        if wire.talk.done:
            # Is the process gone? A new dial will tell.
            if said and not wire.ending and self._current(wire.talk.peer) is None:
                self._dial(wire.talk.peer)
        elif dial is None or self._dials.get(dial.to) is not dial:
            return
        elif wire.connected and said:
            self._retry(dial)
        else:
            dial.all_refused &= cause is not None and cause.errno == errno.ECONNREFUSED
            self._try(dial)

    def _close(self, wire: Wire) -> None:
        if wire.closed:
            return
        wire.closed = True
        self._early.pop(wire, None)
        self._loop.leave(wire.socket)
        wire.socket.close()
        peer = wire.talk.peer
        wires = self._wires.get(peer, [])
        if wire not in wires:
            return
        wires.remove(wire)
        if wires:
            self._flush(wires[0])
            return
        del self._wires[peer]
        self.known.pop(peer, None)
        for name in [name for name, of in self.alias.items() if of == peer]:
            del self.alias[name]

    # ---- dialling ----

    def _dial(self, to: str) -> None:
        if to in self._dials:
            return
        self._dials[to] = dial = Dial(to)
        now = time.monotonic()
        at = max(now, self._not_before.get(to, now))
        if len(self._not_before) > 4096:
            self._not_before = {k: v for k, v in self._not_before.items() if v > now}
        self._not_before[to] = at + AGAIN_S
        if at > now:
            self._loop.after(at - now, partial(self._begin, dial))
        else:
            self._begin(dial)

    def _begin(self, dial: Dial) -> None:
        if self._dials.get(dial.to) is not dial:
            return
        if address.is_number(address.split(dial.address)[0]):
            self._resolved(dial, *look_up(dial.address))
        else:  # a name server may take its time
            asking = threading.Thread(target=self._ask, args=(dial,), daemon=True)
            asking.start()

    def _ask(self, dial: Dial) -> None:
        """In a thread of its own."""
        self._answers.append((dial, *look_up(dial.address)))
        self.post.wake()

    def _resolved(self, dial: Dial, places: list[address.Place], why: str) -> None:
        if why:
            self.post.refuse(Refusal(dial.to, why))
        dial.places, dial.all_refused = places, bool(places)
        self._try(dial)

    def _try(self, dial: Dial) -> None:
        """Dials the next place; when there is none left the peer is lost, or merely silent."""
        if not dial.places:
            self._dials.pop(dial.to, None)
            if dial.all_refused:
                self._lose(dial.to)
            else:
                self.post.forget(dial.to)
            return
        family, place = dial.places.pop(0)
        try:
            made = socket.socket(family, socket.SOCK_STREAM)
        except OSError as cause:  # no descriptors left, or no IPv6 here
            self.post.refuse(Refusal(dial.to, f"cannot be dialled: {cause.strerror}"))
            dial.all_refused = False
            self._try(dial)
            return
        wire = self._adopt(made, address.ip_of(place), dial)
        number = wire.socket.connect_ex(place)
        if number not in (0, errno.EINPROGRESS):
            self._broke(wire, OSError(number, "no connection"))

    def _retry(self, dial: Dial) -> None:
        """A listener that hangs up at once is closing down, or crowded: see a little later."""
        dial.resets += 1
        if dial.resets > 3:
            self._dials.pop(dial.to, None)
            self.post.forget(dial.to)
            return
        self._loop.after(0.02 * dial.resets, partial(self._begin, dial))

    def _lose(self, to: str) -> None:
        if self._current(to) is None:
            self.post.forget(to)
            self.post.lose(to)
