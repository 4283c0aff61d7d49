"""What the supervisor and the thread of its connections hand each other: bounded queues, a signal.
When a queue is full the oldest go, because whoever reads late wants the newest."""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from typing import Any

from cordee.elastic.handshake import Refusal
from cordee.errors import RunError
from cordee.hardware.system import nonblocking_pipe

MAX_QUEUE_ITEMS, MAX_QUEUE_BYTES = 1 << 16, 64 << 20
"""Most messages, and bytes, that wait for one peer, or for the supervisor."""
MAX_REFUSALS = 256
"""Most different refusals that are reported; later ones are only counted."""


class WakeupPipe:
    """A file descriptor that is readable from `notify` to `clear`; both are cheap to repeat, and
    are called under one lock."""

    def __init__(self) -> None:
        self.read_end, self._write_end = nonblocking_pipe()
        self._is_set = self._is_closed = False

    def notify(self) -> None:
        """Makes the descriptor readable."""
        if not (self._is_set or self._is_closed):
            self._is_set = True
            os.write(self._write_end, b"!")

    def clear(self) -> None:
        """Makes the descriptor quiet again."""
        if self._is_set and not self._is_closed:
            os.read(self.read_end, 1)
            self._is_set = False

    def close(self) -> None:
        """Gives both descriptors back."""
        if not self._is_closed:
            self._is_closed = True
            os.close(self.read_end)
            os.close(self._write_end)


class BoundedQueue:
    """Things in order, at most so many and so many bytes; the oldest are dropped."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self._items: deque[tuple[Any, int]] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def push(self, item: Any, size: int = 0) -> int:
        """Appends; returns how many were dropped for it."""
        self._items.append((item, size))
        self.total_bytes += size
        dropped_count = 0
        while len(self._items) > MAX_QUEUE_ITEMS or (
            self.total_bytes > MAX_QUEUE_BYTES and dropped_count < len(self)
        ):
            self.pop()
            dropped_count += 1
        return dropped_count

    def pop(self) -> Any:
        """Takes the oldest."""
        item, size = self._items.popleft()
        self.total_bytes -= size
        return item


class PeerQueues:
    """Both directions between the two threads; every method may be called from either."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.network_wakeup, self.supervisor_wakeup = WakeupPipe(), WakeupPipe()
        self.inbox, self.lost_peers, self.refusals = (BoundedQueue() for _ in range(3))
        self._lock = threading.Lock()
        self._reported_kinds: set[tuple[str, str]] = set()
        self._outgoing: dict[str, BoundedQueue] = {}
        self._new_targets: dict[str, None] = {}
        self._disconnects: dict[str, str] = {}
        self._failure: BaseException | None = None

    # ---- to the supervisor ----

    def deliver(self, sender: str, message: dict[str, Any], size: int) -> None:
        """A message (with its bytes) that has come."""
        with self._lock:
            self.counters["unread"] += self.inbox.push((sender, message), size)
            self.supervisor_wakeup.notify()

    def report_lost(self, peer: str) -> None:
        """A peer whose process is gone."""
        with self._lock:
            self.lost_peers.push(peer)
            self.supervisor_wakeup.notify()

    def report_refusal(self, refusal: Refusal) -> None:
        """Counts a refusal; the first of its kind from there is reported."""
        with self._lock:
            self.counters["refused"] += 1
            kind = (refusal.peer, refusal.reason)
            if kind not in self._reported_kinds and len(self._reported_kinds) < MAX_REFUSALS:
                self._reported_kinds.add(kind)
                self.refusals.push(refusal)
                self.supervisor_wakeup.notify()

    def report_failure(self, cause: BaseException) -> None:
        """The thread of the connections has ended by itself: `take` raises from now on."""
        with self._lock:
            self._failure = cause
            self.supervisor_wakeup.notify()

    def take(self, queue: BoundedQueue) -> list[Any]:
        """All that waits in `inbox`, `lost_peers` or `refusals`; RunError when the thread of the
        connections has failed."""
        with self._lock:
            if self._failure is not None:
                raise RunError("the link to the other hosts broke") from self._failure
            items = [queue.pop() for _ in range(len(queue))]
            if not (self.inbox or self.lost_peers or self.refusals):
                self.supervisor_wakeup.clear()
        return items

    # ---- to the thread of the connections ----

    def enqueue(self, target: str, body: bytes) -> None:
        """A message's body for a peer."""
        with self._lock:
            queue = self._outgoing.setdefault(target, BoundedQueue())
            self.counters["dropped"] += queue.push(body, len(body))
            self._new_targets[target] = None
            self.network_wakeup.notify()

    def disconnect(self, peer: str, reason: str) -> None:
        """Asks for the end of a peer's connections."""
        with self._lock:
            self._disconnects[peer] = reason
            self.network_wakeup.notify()

    def wake_network(self) -> None:
        """Lets the thread of the connections look around."""
        with self._lock:
            self.network_wakeup.notify()

    def take_requests(self) -> tuple[list[str], dict[str, str]]:
        """Since the last call: for whom something was put; whose connections end, and why."""
        with self._lock:
            targets, self._new_targets = list(self._new_targets), {}
            disconnects, self._disconnects = self._disconnects, {}
            self.network_wakeup.clear()
        return targets, disconnects

    def take_bodies(self, target: str, max_bytes: int) -> list[bytes]:
        """Bodies that wait for a peer, in order, up to so many bytes (at least one, if any)."""
        bodies: list[bytes] = []
        with self._lock:
            queue = self._outgoing.get(target, BoundedQueue())
            while queue and max_bytes > 0:
                bodies.append(queue.pop())
                max_bytes -= len(bodies[-1])
            if not queue:
                self._outgoing.pop(target, None)
        return bodies

    def drop_outgoing(self, target: str) -> None:
        """Drops what waits for a peer that cannot be reached."""
        with self._lock:
            self.counters["dropped"] += len(self._outgoing.pop(target, ()))

    def has_outgoing(self, target: str) -> bool:
        """Whether something waits for this peer."""
        return target in self._outgoing

    def close(self) -> None:
        """Gives the signals' descriptors back; both threads have ended or are about to."""
        with self._lock:
            self.network_wakeup.close()
            self.supervisor_wakeup.close()
