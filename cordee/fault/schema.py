"""What supervisors may say to each other: every message is held to this before anybody acts on it.

PAPER: a message in, a reason out. Not here: who may speak at all (`handshake.py`), and whether what
is said makes sense now (`members.py`, `views.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]

MOST = 10**12
"""No generation, process or worker has a larger number."""

_BASE64 = re.compile(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")


def fault_of(message: Any) -> str:
    """Why a message is none of ours, in words; "" for a good one."""
    if type(message) is not dict or len(message) != 1:
        return "a message that is not one thing"
    ((kind, body),) = message.items()
    if kind not in _KINDS:
        return f"a message of an unknown kind, {str(kind)[:40]!r}"
    if kind != "view":
        return "" if _KINDS[kind](body) else f"a message {kind!r} that is not as such messages are"
    if type(body) is not dict or type(body.get("kind")) is not str:
        return "a message about views that is not one thing"
    fields = _VIEWS.get(body["kind"])
    if fields is None:
        return f"a message about views of an unknown kind, {body['kind'][:40]!r}"
    for name, check in fields.items():
        if name not in body or not check(body[name]):
            return f"a message {body['kind']!r} whose {name!r} is missing or wrong"
    return ""


def _number(value: Any) -> bool:
    return type(value) is int and -1 <= value <= MOST


def _text(value: Any) -> bool:
    return type(value) is str


def _flag(value: Any) -> bool:
    return type(value) is bool


def _word(value: Any) -> bool:
    return type(value) is str and _BASE64.fullmatch(value) is not None


def _any(value: Any) -> bool:
    return True


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list(check: Check) -> Check:
    return lambda value: type(value) is list and all(map(check, value))


def _row(*checks: Check) -> Check:
    def right(value: Any) -> bool:
        if type(value) is not list or len(value) != len(checks):
            return False
        return all(check(part) for check, part in zip(checks, value, strict=True))

    return right


def _table(fields: Mapping[str, Check]) -> Check:
    return lambda value: (
        type(value) is dict
        and all(name in value and check(value[name]) for name, check in fields.items())
    )


def _names(value: Any) -> bool:
    return type(value) is dict and all(map(_text, value)) and all(map(_text, value.values()))


def _distinct(value: Any) -> bool:
    return _list(_text)(value) and len(set(value)) == len(value)


_VERDICT = _table({"event": _text, "says": _text})
_ORDERS = _table(
    {
        "ranks": _list(_row(_text, _number, _number)), "plan": _text, "names": _names,
        "rescue": _flag,
    }
)  # fmt: skip
_REPORT = _table(
    {
        "name": _text, "wants": _number, "begun": _flag, "stranded": _flag, "device": _text,
        "ready": _list(_row(_number, _number, _maybe(_number), _number)),
    }
)  # fmt: skip
_VIEW_FIELDS = _table(
    {
        "number": _number, "leader": _text, "hosts": _distinct, "why": _list(_VERDICT),
        "orders": lambda value: value == {} or _ORDERS(value),
    }
)  # fmt: skip


def _view(value: Any) -> bool:
    return _VIEW_FIELDS(value) and len(value) == 5 and value["leader"] in value["hosts"]


_KINDS: Mapping[str, Check] = {
    "view": _any,
    "set": _row(_number, _text, _word),
    "get": _row(_number, _text, _number),
    "answer": _row(_number, _word),
    "hello": _text,
    "welcome": _text,
    "over": lambda value: type(value) is int and 0 <= value <= 255,
}
_HOSTS = _list(_text)
_VIEWS: Mapping[str, Mapping[str, Check]] = {
    "beat": {
        **dict.fromkeys(("beat", "view", "formed", "promised"), _number),
        "hears": _HOSTS, "meet": _HOSTS,
        **dict.fromkeys(("joining", "leaving", "wants", "witnessed"), _flag),
    },
    "join": {"host": _text, "witnessed": _flag},
    "refused": {"says": _text},
    "propose": {"number": _number, "formed": _number, "hosts": _HOSTS, "leavers": _HOSTS},
    "promise": {
        "number": _number, "formed": _maybe(_view), "attempts": _list(_view),
        "report": _REPORT, "calls": _list(_VERDICT),
    },
    "refuse": {"number": _number, "promised": _number},
    "accept": {"view": _view, "base": _maybe(_view)},
    "accepted": {"number": _number},
    "enter": {"view": _view},
}  # fmt: skip
