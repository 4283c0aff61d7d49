"""What the supervisor and the thread of its connections hand each other: bounded queues, a signal.

Not here: sockets. Traded away: certainty that a message arrives; the oldest go when a queue is
full, because whoever reads late wants the newest.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from contextlib import suppress
from typing import Any

from cordee.errors import RunError
from cordee.fault.handshake import Refusal
from cordee.system import quiet_pipe

QUEUE_ITEMS, QUEUE_BYTES = 1 << 16, 64 << 20
"""Most messages, and bytes, that wait for one peer, or for the supervisor."""
SAID_ONCE = 256
"""Most different refusals that are told; later ones are only counted."""


class Bell:
    """A file descriptor that is readable from `ring` to `clear`; both are cheap to repeat."""

    def __init__(self) -> None:
        self.read_end, self._write_end = quiet_pipe()
        self._rung = False

    def ring(self) -> None:
        """Makes the descriptor readable; the caller holds the lock that `clear` is called under."""
        if not self._rung:
            self._rung = True
            os.write(self._write_end, b"!")

    def clear(self) -> None:
        """Makes the descriptor quiet again."""
        if self._rung:
            os.read(self.read_end, 1)
            self._rung = False

    def close(self) -> None:
        """Gives both descriptors back."""
        for number in (self.read_end, self._write_end):
            with suppress(OSError):
                os.close(number)


class Queue:
    """Things in order, at most so many and so many bytes; the oldest are dropped."""

    def __init__(self) -> None:
        self.bytes = 0
        self._items: deque[tuple[Any, int]] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def push(self, item: Any, size: int) -> int:
        """Appends; returns how many were dropped for it."""
        self._items.append((item, size))
        self.bytes += size
        dropped = 0
        while len(self._items) > QUEUE_ITEMS or (self.bytes > QUEUE_BYTES and dropped < len(self)):
            self.pop()
            dropped += 1
        return dropped

    def pop(self) -> Any:
        """Takes the oldest."""
        item, size = self._items.popleft()
        self.bytes -= size
        return item


class Post:
    """Both directions between the two threads; every method may be called from either."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()
        self.inward, self.outward = Bell(), Bell()
        self._lock = threading.Lock()
        self._inbox = Queue()
        self._lost: dict[str, None] = {}
        self._refused: list[Refusal] = []
        self._said: set[tuple[str, str]] = set()
        self._waiting: dict[str, Queue] = {}
        self._touched: dict[str, None] = {}
        self._dismissed: dict[str, str] = {}
        self._closed = False
        self._cause: BaseException | None = None

    # ---- to the supervisor ----

    def deliver(self, sender: str, messages: list[tuple[dict[str, Any], int]]) -> None:
        """Messages (with their bytes) that have come."""
        with self._lock:
            for message, size in messages:
                self.counted["unread"] += self._inbox.push((sender, message), size)
            self._tell()

    def lose(self, peer: str) -> None:
        """A peer whose process is gone."""
        with self._lock:
            self._lost[peer] = None
            self._tell()

    def refuse(self, refusal: Refusal) -> None:
        """Counts a refusal; the first of its kind from there is told."""
        with self._lock:
            self.counted["refused"] += 1
            kind = (refusal.who, refusal.why)
            if kind not in self._said and len(self._said) < SAID_ONCE:
                self._said.add(kind)
                self._refused.append(refusal)
                self._tell()

    def fail(self, cause: BaseException) -> None:
        """The thread of the connections has ended by itself: every later call raises."""
        with self._lock:
            self._cause = cause
            self._tell()

    def take_messages(self) -> list[tuple[str, dict[str, Any]]]:
        """All messages that wait; RunError when the thread of the connections has failed."""
        with self._lock:
            if self._cause is not None:
                raise RunError("the link to the other hosts broke") from self._cause
            taken = [self._inbox.pop() for _ in range(len(self._inbox))]
            self._quiet()
        return taken

    def take_lost(self) -> list[str]:
        """All peers lost since the last call."""
        with self._lock:
            taken = list(self._lost)
            self._lost.clear()
            self._quiet()
        return taken

    def take_refused(self) -> list[Refusal]:
        """All refusals since the last call."""
        with self._lock:
            taken, self._refused = self._refused, []
            self._quiet()
        return taken

    def _tell(self) -> None:
        if not self._closed and (self._inbox or self._lost or self._refused or self._cause):
            self.outward.ring()

    def _quiet(self) -> None:
        if not (self._closed or self._inbox or self._lost or self._refused or self._cause):
            self.outward.clear()

    # ---- to the thread of the connections ----

    def put(self, to: str, body: bytes) -> None:
        """A message's body for a peer."""
        with self._lock:
            queue = self._waiting.setdefault(to, Queue())
            self.counted["dropped"] += queue.push(body, len(body))
            self._touched[to] = None
            self._wake()

    def dismiss(self, peer: str, why: str) -> None:
        """Asks for the end of a peer's connections."""
        with self._lock:
            self._dismissed[peer] = why
            self._wake()

    def take_dismissed(self) -> list[tuple[str, str]]:
        """(peer, reason) of all whose connections are to end."""
        with self._lock:
            taken, self._dismissed = list(self._dismissed.items()), {}
        return taken

    def wake(self) -> None:
        """Lets the thread of the connections look around."""
        with self._lock:
            self._wake()

    def _wake(self) -> None:
        if not self._closed:
            self.inward.ring()

    def take_touched(self) -> list[str]:
        """For whom something was put since the last call."""
        with self._lock:
            taken, self._touched = list(self._touched), {}
            self.inward.clear()
        return taken

    def take_bodies(self, to: str, most_bytes: int) -> list[bytes]:
        """Bodies that wait for a peer, in order, up to so many bytes (at least one, if any)."""
        with self._lock:
            queue = self._waiting.get(to)
            taken: list[bytes] = []
            size = 0
            while queue and size < most_bytes:
                taken.append(queue.pop())
                size += len(taken[-1])
            if queue is not None and not queue:
                del self._waiting[to]
        return taken

    def forget(self, to: str) -> None:
        """Drops what waits for a peer that cannot be reached."""
        with self._lock:
            queue = self._waiting.pop(to, None)
            self.counted["dropped"] += len(queue or ())

    def waits(self, to: str) -> bool:
        """Whether something waits for this peer."""
        return to in self._waiting

    def close(self) -> None:
        """Gives the signals' descriptors back; both threads have ended or are about to."""
        with self._lock:
            self._closed = True
            self.inward.close()
            self.outward.close()
