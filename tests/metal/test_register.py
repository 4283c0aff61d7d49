"""The register: one view after the other, whoever asks at once; and what is not to be believed."""

from __future__ import annotations

import fcntl
import select
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cordee.elastic import register as register_module
from cordee.elastic.failure_detector import Timeouts
from cordee.elastic.membership import Member
from cordee.elastic.register import (
    EtcdRegister,
    FolderRegister,
    MemoryRegister,
    Register,
    RegisterClient,
    RegisterError,
    RegisterRequest,
    ask_register,
    parse_etcd_url,
)
from cordee.elastic.views import View
from cordee.errors import ConfigError
from tests.etcd_server import EtcdServer

RUN_ID = "0123"


def make_view(number: int, who: str = "a") -> View:
    return View(number, who, (who, "b"), {"ranks": [["a", 1, 2]]}, ({"event": "e", "says": "ä"},))


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd") / "data") as server:
        yield server


@pytest.fixture(params=["memory", "folder", "etcd"])
def open_register(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Register]:
    """Each call gives what one more host opens."""
    if request.param == "memory":
        memory = MemoryRegister()
        return lambda: memory
    if request.param == "folder":
        return lambda: FolderRegister(tmp_path / "members.json", RUN_ID)
    server: EtcdServer = request.getfixturevalue("etcd")
    return lambda: EtcdRegister(parse_etcd_url(server.url), tmp_path.name)


def test_a_view_is_swapped_only_for_the_one_before(open_register: Callable[[], Register]) -> None:
    register, other = open_register(), open_register()
    assert register.read() is None
    assert register.swap(None, make_view(3)) == make_view(3)
    assert register.identity == (other.read() and other.identity)
    assert other.read() == make_view(3)
    assert other.swap(None, make_view(4)) == make_view(3)
    assert other.swap(make_view(3, "c"), make_view(4)) == make_view(3), "the same number only"
    assert other.swap(make_view(3), make_view(4, "c")) == make_view(4, "c")
    assert register.swap(make_view(3), make_view(4)) == make_view(4, "c")
    assert register.read() == make_view(4, "c")


def test_of_many_at_once_one_is_first(open_register: Callable[[], Register]) -> None:
    open_register().swap(None, make_view(1))
    winners: dict[int, list[str]] = {}

    def climb(who: str) -> None:
        register = open_register()
        view = register.read()
        while view and view.number < 12:
            candidate = make_view(view.number + 1, who)
            previous, view = view, register.swap(view, candidate)
            if view == candidate:
                winners.setdefault(view.number, []).append(who)
            assert view and view.number > previous.number

    threads = [threading.Thread(target=climb, args=(f"h{index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(winners) == list(range(2, 13))
    assert all(len(who) == 1 for who in winners.values()), winners


def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    path = tmp_path / "members.json"
    register = FolderRegister(path, RUN_ID)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RegisterError, match=r"locked for 1\.0 s"):
            register.swap(None, make_view(1))
        assert register.read() is None
    path.write_text("{")
    with pytest.raises(RegisterError, match=r"members.json: what it holds cannot be read"):
        register.read()
    register_module.FolderRegister(tmp_path / "else", "other").swap(None, make_view(1))
    shutil.copy(tmp_path / "else", path)
    with pytest.raises(RegisterError, match="of another run"):
        register.swap(None, make_view(1))
    path.unlink()
    path.mkdir()
    with pytest.raises(RegisterError, match="directory"):
        register.swap(None, make_view(1))
    with pytest.raises(RegisterError, match="No such file"):
        FolderRegister(tmp_path / "no" / "w", RUN_ID).swap(None, make_view(1))


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "members.json"
    path.write_text('{"number": 9, "by": "a", "view": null}')
    assert FolderRegister(path, RUN_ID).read() is None


@pytest.mark.parametrize("url", ["etcd:/a:1", "http://a:1", "etcd://", "etcd://a", "etcd://a:1,b"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_etcd_url(url)


def test_the_first_server_that_answers_is_taken(etcd: EtcdServer, tmp_path: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        servers = [deaf.getsockname(), ("127.0.0.1", etcd.port)]
        register = EtcdRegister(servers, tmp_path.name)
        assert register.swap(None, make_view(1)) == make_view(1)
        with pytest.raises(RegisterError, match="Connection refused"):
            EtcdRegister(servers[:1], tmp_path.name).read()


def test_an_etcd_that_is_away_slow_or_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(register_module, "ETCD_TIMEOUT_S", 0.3)
    with EtcdServer(tmp_path / "data") as server:
        register = EtcdRegister(parse_etcd_url(server.url), RUN_ID)
        register.swap(None, make_view(1))
        server.freeze()
        with pytest.raises(RegisterError, match="timed out"):
            register.swap(make_view(1), make_view(2))
        server.thaw()
        server.stop()
        with pytest.raises(RegisterError, match="Connection refused"):
            register.read()
        server.start()
        # What timed out may have been done.
        assert register.swap(make_view(1), make_view(2)) == make_view(2)


def answer_requests(member: Member, register: Register, now_s: float) -> None:
    while requests := member.take_requests():
        for request in requests:
            member.on_register_answer(ask_register(register, request), now_s)


def test_another_cluster_and_one_that_was_restored_are_refused(tmp_path: Path) -> None:
    with EtcdServer(tmp_path / "data") as server:
        register = EtcdRegister(parse_etcd_url(server.url), RUN_ID)
        member = Member("a#0", Timeouts(), assign=dict, report=list)
        member.bootstrap(1.0)
        answer_requests(member, register, 1.0)
        server.stop()
        shutil.copytree(tmp_path / "data", tmp_path / "backup")
        server.start()
        member.request_view({"event": "joined"}, 2.0)
        answer_requests(member, register, 2.0)
        assert member.view and member.view.number == 2
        server.stop()
        shutil.rmtree(tmp_path / "data")
        shutil.copytree(tmp_path / "backup", tmp_path / "data")
        server.start()
        member.take_changes()
        member.request_view({"event": "joined"}, 3.0)
        answer_requests(member, register, 3.0)
        assert "refused: it went back from generation 2 to 1" in member.register_problem
        server.stop()
        shutil.rmtree(tmp_path / "data")
        server.start()
        member.tick(4.0)
        member.tick(4.5)
        answer_requests(member, register, 5.0)
        assert "refused: it is another one (the etcd cluster " in member.register_problem
        assert member.take_changes() == [] and member.view.number == 2, "the run goes on"


class HangingRegister:
    """Answers when it is let."""

    identity = "hanging"

    def __init__(self) -> None:
        self.is_free = threading.Event()

    def read(self) -> View | None:
        self.is_free.wait(30)
        return None

    def swap(self, previous: View | None, view: View) -> View | None:
        return self.read()


def test_a_register_that_hangs_holds_up_nobody() -> None:
    hanging = HangingRegister()
    client = RegisterClient(hanging)
    try:
        start_s = time.monotonic()
        request = RegisterRequest("a#0", 1)
        client.submit(request)
        assert client.take_answers() == [] and time.monotonic() - start_s < 5.0
        assert not select.select([client], [], [], 0.0)[0]
        hanging.is_free.set()
        assert select.select([client], [], [], 30.0)[0]
        (answer,) = client.take_answers()
        assert answer.request is request and not answer.error
        assert not select.select([client], [], [], 0.0)[0]
    finally:
        client.close()
