"""Who knows the secret may say what he likes: it ends his connection, and no supervisor."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from cordee.errors import RunError
from cordee.fault.hosts import Hosts, Meeting
from cordee.fault.link import Link
from cordee.fault.members import Member
from cordee.fault.orders import assign
from cordee.fault.pace import Rules
from cordee.fault.schema import fault_of
from tests.paper.test_link import HELLO, SECRET, until

VERDICT = {"event": "joined", "says": "pid 7 is ready", "pid": 7}
WRONG: tuple[Any, ...] = (
    None, True, -2, 10**13, 1.5, "x", "", [], [[]], [None], ["a", "a"], {}, {"a": 1}, [10**400],
)  # fmt: skip


def report(name: str) -> dict[str, Any]:
    """What a host says it has."""
    ready = [[1, 100, None, 0], [2, 101, 0, 1]]
    return {"name": name, "wants": 2, "ready": ready, "begun": True, "stranded": False,
            "device": "cpu"}  # fmt: skip


def member(me: str) -> Member:
    def orders(reports: Any) -> Any:
        return assign(reports, 1, lambda islands, devices: ("{}", islands))

    return Member(me, Rules(), assign=orders, report=lambda: report(me))


def talk() -> list[tuple[str, str, dict[str, Any]]]:
    """(from, to, message) of two hosts of which the second joins, calls and leaves."""
    a, b, now, said = member("a:1#0"), member("b:1#0"), 1.0, []
    a.found(now)
    b.join("a:1", now)
    for tick in range(400):
        now += 0.05
        if tick in (100, 200):
            (b if tick == 100 else a).call(VERDICT, now)
        if tick == 300:
            b.leave(now)
        for one, other in ((a, b), (b, a)):
            one.tick(now)
            one.take_changes()
            for to, message in one.take_outbox():
                said.append((one.me, to, json.loads(json.dumps(message))))
                other.hear(one.me, said[-1][2], now)
    return said


SAID = talk()


def spoiled(value: Any) -> Iterator[Any]:
    """The value with one part of it replaced, at any depth, or left out."""
    yield from WRONG
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            for part in spoiled(value[key]):
                yield value | {key: part}
    elif isinstance(value, list) and value:
        yield value[1:]
        for part in spoiled(value[0]):
            yield [part, *value[1:]]


def test_what_hosts_say_is_in_order() -> None:
    kinds = {message["kind"] for _, _, message in SAID}
    assert kinds >= {"beat", "propose", "promise", "accept", "accepted", "enter"}, kinds
    for _, _, message in SAID:
        assert fault_of({"view": message}) == "", message
    for message in (
        {"set": [3, "key", "YWI="]}, {"get": [3, "key", 0]}, {"answer": [0, ""]}, {"hello": "a"},
        {"welcome": "a"}, {"over": 143},
    ):  # fmt: skip
        assert fault_of(message) == ""


@pytest.mark.parametrize(
    "message",
    [
        {"view": 5}, {"view": {}}, {"view": {"kind": "boo"}}, {"view": {"kind": []}}, {}, [], None,
        {"set": [10**13, "k", "v"]}, {"set": [1, "k", "not base64"]}, {"set": [1, 2]}, {"set": {}},
        {"get": [1, "k", "x"]}, {"answer": [1, "*"]}, {"answer": 3}, {"over": "now"}, {"over": 256},
        {"boo": 1}, {"hello": "a", "over": 0}, {"hello": 5},
    ],
)  # fmt: skip
def test_what_is_no_message_has_a_fault(message: Any) -> None:
    assert fault_of(message)


def test_no_message_that_passes_breaks_a_host() -> None:
    """Each kind that is said, each part of it spoiled."""
    passed, seen = 0, set()
    for sender, to, message in SAID:
        if message["kind"] in seen and message["kind"] != "promise":
            continue
        seen.add(message["kind"])
        for bad in spoiled(message):
            if fault_of({"view": bad}):
                continue
            passed += 1
            host = member(to)
            host.found(1.0)
            for now in (1.1, 1.2):
                with suppress(RunError):
                    host.hear(sender, copy.deepcopy(bad), now)
                host.tick(now)
    assert passed > 50


def test_a_bad_message_ends_its_connection_with_a_reason() -> None:
    a, b = (Link.open("127.0.0.1:0", SECRET, HELLO, fault_of=fault_of) for _ in range(2))
    try:
        a.send(b.id, {"hello": a.id})
        assert until(b.receive) == [(a.id, {"hello": a.id})]
        a.send(b.id, {"view": 5})
        (refusal,) = until(b.refused)
        assert refusal.who == a.id and "not one thing" in refusal.why
        b.dismiss(a.id, "it sent what makes no sense")
        a.send(b.id, {"hello": "again"})  # the link itself goes on
        assert until(b.receive) == [(a.id, {"hello": "again"})]
    finally:
        a.close()
        b.close()


def test_a_host_that_was_made_up_is_not_dialled() -> None:
    rules, secret = Rules(), SECRET
    meeting = Meeting(
        lambda: Link.open("127.0.0.1:0", secret, HELLO, fault_of=fault_of),
        lambda me, **given: Member(me, rules, **given), lambda: False, "cpu",
    )  # fmt: skip
    hosts = Hosts(meeting, lambda reports: {}, dict)
    try:
        beat = next(message for _, _, message in SAID if message["kind"] == "beat")
        hosts.member.hear("b:1#0", {**beat, "joining": True}, 2.0)
        hosts.member._circle.joiners.append("nonsense")
        hosts.member.tick(9.0)
        hosts.carry()
    finally:
        hosts.close()


def test_keys_of_a_generation_that_cannot_be_there_yet_are_not_kept() -> None:
    meeting = Meeting(None, lambda me, **given: Member(me, Rules(), **given), lambda: False, "cpu")
    hosts = Hosts(meeting, lambda reports: {}, dict)
    hosts.keys.begin(1)
    hosts._take("b:1#0", {"set": [10**9, "k", "v"]}, 2.0)
    assert hosts.keys.generation == 1
    hosts._take("b:1#0", {"set": [1, "k", "v"]}, 2.0)
    assert hosts.keys.values == {"k": "v"}
