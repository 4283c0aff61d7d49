"""What supervisors may say to each other: every message is held to this before anybody acts on it.

A message in, a reason out; whether it makes sense now is for `membership.py` to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Predicate = Callable[[Any], bool]

MAX_NUMBER = 10**12
"""No generation, process or worker has a larger number."""

_BASE64 = re.compile(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")


def message_error(message: Any) -> str:
    """Why a message is none of ours, in words; "" for a good one."""
    if type(message) is not dict or len(message) != 1:
        return "a message that is not one thing"
    ((kind, body),) = message.items()
    if kind not in _MESSAGE_KINDS:
        return f"a message of an unknown kind, {str(kind)[:40]!r}"
    if kind != "view":
        return (
            ""
            if _MESSAGE_KINDS[kind](body)
            else f"a message {kind!r} that is not as such messages are"
        )
    if type(body) is not dict or type(body.get("kind")) is not str:
        return "a message about views that is not one thing"
    fields = _VIEW_MESSAGES.get(body["kind"])
    if fields is None:
        return f"a message about views of an unknown kind, {body['kind'][:40]!r}"
    for name, check in fields.items():
        if name not in body or not check(body[name]):
            return f"a message {body['kind']!r} whose {name!r} is missing or wrong"
    return ""


def _is_number(value: Any) -> bool:
    return type(value) is int and -1 <= value <= MAX_NUMBER


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_base64(value: Any) -> bool:
    return type(value) is str and _BASE64.fullmatch(value) is not None


def _is_anything(value: Any) -> bool:
    return True


def _optional(check: Predicate) -> Predicate:
    return lambda value: value is None or check(value)


def _list_of(check: Predicate) -> Predicate:
    return lambda value: type(value) is list and all(map(check, value))


def _tuple_of(*checks: Predicate) -> Predicate:
    def is_match(value: Any) -> bool:
        if type(value) is not list or len(value) != len(checks):
            return False
        return all(check(item) for check, item in zip(checks, value, strict=True))

    return is_match


def _dict_of(fields: Mapping[str, Predicate]) -> Predicate:
    return lambda value: (
        type(value) is dict
        and all(name in value and check(value[name]) for name, check in fields.items())
    )


def _is_name_table(value: Any) -> bool:
    return type(value) is dict and all(map(_is_text, value)) and all(map(_is_text, value.values()))


def _is_distinct_list(value: Any) -> bool:
    return _list_of(_is_text)(value) and len(set(value)) == len(value)


_EVENT = _dict_of({"event": _is_text, "says": _is_text})
_ASSIGNMENT = _dict_of(
    {
        "ranks": _list_of(_tuple_of(_is_text, _is_number, _is_number)),
        "plan": _is_text,
        "names": _is_name_table,
        "rescue": _is_flag,
    }
)
_REPORT = _dict_of(
    {
        "name": _is_text,
        "wants": _is_number,
        "begun": _is_flag,
        "stranded": _is_flag,
        "device": _is_text,
        "ready": _list_of(_tuple_of(_is_number, _is_number, _optional(_is_number), _is_number)),
    }
)
_VIEW_FIELDS = _dict_of(
    {
        "number": _is_number,
        "leader": _is_text,
        "hosts": _is_distinct_list,
        "why": _list_of(_EVENT),
        "orders": lambda value: value == {} or _ASSIGNMENT(value),
    }
)


def _is_view(value: Any) -> bool:
    return _VIEW_FIELDS(value) and len(value) == 5 and value["leader"] in value["hosts"]


_MESSAGE_KINDS: Mapping[str, Predicate] = {
    "view": _is_anything,
    "set": _tuple_of(_is_number, _is_text, _is_base64),
    "get": _tuple_of(_is_number, _is_text, _is_number),
    "answer": _tuple_of(_is_number, _is_base64),
    "hello": _is_text,
    "welcome": _is_text,
    "over": lambda value: type(value) is int and 0 <= value <= 255,
}
_HOST_LIST = _list_of(_is_text)
_VIEW_MESSAGES: Mapping[str, Mapping[str, Predicate]] = {
    "beat": {
        **dict.fromkeys(("beat", "view", "formed", "halted"), _is_number),
        "hears": _HOST_LIST,
        "meet": _HOST_LIST,
        **dict.fromkeys(("joining", "leaving", "wants"), _is_flag),
        "register": _is_text,
    },
    "join": {"host": _is_text, "register": _is_text},
    "refused": {"says": _is_text},
    "halt": {
        "number": _is_number,
        "attempt": _is_number,
        "hosts": _HOST_LIST,
        "leavers": _HOST_LIST,
    },
    "halted": {"attempt": _is_number, "report": _REPORT, "calls": _list_of(_EVENT)},
    "refuse": {"attempt": _is_number},
    "enter": {"view": _is_view},
}
