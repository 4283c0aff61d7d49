"""What two hosts say first on a new connection: who each is, and what their runs must have in
common. Messages are JSON objects, one a line; nothing of them is read before CURVE has proven that
the other side knows the run's secret."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cordee.elastic.address import parse_address
from cordee.errors import ConfigError

VERSION = 2
"""Of this protocol."""
MAX_BODY_BYTES = 8 << 20
MAX_HELLO_BYTES = 64 << 10
"""Most bytes of a message after, and before, the other side is known to be of the same run."""
INFO_PREFIX = "about."
"""Keys of a hello that begin so are for information and are not compared."""

_ID_PATTERN = re.compile(r"[!-~]{3,200}#[0-9a-f]{8}")

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
    """Ends a connection: the reason in words, what differs, and the id if it is believed."""

    def __init__(
        self, reason: str, differences: tuple[Difference, ...] = (), peer_id: str = ""
    ) -> None:
        super().__init__(reason)
        self.reason, self.differences, self.peer_id = reason, differences, peer_id


class FrameError(RefusalError):
    """Bytes that are no message."""


def pack(message: Mapping[str, Any]) -> bytes:
    """A message as JSON without line breaks; ValueError for what is too long or not a number,
    TypeError for what has no JSON."""
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    if len(body) > MAX_BODY_BYTES:
        raise ValueError(
            f"a message of {len(body)} bytes; at most {MAX_BODY_BYTES} are sent at once"
        )
    return body


def unpack(body: bytes) -> dict[str, Any]:
    """The message in a line; FrameError for anything but one JSON object."""
    try:
        message = json.loads(body.decode(), parse_constant=_reject_constant)
    except (ValueError, RecursionError) as cause:
        raise FrameError("a frame that is not JSON") from cause
    if not isinstance(message, dict):
        raise FrameError("a frame that is not a JSON object")
    return message


def pack_hello(own_id: str, hello: Mapping[str, Any]) -> bytes:
    """The first line of a connection."""
    return pack({"link": VERSION, "id": own_id, "hello": hello})


def check_hello(body: bytes, own_id: str, own_hello: Mapping[str, Any]) -> str:
    """The id of who said the first line `body`. RefusalError: it may not talk to us."""
    message = unpack(body)
    if message.get("link") != VERSION:
        version = _display_text(message.get("link"))
        raise RefusalError(
            f"it speaks version {version} of this protocol, not {VERSION}: install the same cordee"
        )
    peer_id, peer_hello = message.get("id"), message.get("hello")
    if not (isinstance(peer_id, str) and _is_id(peer_id) and isinstance(peer_hello, dict)):
        raise FrameError("a first frame without an id")
    if peer_id == own_id:
        raise RefusalError("it is this process itself")
    if mismatches := tuple(differences(own_hello, peer_hello)):
        raise RefusalError("it is not the same run", mismatches, peer_id)
    return peer_id


def differences(own_hello: Mapping[str, Any], peer_hello: Mapping[str, Any]) -> list[Difference]:
    """(key, here, there) for each key whose value differs as JSON; None is the same as no value."""
    keys = sorted(key for key in {*own_hello, *peer_hello} if not key.startswith(INFO_PREFIX))
    rows = [(key, own_hello.get(key), peer_hello.get(key)) for key in keys]
    return [row for row in rows if _to_json(row[1]) != _to_json(row[2])]


def format_differences(diffs: Iterable[Difference]) -> str:
    """Aligned text: a row for each difference, what it is, here, there."""
    rows = [tuple(map(_display_text, row)) for row in diffs]
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
        parse_address(text.rpartition("#")[0])
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


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
