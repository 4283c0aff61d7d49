"""Who knows the secret may say what he likes: it ends his connection, and no supervisor."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from cordee.elastic.assignment import assign_ranks
from cordee.elastic.failure_detector import Timeouts
from cordee.elastic.hosts import HostLink, RendezvousConfig
from cordee.elastic.membership import Member
from cordee.elastic.message_schema import message_error
from cordee.elastic.register import MemoryRegister, ask_register
from cordee.elastic.transport import Transport
from cordee.errors import RunError
from tests.paper.test_link import HELLO, SECRET, wait_until

VERDICT = {"event": "joined", "says": "pid 7 is ready", "pid": 7}
WRONG_VALUES: tuple[Any, ...] = (
    None, True, -2, 10**13, 1.5, "x", "", [], [[]], [None], ["a", "a"], {}, {"a": 1}, [10**400],
)  # fmt: skip


def make_report(name: str) -> dict[str, Any]:
    """What a host says it has."""
    ready = [[1, 100, None, 0], [2, 101, 0, 1]]
    return {"name": name, "wants": 2, "ready": ready, "begun": True, "stranded": False,
            "device": "cpu"}  # fmt: skip


def make_member(own_id: str) -> Member:
    def assign_reports(reports: Any) -> Any:
        return assign_ranks(reports, 1, lambda islands, devices: ("{}", islands))

    return Member(own_id, Timeouts(), assign=assign_reports, report=lambda: make_report(own_id))


def answer_requests(member: Member, register: MemoryRegister, now_s: float) -> None:
    """Does what a member asks of the register, until it asks no more."""
    while requests := member.take_requests():
        for request in requests:
            member.on_register_answer(ask_register(register, request), now_s)


def record_dialogue() -> list[tuple[str, str, dict[str, Any]]]:
    """(from, to, message) of two hosts of which the second joins, calls and leaves."""
    a, b, now_s, messages = make_member("a:1#0"), make_member("b:1#0"), 1.0, []
    register = MemoryRegister()
    a.bootstrap(now_s)
    b.join("a:1", now_s)
    for tick in range(400):
        now_s += 0.05
        if tick in (100, 200):
            (b if tick == 100 else a).request_view(VERDICT, now_s)
        if tick == 300:
            b.leave(now_s)
        for sender, receiver in ((a, b), (b, a)):
            sender.tick(now_s)
            answer_requests(sender, register, now_s)
            sender.take_changes()
            for target, message in sender.take_outbox():
                messages.append((sender.own_id, target, json.loads(json.dumps(message))))
                receiver.receive(sender.own_id, messages[-1][2], now_s)
    return messages


MESSAGES = record_dialogue()


def damaged_values(value: Any) -> Iterator[Any]:
    """The value with one part of it replaced, at any depth, or left out."""
    yield from WRONG_VALUES
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            for part in damaged_values(value[key]):
                yield value | {key: part}
    elif isinstance(value, list) and value:
        yield value[1:]
        for part in damaged_values(value[0]):
            yield [part, *value[1:]]


def test_what_hosts_say_is_in_order() -> None:
    kinds = {message["kind"] for _, _, message in MESSAGES}
    assert kinds >= {"beat", "halt", "halted", "enter"}, kinds
    for _, _, message in MESSAGES:
        assert message_error({"view": message}) == "", message
    for message in (
        {"set": [3, "key", "YWI="]}, {"get": [3, "key", 0]}, {"answer": [0, ""]}, {"hello": "a"},
        {"welcome": "a"}, {"over": 143},
    ):  # fmt: skip
        assert message_error(message) == ""


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
    assert message_error(message)


def test_no_message_that_passes_breaks_a_host() -> None:
    """Each kind that is said, each part of it spoiled."""
    pass_count, seen_kinds = 0, set()
    for sender, target, message in MESSAGES:
        if message["kind"] in seen_kinds and message["kind"] != "halted":
            continue
        seen_kinds.add(message["kind"])
        for variant in damaged_values(message):
            if message_error({"view": variant}):
                continue
            pass_count += 1
            host = make_member(target)
            host.bootstrap(1.0)
            answer_requests(host, MemoryRegister(), 1.0)
            for now_s in (1.1, 1.2):
                with suppress(RunError):
                    host.receive(sender, copy.deepcopy(variant), now_s)
                host.tick(now_s)
    assert pass_count > 50


def test_a_bad_message_ends_its_connection_with_a_reason() -> None:
    a, b = (
        Transport.open("127.0.0.1:0", SECRET, HELLO, message_error=message_error) for _ in range(2)
    )
    try:
        a.send(b.id, {"hello": a.id})
        assert wait_until(b.receive) == [(a.id, {"hello": a.id})]
        a.send(b.id, {"view": 5})
        (refusal,) = wait_until(b.take_refusals)
        assert refusal.peer == a.id and "not one thing" in refusal.reason
        b.disconnect(a.id, "it sent what makes no sense")
        a.send(b.id, {"hello": "again"})  # the link itself goes on
        assert wait_until(b.receive) == [(a.id, {"hello": "again"})]
    finally:
        a.close()
        b.close()


def test_a_host_that_was_made_up_is_not_dialled() -> None:
    rendezvous_config = RendezvousConfig(
        timeouts=Timeouts(),
        device_kind="cpu",
        is_finished=lambda: False,
        open_transport=lambda: Transport.open(
            "127.0.0.1:0", SECRET, HELLO, message_error=message_error
        ),
    )
    host_link = HostLink(rendezvous_config, lambda reports: {}, dict)
    try:
        host_link.pump()
        heartbeat = next(message for _, _, message in MESSAGES if message["kind"] == "beat")
        host_link.member.receive("b:1#0", {**heartbeat, "joining": True}, 2.0)
        host_link.member._heartbeats.joiners.append("nonsense")
        host_link.member.tick(9.0)
        host_link.pump()
    finally:
        host_link.close()


def test_keys_of_a_generation_that_cannot_be_there_yet_are_not_kept() -> None:
    rendezvous_config = RendezvousConfig(
        timeouts=Timeouts(), device_kind="cpu", is_finished=lambda: False
    )
    host_link = HostLink(rendezvous_config, lambda reports: {}, dict)
    host_link.store.start_generation(1)
    host_link._dispatch("b:1#0", {"set": [10**9, "k", "v"]}, 2.0)
    assert host_link.store.generation == 1
    host_link._dispatch("b:1#0", {"set": [1, "k", "v"]}, 2.0)
    assert host_link.store.values == {"k": "v"}
