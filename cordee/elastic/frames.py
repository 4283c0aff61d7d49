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

MAX_BODY_BYTES = 8 << 20
MAX_HANDSHAKE_BYTES = 64 << 10
"""Most bytes of a body after, and before, the other side is known and welcome."""

_LENGTH_BYTES, _LENGTH_MAC_BYTES, _FRAME_MAC_BYTES = 4, 4, 16


class FrameError(Exception):
    """Bytes that are no frame of the other side; its text says in what way. Ends a connection."""


def pack(message: Mapping[str, Any]) -> bytes:
    """A message as JSON; ValueError for what is too long or not a number, TypeError for what has
    no JSON."""
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    if len(body) > MAX_BODY_BYTES:
        raise ValueError(
            f"a message of {len(body)} bytes; at most {MAX_BODY_BYTES} are sent at once"
        )
    return body


def unpack(body: bytes) -> dict[str, Any]:
    """The message in a body; BrokenFrame for anything but one JSON object."""
    try:
        message = json.loads(body.decode(), parse_constant=_reject_constant)
    except (ValueError, RecursionError) as cause:
        raise FrameError("a frame that is not JSON") from cause
    if not isinstance(message, dict):
        raise FrameError("a frame that is not a JSON object")
    return message


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


class _FrameMacs:
    """The codes of one direction; counts frames."""

    def __init__(self, key: bytes) -> None:
        self._length_hmac = hmac.new(key, b"length", hashlib.sha256)
        self._body_hmac = hmac.new(key, b"body", hashlib.sha256)
        self._frame_number = 0

    def length_mac(self, length: bytes) -> bytes:
        """The code of this frame's length."""
        mac = self._length_hmac.copy()
        mac.update(self._frame_number.to_bytes(8, "big") + length)
        return mac.digest()[:_LENGTH_MAC_BYTES]

    def frame_mac(self, length: bytes, body: bytes) -> bytes:
        """The code of this frame; the next call is about the next frame."""
        mac = self._body_hmac.copy()
        mac.update(self._frame_number.to_bytes(8, "big") + length)
        mac.update(body)
        self._frame_number += 1
        return mac.digest()[:_FRAME_MAC_BYTES]


class FrameEncoder:
    """Writes frames; plain ones until it has a key."""

    def __init__(self) -> None:
        self._macs: _FrameMacs | None = None

    def set_key(self, key: bytes) -> None:
        """Seals every frame from here on."""
        self._macs = _FrameMacs(key)

    def encode(self, body: bytes) -> bytes:
        """The bytes of one frame."""
        length = len(body).to_bytes(_LENGTH_BYTES, "big")
        if self._macs is None:
            return length + body
        length_mac = self._macs.length_mac(length)
        return b"".join((length, length_mac, body, self._macs.frame_mac(length, body)))


class FrameDecoder:
    """Reads frames; plain ones until it has a key. After a BrokenFrame it is of no more use."""

    def __init__(self) -> None:
        self.max_body_bytes = MAX_HANDSHAKE_BYTES
        self.frame_count = 0
        self._macs: _FrameMacs | None = None
        self._buffer = bytearray()
        self._is_length_verified = False

    @property
    def has_partial_frame(self) -> bool:
        """Whether the beginning of a frame waits for the rest of it."""
        return bool(self._buffer)

    def set_key(self, key: bytes) -> None:
        """Expects sealed frames from here on."""
        self._macs = _FrameMacs(key)

    def feed(self, data: bytes) -> None:
        """Takes bytes as they came."""
        self._buffer += data

    def next_body(self) -> bytes | None:
        """The next body, or None until more bytes have come; BrokenFrame when it can be none."""
        has_macs = self._macs is not None
        header_bytes = _LENGTH_BYTES + _LENGTH_MAC_BYTES * has_macs
        if len(self._buffer) < header_bytes:
            return None
        length = bytes(self._buffer[:_LENGTH_BYTES])
        body_bytes = int.from_bytes(length, "big")
        if self._macs is not None and not self._is_length_verified:
            if not hmac.compare_digest(
                self._macs.length_mac(length), self._buffer[_LENGTH_BYTES:header_bytes]
            ):
                raise FrameError("a frame that was changed, repeated or left out on the way")
            self._is_length_verified = True
        if body_bytes > self.max_body_bytes:
            raise FrameError(f"a frame that is too long (over {self.max_body_bytes} bytes)")
        frame_bytes = header_bytes + body_bytes + _FRAME_MAC_BYTES * has_macs
        if len(self._buffer) < frame_bytes:
            return None
        body = bytes(self._buffer[header_bytes : header_bytes + body_bytes])
        if self._macs is not None:
            mac = bytes(self._buffer[header_bytes + body_bytes : frame_bytes])
            if not hmac.compare_digest(self._macs.frame_mac(length, body), mac):
                raise FrameError("a frame that was changed, repeated or left out on the way")
        del self._buffer[:frame_bytes]
        self._is_length_verified = False
        self.frame_count += 1
        return body
