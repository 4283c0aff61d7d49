"""The rendezvous store of a generation: keys that ranks write and wait for.

The leader's supervisor keeps them and other hosts ask it. Keys of an ended generation are dropped,
so nobody reads the address of a rank that died.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

ValueCallback = Callable[[str], None]
"""Takes a key's value to whoever asked for it."""


@dataclass
class KeyValueStore:
    """Keys of one generation at a time, and who waits for which."""

    generation: int = 0
    values: dict[str, str] = field(default_factory=dict)
    waiters: dict[str, list[ValueCallback]] = field(default_factory=dict)

    def start_generation(self, generation: int) -> None:
        """A new generation: nothing of the former one is kept."""
        if generation > self.generation:
            self.generation = generation
            self.values.clear()
            self.waiters.clear()

    def set(self, generation: int, key: str, value: str) -> None:
        """Writes a key, and answers who waits for it."""
        if generation > self.generation:
            self.start_generation(generation)
        if generation == self.generation:
            self.values[key] = value
            for callback in self.waiters.pop(key, []):
                callback(value)

    def get(self, generation: int, key: str, callback: ValueCallback) -> None:
        """Answers now or once the key is written; never for a generation that has ended."""
        if generation > self.generation:
            self.start_generation(generation)
        if generation != self.generation:
            return
        if key in self.values:
            callback(self.values[key])
        else:
            self.waiters.setdefault(key, []).append(callback)
