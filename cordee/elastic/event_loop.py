"""Waits for sockets and for moments, and calls what was asked for.

Not here: what is called. Traded away: coroutines; a link has two kinds of socket and few moments.
"""

from __future__ import annotations

import heapq
import selectors
import socket
import time
from collections.abc import Callable
from itertools import count

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class EventLoop:
    """Belongs to one thread; closes the sockets that it watches when it is closed."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = count()

    def register(
        self, file: socket.socket | int, mask: int, callback: Callable[[int], None]
    ) -> None:
        """Calls with the events that have come, from now on, for these events."""
        self._selector.register(file, mask, callback)

    def modify(self, file: socket.socket | int, mask: int, callback: Callable[[int], None]) -> None:
        """Other events than before."""
        self._selector.modify(file, mask, callback)

    def unregister(self, file: socket.socket | int) -> None:
        """Watches this no more; nothing happens when it was not watched."""
        if file in self._selector.get_map():
            self._selector.unregister(file)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Calls once, not before that time has passed."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._sequence), callback))

    def run_once(self, timeout_s: float | None) -> None:
        """Waits for the next events or the next moment, and calls."""
        if self._timers:
            timer_delay_s = max(0.0, self._timers[0][0] - time.monotonic())
            timeout_s = timer_delay_s if timeout_s is None else min(timeout_s, timer_delay_s)
        for key, mask in self._selector.select(timeout_s):
            key.data(mask)
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()

    def close(self) -> None:
        """Closes every socket that is still watched."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()
