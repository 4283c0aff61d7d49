"""Who is there, do both know the secret, are both the same run: the first frames of a connection.

    acceptor -> dialler   version, id, nonce
    dialler -> acceptor   version, id, nonce, proof
    acceptor -> dialler   proof; from here on frames are sealed; hello
    dialler -> acceptor   hello

A proof is HMAC-SHA256 under the secret over the side's role, both nonces and both ids; keys of both
directions are derived from the same. Each side compares the hellos itself, so both see the same
differences. Not here: sockets and deadlines. Traded away: forward secrecy (nothing here is secret).
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cordee.elastic import address
from cordee.elastic.frames import (
    MAX_BODY_BYTES,
    FrameDecoder,
    FrameEncoder,
    FrameError,
    pack,
    unpack,
)
from cordee.errors import ConfigError

VERSION = 1
INFO_PREFIX = "about."
"""Keys of a hello that begin so are told, not compared."""

_ID_PATTERN = re.compile(r"[!-~]{3,200}#[0-9a-f]{8}")
_HEX_PATTERN = re.compile(r"[0-9a-f]{64}")
_SECRET_DIFFERS = "the secret differs: it does not know ours"
_REFUSAL_REASONS = {
    "secret": "it refused us, the secret differs: give this host the same secret file",
    "version": "it refused us, it speaks another version of this protocol: install the same cordee",
    "itself": "it is this process itself",
}

Difference = tuple[str, Any, Any]


@dataclass(frozen=True)
class Refusal:
    """A peer that we refused or that refused us: who (id or address), a sentence, and what differs
    as (key, here, there)."""

    peer: str
    reason: str
    differences: tuple[Difference, ...] = ()

    @property
    def table(self) -> str:
        """What differs, as aligned text; "" when it is not about differences."""
        return format_differences(self.differences)


class RefusalError(Exception):
    """Ends a handshake: why, what differs, and the `final_bytes` bytes that tell the other side."""

    def __init__(
        self, reason: str, final_bytes: bytes = b"", differences: tuple[Difference, ...] = ()
    ) -> None:
        super().__init__(reason)
        self.reason, self.final_bytes, self.differences = reason, final_bytes, differences


def differences(own_hello: Mapping[str, Any], peer_hello: Mapping[str, Any]) -> list[Difference]:
    """(key, here, there) for each key whose value differs as JSON; None is the same as no value."""
    keys = sorted(key for key in {*own_hello, *peer_hello} if not key.startswith(INFO_PREFIX))
    rows = [(key, own_hello.get(key), peer_hello.get(key)) for key in keys]
    return [row for row in rows if _to_json(row[1]) != _to_json(row[2])]


def format_differences(diffs: Iterable[Difference]) -> str:
    """Aligned text: a row for each difference, what it is, here, there."""
    rows = [
        (_display_text(key), _display_text(own_value), _display_text(peer_value))
        for key, own_value, peer_value in diffs
    ]
    if not rows:
        return ""
    rows.insert(0, ("", "here", "there"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"  {k:<{widths[0]}}  {h:<{widths[1]}}  {t}" for k, h, t in rows)


def _is_id(text: str) -> bool:
    """Whether this is HOST:PORT#nonce, which can be dialled."""
    if not _ID_PATTERN.fullmatch(text):
        return False
    try:
        address.parse_address(text.rpartition("#")[0])
    except ConfigError:
        return False
    return True


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _display_text(value: Any) -> str:
    """A value for a table; nothing in it can steer a terminal."""
    if value is None:
        return "-"
    text = value if isinstance(value, str) and value.isprintable() and value else _to_json(value)
    return text if len(text) <= 100 else text[:99] + "…"


class Handshake:
    """One side of a new connection, and its frames afterwards. Bytes in, bytes out."""

    def __init__(
        self, secret: bytes, own_id: str, hello: Mapping[str, Any], is_dialler: bool
    ) -> None:
        self.peer_id = ""
        self.peer_hello: dict[str, Any] = {}
        self.is_authenticated = False
        self.is_complete = False
        self.decoder, self.encoder = FrameDecoder(), FrameEncoder()
        self._secret, self._own_id, self._hello, self._is_dialler = (
            secret,
            own_id,
            hello,
            is_dialler,
        )
        self._nonce = secrets.token_hex(32)
        self._peer_nonce = ""

    def first_bytes(self) -> bytes:
        """What to send as soon as there is a connection."""
        return b"" if self._is_dialler else self._encode(self._identity_message())

    def receive(self, body: bytes) -> bytes:
        """Takes the next frame's body and returns the answer; Refused, or BrokenFrame."""
        message = unpack(body)
        if self.is_authenticated:
            return self._receive_hello(message)
        self._check_refusal(message)
        if self._is_dialler and self.peer_id:
            return self._receive_proof(message)
        self._receive_identity(message)
        if self._is_dialler:
            return self._encode({**self._identity_message(), "proof": self._proof("dialler")})
        if not self._is_proof_valid(message, "dialler"):
            raise RefusalError(_SECRET_DIFFERS, self._encode({"refused": "secret"}))
        answer = self._encode({"proof": self._proof("acceptor")})
        self._derive_keys()
        return answer + self.encoder.encode(pack(self._hello))

    def _receive_identity(self, message: dict[str, Any]) -> None:
        if message.get("link") != VERSION:
            reason = (
                f"it speaks version {_display_text(message.get('link'))} of this"
                f" protocol, not {VERSION}"
            )
            raise RefusalError(reason, self._encode({"refused": "version"}))
        peer_id, nonce = message.get("id"), message.get("nonce")
        if not (isinstance(peer_id, str) and _is_id(peer_id)):
            raise FrameError("a first frame without an id")
        if not (isinstance(nonce, str) and _HEX_PATTERN.fullmatch(nonce)):
            raise FrameError("a first frame without a nonce")
        if peer_id == self._own_id:
            raise RefusalError(_REFUSAL_REASONS["itself"], self._encode({"refused": "itself"}))
        self.peer_id, self._peer_nonce = peer_id, nonce

    def _receive_proof(self, message: dict[str, Any]) -> bytes:
        if not self._is_proof_valid(message, "acceptor"):
            raise RefusalError(_SECRET_DIFFERS, self._encode({"refused": "secret"}))
        self._derive_keys()
        return self.encoder.encode(pack(self._hello))

    def _receive_hello(self, message: dict[str, Any]) -> bytes:
        self.peer_hello = message
        mismatches = tuple(differences(self._hello, message))
        if mismatches:
            raise RefusalError("it is not the same run", b"", mismatches)
        self.is_complete = True
        self.decoder.max_body_bytes = MAX_BODY_BYTES
        return b""

    def _check_refusal(self, message: dict[str, Any]) -> None:
        reason = message.get("refused")
        if isinstance(reason, str) and reason in _REFUSAL_REASONS:
            raise RefusalError(_REFUSAL_REASONS[reason])

    def _identity_message(self) -> dict[str, Any]:
        return {"link": VERSION, "id": self._own_id, "nonce": self._nonce}

    def _encode(self, message: Mapping[str, Any]) -> bytes:
        return self.encoder.encode(pack(message))

    def _mac(self, key: bytes, label: str) -> bytes:
        """HMAC over a word, both nonces and both ids, the dialler's first."""
        sides = [(self._nonce, self._own_id), (self._peer_nonce, self.peer_id)]
        dialler, acceptor = sides if self._is_dialler else sides[::-1]
        transcript = json.dumps(["cordee link", VERSION, label, *dialler, *acceptor])
        return hmac.digest(key, transcript.encode(), "sha256")

    def _proof(self, role: str) -> str:
        return self._mac(self._secret, role).hex()

    def _is_proof_valid(self, message: dict[str, Any], role: str) -> bool:
        proof = message.get("proof")
        if not (isinstance(proof, str) and _HEX_PATTERN.fullmatch(proof)):
            return False
        return hmac.compare_digest(proof, self._proof(role))

    def _derive_keys(self) -> None:
        """Keys for both directions; every frame is sealed from here on."""
        root_key = self._mac(self._secret, "keys")
        acceptor_key, dialler_key = (
            self._mac(root_key, "to acceptor"),
            self._mac(root_key, "to dialler"),
        )
        send_key, receive_key = (
            (acceptor_key, dialler_key) if self._is_dialler else (dialler_key, acceptor_key)
        )
        self.encoder.set_key(send_key)
        self.decoder.set_key(receive_key)
        self.is_authenticated = True
