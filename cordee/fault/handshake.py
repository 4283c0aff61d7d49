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

from cordee.errors import ConfigError
from cordee.fault import address
from cordee.fault.frames import MOST_BYTES, BrokenFrame, Opener, Sealer, pack, unpack

VERSION = 1
TOLD = "about."
"""Keys of a hello that begin so are told, not compared."""

_ID = re.compile(r"[!-~]{3,200}#[0-9a-f]{8}")
_HEX = re.compile(r"[0-9a-f]{64}")
_SECRET = "the secret differs: it does not know ours"
_REASONS = {
    "secret": "it refused us, the secret differs: give this host the same secret file",
    "version": "it refused us, it speaks another version of this protocol: install the same cordee",
    "itself": "it is this process itself",
}

Difference = tuple[str, Any, Any]


@dataclass(frozen=True)
class Refusal:
    """A peer that we refused or that refused us: who (id or address), a sentence, and what differs
    as (key, here, there)."""

    who: str
    why: str
    differences: tuple[Difference, ...] = ()

    @property
    def table(self) -> str:
        """What differs, as aligned text; "" when it is not about differences."""
        return table(self.differences)


class Refused(Exception):
    """Ends a handshake: why, what differs, and the `last` bytes that tell the other side."""

    def __init__(
        self, why: str, last: bytes = b"", differences: tuple[Difference, ...] = ()
    ) -> None:
        super().__init__(why)
        self.why, self.last, self.differences = why, last, differences


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    """(key, here, there) for each key whose value differs as JSON; None is the same as no value."""
    keys = sorted(key for key in {*ours, *theirs} if not key.startswith(TOLD))
    pairs = [(key, ours.get(key), theirs.get(key)) for key in keys]
    return [row for row in pairs if _json(row[1]) != _json(row[2])]


def table(diffs: Iterable[Difference]) -> str:
    """Aligned text: a row for each difference, what it is, here, there."""
    rows = [(_shown(key), _shown(here), _shown(there)) for key, here, there in diffs]
    if not rows:
        return ""
    rows.insert(0, ("", "here", "there"))
    wide = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"  {k:<{wide[0]}}  {h:<{wide[1]}}  {t}" for k, h, t in rows)


def _is_id(text: str) -> bool:
    """Whether this is HOST:PORT#nonce, which can be dialled."""
    if not _ID.fullmatch(text):
        return False
    try:
        address.split(text.rpartition("#")[0])
    except ConfigError:
        return False
    return True


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _shown(value: Any) -> str:
    """A value for a table; nothing in it can steer a terminal."""
    if value is None:
        return "-"
    text = value if isinstance(value, str) and value.isprintable() and value else _json(value)
    return text if len(text) <= 100 else text[:99] + "…"


class Handshake:
    """One side of a new connection, and its frames afterwards. Bytes in, bytes out."""

    def __init__(self, secret: bytes, own_id: str, hello: Mapping[str, Any], dials: bool) -> None:
        self.peer = ""
        self.theirs: dict[str, Any] = {}
        self.proven = False
        self.done = False
        self.opener, self.sealer = Opener(), Sealer()
        self._secret, self._own_id, self._hello, self._dials = secret, own_id, hello, dials
        self._nonce = secrets.token_hex(32)
        self._other_nonce = ""

    def first(self) -> bytes:
        """What to send as soon as there is a connection."""
        return b"" if self._dials else self._plain(self._card())

    def take(self, body: bytes) -> bytes:
        """Takes the next frame's body and returns the answer; Refused, or BrokenFrame."""
        message = unpack(body)
        if self.proven:
            return self._take_hello(message)
        self._check_refusal(message)
        if self._dials and self.peer:
            return self._take_answer(message)
        self._take_card(message)
        if self._dials:
            return self._plain({**self._card(), "proof": self._proof("dialler")})
        if not self._proves(message, "dialler"):
            raise Refused(_SECRET, self._plain({"refused": "secret"}))
        answer = self._plain({"proof": self._proof("acceptor")})
        self._agree()
        return answer + self.sealer.seal(pack(self._hello))

    def _take_card(self, message: dict[str, Any]) -> None:
        if message.get("link") != VERSION:
            why = f"it speaks version {_shown(message.get('link'))} of this protocol, not {VERSION}"
            raise Refused(why, self._plain({"refused": "version"}))
        peer, nonce = message.get("id"), message.get("nonce")
        if not (isinstance(peer, str) and _is_id(peer)):
            raise BrokenFrame("a first frame without an id")
        if not (isinstance(nonce, str) and _HEX.fullmatch(nonce)):
            raise BrokenFrame("a first frame without a nonce")
        if peer == self._own_id:
            raise Refused(_REASONS["itself"], self._plain({"refused": "itself"}))
        self.peer, self._other_nonce = peer, nonce

    def _take_answer(self, message: dict[str, Any]) -> bytes:
        if not self._proves(message, "acceptor"):
            raise Refused(_SECRET, self._plain({"refused": "secret"}))
        self._agree()
        return self.sealer.seal(pack(self._hello))

    def _take_hello(self, message: dict[str, Any]) -> bytes:
        self.theirs = message
        different = tuple(differences(self._hello, message))
        if different:
            raise Refused("it is not the same run", b"", different)
        self.done = True
        self.opener.most_bytes = MOST_BYTES
        return b""

    def _check_refusal(self, message: dict[str, Any]) -> None:
        reason = message.get("refused")
        if isinstance(reason, str) and reason in _REASONS:
            raise Refused(_REASONS[reason])

    def _card(self) -> dict[str, Any]:
        return {"link": VERSION, "id": self._own_id, "nonce": self._nonce}

    def _plain(self, message: Mapping[str, Any]) -> bytes:
        return self.sealer.seal(pack(message))

    def _mac(self, key: bytes, word: str) -> bytes:
        """HMAC over a word, both nonces and both ids, the dialler's first."""
        sides = [(self._nonce, self._own_id), (self._other_nonce, self.peer)]
        dialler, acceptor = sides if self._dials else sides[::-1]
        text = json.dumps(["cordee link", VERSION, word, *dialler, *acceptor])
        return hmac.digest(key, text.encode(), "sha256")

    def _proof(self, role: str) -> str:
        return self._mac(self._secret, role).hex()

    def _proves(self, message: dict[str, Any], role: str) -> bool:
        proof = message.get("proof")
        if not (isinstance(proof, str) and _HEX.fullmatch(proof)):
            return False
        return hmac.compare_digest(proof, self._proof(role))

    def _agree(self) -> None:
        """Keys for both directions; every frame is sealed from here on."""
        root = self._mac(self._secret, "keys")
        to_acceptor, to_dialler = self._mac(root, "to acceptor"), self._mac(root, "to dialler")
        ours, theirs = (to_acceptor, to_dialler) if self._dials else (to_dialler, to_acceptor)
        self.sealer.use(ours)
        self.opener.use(theirs)
        self.proven = True
