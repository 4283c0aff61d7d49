"""Calls that not every system has: both ways do the same, the portable one with the call gone."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cordee import system
from cordee.dist.talk import Talk, pair
from cordee.errors import ConfigError
from tests.conftest import clean_environment

GONE = (
    (os, "memfd_create"), (os, "pidfd_open"), (signal, "pidfd_send_signal"),
    (socket, "SOCK_SEQPACKET"), (socket, "TCP_USER_TIMEOUT"), (socket, "SO_ACCEPTCONN"),
)  # fmt: skip


@pytest.fixture(params=["linux", "portable"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The calls as they are, then as a system has them that lacks Linux's own."""
    if request.param == "portable":
        for module, name in GONE:
            monkeypatch.delattr(module, name)
        monkeypatch.setattr(system, "PROC", Path("/nothing/there"))
    yield request.param


def test_memory_files_are_in_no_folder(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = system.memory_file("cordee-test")
    os.write(file, b"words")
    assert os.pread(file, 10, 0) == b"words" and not os.get_inheritable(file)
    assert list(tmp_path.iterdir()) == []
    os.close(file)


@pytest.mark.parametrize("kills", [True, False])
def test_a_child_is_seen_to_die(way: str, kills: bool) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input(); raise SystemExit(3)"],
                             stdin=subprocess.PIPE)  # fmt: skip
    watch = system.ChildWatch(child)
    with selectors.DefaultSelector() as selector:
        selector.register(watch, selectors.EVENT_READ)
        assert not selector.select(0.1) and child.poll() is None
        if kills:
            os.kill(child.pid, signal.SIGSTOP)
            watch.kill()
        else:
            child.communicate(b"\n")
        assert selector.select(30)
    assert child.wait(30) == (-signal.SIGKILL if kills else 3)
    watch.kill()  # of the dead: nothing
    watch.close()


def test_messages_keep_their_borders(way: str) -> None:
    """Of both sizes and kinds: ones that the other end takes at once, and ones that it cannot."""
    ours, theirs = pair()
    assert (theirs.type == socket.SOCK_STREAM) == (way == "portable")
    other, large = Talk(theirs), 100_000
    sent = [{"n": n, "word": "x" * (large if n % 3 == 0 else n)} for n in range(60)]
    for message in sent:
        ours.say(message)
    come = []
    while len(come) < len(sent):
        came = other.hear()
        come += came
        ours.flush()
        assert not ours.closed
    assert come == sent and not other.closed
    other.say({"say": "last"})
    other.close()
    assert ours.hear() == [{"say": "last"}] and ours.closed


def test_half_a_message_waits_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "SOCK_SEQPACKET")
    ours, theirs = pair()
    packet = b'\x07\x00\x00\x00{"a":1}'
    for byte in packet[:-1]:
        theirs.send(bytes([byte]))
        assert ours.hear() == []
    theirs.send(packet[-1:] + packet + packet[:5])
    assert ours.hear() == [{"a": 1}, {"a": 1}] and not ours.closed
    theirs.close()
    assert ours.hear() == [] and ours.closed


def test_a_kind_of_socket_that_only_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS: the constant is there, and the kernel refuses it."""
    monkeypatch.setattr(socket, "SOCK_SEQPACKET", 99)
    ours, theirs = system.packet_pair()
    assert ours.type == theirs.type == socket.SOCK_STREAM
    ours.close(), theirs.close()


@pytest.mark.parametrize("without_prctl", [False, True])
def test_a_process_dies_with_its_parent(without_prctl: bool) -> None:
    worker = (
        "import sys, time; from cordee import system;"
        f" system._libc = (lambda name: None) if {without_prctl} else system._libc;"
        " system.die_with_parent(int(sys.argv[1]), int(sys.argv[2])); print(1, flush=True);"
        " time.sleep(600)"
    )
    parent = (
        "import os, subprocess, sys; life, ours = os.pipe();"
        " child = subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid()),"
        " str(life)], pass_fds=[life], stdout=subprocess.PIPE); child.stdout.readline();"
        " print(child.pid, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", parent, worker], env=clean_environment(),
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert _lives(pid)
        process.kill()
    end = time.monotonic() + 30
    while _lives(pid) and time.monotonic() < end:
        time.sleep(0.02)
    if outlived := _lives(pid):
        os.kill(pid, signal.SIGKILL)
    assert not outlived


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("folders", [None, (Path("/dev/fd"),), ()])
def test_connections_are_cut_and_listeners_stay(
    way: str, folders: tuple[Path, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if folders is not None:
        monkeypatch.setattr(system, "DESCRIPTORS", folders)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        names = {end.getsockname() for end in system.connections()}
        assert {near.getsockname(), far.getsockname()} == names
        for end in system.connections():
            end.shutdown(socket.SHUT_RDWR)
        assert near.recv(1) == b"" == far.recv(1)
        again = socket.create_connection(listener.getsockname())
        for end in (near, far, again):
            end.close()


def test_unanswered_data_is_limited_where_that_can_be(way: str) -> None:
    with socket.socket() as end:
        system.limit_unanswered(end, 3000)
        limit = end.getsockopt(socket.IPPROTO_TCP, 18)  # TCP_USER_TIMEOUT, also where it is gone
    assert limit == (3000 if way == "linux" else 0)


def test_interfaces_by_address_whichever_number_the_kernel_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert system.interface_of("127.0.0.1") == "lo"
    assert system.interface_of("192.0.2.1") == ""
    monkeypatch.setattr(system, "ADDRESS_OF_INTERFACE", system.ADDRESS_OF_INTERFACE[::-1])
    assert system.interface_of("127.0.0.1") == "lo"


def test_memory_and_processor_are_known(way: str) -> None:
    assert 1 << 20 < system.resident_bytes() <= system.peak_bytes() * 1.1
    assert system.host_memory_bytes() > 1 << 28
    assert bool(system.cpu_info()) == (way == "linux")


def test_resident_memory_without_ps_is_the_peak(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "PROC", Path("/nothing/there"))
    monkeypatch.setenv("PATH", "/nothing/there")
    assert system.resident_bytes() == system.peak_bytes()


def test_a_processor_that_only_sysctl_tells_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "machdep.cpu.brand_string": b"Apple M2\0",
        "hw.optional.arm.FEAT_BF16": (1).to_bytes(4, sys.byteorder),
        "hw.optional.fma": (0).to_bytes(4, sys.byteorder),
    }
    monkeypatch.setattr(system, "PROC", Path("/nothing/there"))
    monkeypatch.setattr(system, "_sysctl", lambda name: told.get(name, b""))
    assert system.cpu_info() == "model name : Apple M2\nflags : bf16\n"


def test_windows_is_told_what_it_needs() -> None:
    """No verb, and nothing of the package that imports such calls, is imported for it."""
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "from cordee.cli.main import main\n"
        "codes = [main([verb]) for verb in ('train', 'plan', 'doctor')]\n"
        "import cordee\n"
        "try:\n    cordee.train\n"
        "except cordee.errors.ConfigError as error:\n    codes.append(error.what)\n"
        "print(sorted(name for name in sys.modules if name.startswith('cordee')), codes)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=clean_environment(),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = [
        "cordee", "cordee.cli", "cordee.cli.main", "cordee.dist", "cordee.dist.streams",
        "cordee.errors", "cordee.system",
    ]  # fmt: skip
    assert done.stdout.startswith(f"{loaded} [2, 2, 2, 'cordee needs the calls"), done.stdout
    assert done.stderr.count("WSL 2") == 3 and "Traceback" not in done.stderr


def test_other_systems_are_not_refused() -> None:
    system.check_system()


def test_a_system_without_locks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "fcntl", None)
    with pytest.raises(ConfigError, match="WSL 2"):
        system.check_system()
