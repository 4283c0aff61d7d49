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

from cordee.elastic.handshake import Refusal
from cordee.errors import RunError
from cordee.hardware.system import nonblocking_pipe

MAX_QUEUE_ITEMS, MAX_QUEUE_BYTES = 1 << 16, 64 << 20
"""Most messages, and bytes, that wait for one peer, or for the supervisor."""
MAX_REFUSALS = 256
"""Most different refusals that are told; later ones are only counted."""


class WakeupPipe:
    """A file descriptor that is readable from `notify` to `clear`; both are cheap to repeat."""

    def __init__(self) -> None:
        self.read_end, self._write_end = nonblocking_pipe()
        self._is_set = False

    def notify(self) -> None:
        """Makes the descriptor readable; the caller holds the lock that `clear` is called under."""
        if not self._is_set:
            self._is_set = True
            os.write(self._write_end, b"!")

    def clear(self) -> None:
        """Makes the descriptor quiet again."""
        if self._is_set:
            os.read(self.read_end, 1)
            self._is_set = False

    def close(self) -> None:
        """Gives both descriptors back."""
        for descriptor in (self.read_end, self._write_end):
            with suppress(OSError):
                os.close(descriptor)


class BoundedQueue:
    """Things in order, at most so many and so many bytes; the oldest are dropped."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self._items: deque[tuple[Any, int]] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def push(self, item: Any, size: int) -> int:
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
        self._lock = threading.Lock()
        self._inbox = BoundedQueue()
        self._lost_peers: dict[str, None] = {}
        self._refusals: list[Refusal] = []
        self._reported_kinds: set[tuple[str, str]] = set()
        self._outgoing: dict[str, BoundedQueue] = {}
        self._new_targets: dict[str, None] = {}
        self._disconnects: dict[str, str] = {}
        self._is_closed = False
        self._failure: BaseException | None = None

    # ---- to the supervisor ----

    def deliver(self, sender: str, messages: list[tuple[dict[str, Any], int]]) -> None:
        """Messages (with their bytes) that have come."""
        with self._lock:
            for message, size in messages:
                self.counters["unread"] += self._inbox.push((sender, message), size)
            self._notify_supervisor()

    def report_lost(self, peer: str) -> None:
        """A peer whose process is gone."""
        with self._lock:
            self._lost_peers[peer] = None
            self._notify_supervisor()

    def report_refusal(self, refusal: Refusal) -> None:
        """Counts a refusal; the first of its kind from there is told."""
        with self._lock:
            self.counters["refused"] += 1
            kind = (refusal.peer, refusal.reason)
            if kind not in self._reported_kinds and len(self._reported_kinds) < MAX_REFUSALS:
                self._reported_kinds.add(kind)
                self._refusals.append(refusal)
                self._notify_supervisor()

    def report_failure(self, cause: BaseException) -> None:
        """The thread of the connections has ended by itself: every later call raises."""
        with self._lock:
            self._failure = cause
            self._notify_supervisor()

    def take_messages(self) -> list[tuple[str, dict[str, Any]]]:
        """All messages that wait; RunError when the thread of the connections has failed."""
        with self._lock:
            if self._failure is not None:
                raise RunError("the link to the other hosts broke") from self._failure
            messages = [self._inbox.pop() for _ in range(len(self._inbox))]
            self._clear_if_empty()
        return messages

    def take_lost_peers(self) -> list[str]:
        """All peers lost since the last call."""
        with self._lock:
            peers = list(self._lost_peers)
            self._lost_peers.clear()
            self._clear_if_empty()
        return peers

    def take_refusals(self) -> list[Refusal]:
        """All refusals since the last call."""
        with self._lock:
            refusals, self._refusals = self._refusals, []
            self._clear_if_empty()
        return refusals

    def _notify_supervisor(self) -> None:
        if not self._is_closed and (
            self._inbox or self._lost_peers or self._refusals or self._failure
        ):
            self.supervisor_wakeup.notify()

    def _clear_if_empty(self) -> None:
        if not (
            self._is_closed or self._inbox or self._lost_peers or self._refusals or self._failure
        ):
            self.supervisor_wakeup.clear()

    # ---- to the thread of the connections ----

    def enqueue(self, target: str, body: bytes) -> None:
        """A message's body for a peer."""
        with self._lock:
            queue = self._outgoing.setdefault(target, BoundedQueue())
            self.counters["dropped"] += queue.push(body, len(body))
            self._new_targets[target] = None
            self._notify_network()

    def disconnect(self, peer: str, reason: str) -> None:
        """Asks for the end of a peer's connections."""
        with self._lock:
            self._disconnects[peer] = reason
            self._notify_network()

    def take_disconnects(self) -> list[tuple[str, str]]:
        """(peer, reason) of all whose connections are to end."""
        with self._lock:
            disconnects, self._disconnects = list(self._disconnects.items()), {}
        return disconnects

    def wake_network(self) -> None:
        """Lets the thread of the connections look around."""
        with self._lock:
            self._notify_network()

    def _notify_network(self) -> None:
        if not self._is_closed:
            self.network_wakeup.notify()

    def take_new_targets(self) -> list[str]:
        """For whom something was put since the last call."""
        with self._lock:
            targets, self._new_targets = list(self._new_targets), {}
            self.network_wakeup.clear()
        return targets

    def take_bodies(self, target: str, max_bytes: int) -> list[bytes]:
        """Bodies that wait for a peer, in order, up to so many bytes (at least one, if any)."""
        with self._lock:
            queue = self._outgoing.get(target)
            bodies: list[bytes] = []
            size = 0
            while queue and size < max_bytes:
                bodies.append(queue.pop())
                size += len(bodies[-1])
            if queue is not None and not queue:
                del self._outgoing[target]
        return bodies

    def drop_outgoing(self, target: str) -> None:
        """Drops what waits for a peer that cannot be reached."""
        with self._lock:
            queue = self._outgoing.pop(target, None)
            self.counters["dropped"] += len(queue or ())

    def has_outgoing(self, target: str) -> bool:
        """Whether something waits for this peer."""
        return target in self._outgoing

    def close(self) -> None:
        """Gives the signals' descriptors back; both threads have ended or are about to."""
        with self._lock:
            self._is_closed = True
            self.network_wakeup.close()
            self.supervisor_wakeup.close()
