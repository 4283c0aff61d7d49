"""Frames on a byte stream: length, JSON body and, once keys are agreed, a code that proves both.

A sealed frame is: length (4 bytes), check of the length (4), body, code (16). Both codes are
HMAC-SHA256 under the key of this direction over the frame's number in the connection, so that a
flipped bit, a frame left out, repeated or moved never opens. The length has its own check because
a wrong one would otherwise wait for bytes that never come. Not here: who may talk
(`handshake.py`), sockets. Traded away: secrecy; what is sent is authentic, not hidden.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

MOST_BYTES = 8 << 20
EARLY_BYTES = 64 << 10
"""Most bytes of a body after, and before, the other side is known and welcome."""

_LENGTH, _CHECK, _CODE = 4, 4, 16


class BrokenFrame(Exception):
    """Bytes that are no frame of the other side; its text says in what way. Ends a connection."""


def pack(message: Mapping[str, Any]) -> bytes:
    """A message as JSON; ValueError for what is too long or not a number, TypeError for what has
    no JSON."""
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    if len(body) > MOST_BYTES:
        raise ValueError(f"a message of {len(body)} bytes; at most {MOST_BYTES} are sent at once")
    return body


def unpack(body: bytes) -> dict[str, Any]:
    """The message in a body; BrokenFrame for anything but one JSON object."""
    try:
        message = json.loads(body.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as cause:
        raise BrokenFrame("a frame that is not JSON") from cause
    if not isinstance(message, dict):
        raise BrokenFrame("a frame that is not a JSON object")
    return message


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


class _Codes:
    """The codes of one direction; counts frames."""

    def __init__(self, key: bytes) -> None:
        self._length = hmac.new(key, b"length", hashlib.sha256)
        self._body = hmac.new(key, b"body", hashlib.sha256)
        self._number = 0

    def check(self, length: bytes) -> bytes:
        """The code of this frame's length."""
        code = self._length.copy()
        code.update(self._number.to_bytes(8, "big") + length)
        return code.digest()[:_CHECK]

    def code(self, length: bytes, body: bytes) -> bytes:
        """The code of this frame; the next call is about the next frame."""
        code = self._body.copy()
        code.update(self._number.to_bytes(8, "big") + length)
        code.update(body)
        self._number += 1
        return code.digest()[:_CODE]


class Sealer:
    """Writes frames; plain ones until it has a key."""

    def __init__(self) -> None:
        self._codes: _Codes | None = None

    def use(self, key: bytes) -> None:
        """Seals every frame from here on."""
        self._codes = _Codes(key)

    def seal(self, body: bytes) -> bytes:
        """The bytes of one frame."""
        length = len(body).to_bytes(_LENGTH, "big")
        if self._codes is None:
            return length + body
        check = self._codes.check(length)
        return b"".join((length, check, body, self._codes.code(length, body)))


class Opener:
    """Reads frames; plain ones until it has a key. After a BrokenFrame it is of no more use."""

    def __init__(self) -> None:
        self.most_bytes = EARLY_BYTES
        self.opened = 0
        self._codes: _Codes | None = None
        self._bytes = bytearray()
        self._checked = False

    @property
    def partial(self) -> bool:
        """Whether the beginning of a frame waits for the rest of it."""
        return bool(self._bytes)

    def use(self, key: bytes) -> None:
        """Expects sealed frames from here on."""
        self._codes = _Codes(key)

    def feed(self, data: bytes) -> None:
        """Takes bytes as they came."""
        self._bytes += data

    def next(self) -> bytes | None:
        """The next body, or None until more bytes have come; BrokenFrame when it can be none."""
        sealed = self._codes is not None
        head = _LENGTH + _CHECK * sealed
        if len(self._bytes) < head:
            return None
        length = bytes(self._bytes[:_LENGTH])
        size = int.from_bytes(length, "big")
        if self._codes is not None and not self._checked:
            if not hmac.compare_digest(self._codes.check(length), self._bytes[_LENGTH:head]):
                raise BrokenFrame("a frame that was changed, repeated or left out on the way")
            self._checked = True
        if size > self.most_bytes:
            raise BrokenFrame(f"a frame that is too long (over {self.most_bytes} bytes)")
        end = head + size + _CODE * sealed
        if len(self._bytes) < end:
            return None
        body = bytes(self._bytes[head : head + size])
        if self._codes is not None:
            code = bytes(self._bytes[head + size : end])
            if not hmac.compare_digest(self._codes.code(length, body), code):
                raise BrokenFrame("a frame that was changed, repeated or left out on the way")
        del self._bytes[:end]
        self._checked = False
        self.opened += 1
        return body
