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

from cordee.dist.ipc import MessageSocket, make_socket_pair
from cordee.errors import ConfigError
from cordee.hardware import system
from tests.conftest import clean_environment

LINUX_CALLS = (
    (os, "memfd_create"), (os, "pidfd_open"), (signal, "pidfd_send_signal"),
    (socket, "SOCK_SEQPACKET"), (socket, "TCP_USER_TIMEOUT"), (socket, "SO_ACCEPTCONN"),
)  # fmt: skip


@pytest.fixture(params=["linux", "portable"])
def platform_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The calls as they are, then as a system has them that lacks Linux's own."""
    if request.param == "portable":
        for module, name in LINUX_CALLS:
            monkeypatch.delattr(module, name)
        monkeypatch.setattr(system, "PROC", Path("/nothing/there"))
    yield request.param


def test_memory_files_are_in_no_folder(
    platform_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = system.memory_file("cordee-test")
    os.write(file, b"words")
    assert os.pread(file, 10, 0) == b"words" and not os.get_inheritable(file)
    assert list(tmp_path.iterdir()) == []
    os.close(file)


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_child_is_seen_to_die(platform_kind: str, is_killed: bool) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input(); raise SystemExit(3)"],
                             stdin=subprocess.PIPE)  # fmt: skip
    child_watch = system.ChildWatch(child)
    with selectors.DefaultSelector() as selector:
        selector.register(child_watch, selectors.EVENT_READ)
        assert not selector.select(0.1) and child.poll() is None
        if is_killed:
            os.kill(child.pid, signal.SIGSTOP)
            child_watch.kill()
        else:
            child.communicate(b"\n")
        assert selector.select(30)
    assert child.wait(30) == (-signal.SIGKILL if is_killed else 3)
    child_watch.kill()  # of the dead: nothing
    child_watch.close()


def test_messages_keep_their_borders(platform_kind: str) -> None:
    """Of both sizes and kinds: ones that the other end takes at once, and ones that it cannot."""
    local_end, remote_socket = make_socket_pair()
    assert (remote_socket.type == socket.SOCK_STREAM) == (platform_kind == "portable")
    remote_end, large_size = MessageSocket(remote_socket), 100_000
    messages = [{"n": n, "word": "x" * (large_size if n % 3 == 0 else n)} for n in range(60)]
    for message in messages:
        local_end.send(message)
    received_messages = []
    while len(received_messages) < len(messages):
        batch = remote_end.receive()
        received_messages += batch
        local_end.flush()
        assert not local_end.is_closed
    assert received_messages == messages and not remote_end.is_closed
    remote_end.send({"say": "last"})
    remote_end.close()
    assert local_end.receive() == [{"say": "last"}] and local_end.is_closed


def test_half_a_message_waits_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "SOCK_SEQPACKET")
    local_end, remote_end = make_socket_pair()
    packet = b'\x07\x00\x00\x00{"a":1}'
    for byte in packet[:-1]:
        remote_end.send(bytes([byte]))
        assert local_end.receive() == []
    remote_end.send(packet[-1:] + packet + packet[:5])
    assert local_end.receive() == [{"a": 1}, {"a": 1}] and not local_end.is_closed
    remote_end.close()
    assert local_end.receive() == [] and local_end.is_closed


def test_a_kind_of_socket_that_only_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS: the constant is there, and the kernel refuses it."""
    monkeypatch.setattr(socket, "SOCK_SEQPACKET", 99)
    local_end, remote_end = system.packet_pair()
    assert local_end.type == remote_end.type == socket.SOCK_STREAM
    local_end.close(), remote_end.close()


@pytest.mark.parametrize("without_prctl", [False, True])
def test_a_process_dies_with_its_parent(without_prctl: bool) -> None:
    worker = (
        "import sys, time; from cordee.hardware import system;"
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
        assert _is_alive(pid)
        process.kill()
    end_s = time.monotonic() + 30
    while _is_alive(pid) and time.monotonic() < end_s:
        time.sleep(0.02)
    if is_orphan := _is_alive(pid):
        os.kill(pid, signal.SIGKILL)
    assert not is_orphan


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("folders", [None, (Path("/dev/fd"),), ()])
def test_connections_are_cut_and_listeners_stay(
    platform_kind: str, folders: tuple[Path, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if folders is not None:
        monkeypatch.setattr(system, "DESCRIPTORS", folders)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server_end, _ = listener.accept()
        addresses = {connection.getsockname() for connection in system.open_tcp_connections()}
        assert {client.getsockname(), server_end.getsockname()} == addresses
        for connection in system.open_tcp_connections():
            connection.shutdown(socket.SHUT_RDWR)
        assert client.recv(1) == b"" == server_end.recv(1)
        new_client = socket.create_connection(listener.getsockname())
        for connection in (client, server_end, new_client):
            connection.close()


def test_interfaces_by_address_whichever_number_the_kernel_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert system.interface_of("127.0.0.1") == "lo"
    assert system.interface_of("192.0.2.1") == ""
    monkeypatch.setattr(system, "ADDRESS_OF_INTERFACE", system.ADDRESS_OF_INTERFACE[::-1])
    assert system.interface_of("127.0.0.1") == "lo"


def test_memory_and_processor_are_known(platform_kind: str) -> None:
    assert 1 << 20 < system.resident_bytes() <= system.peak_bytes() * 1.1
    assert system.host_memory_bytes() > 1 << 28
    assert bool(system.cpu_info()) == (platform_kind == "linux")


def test_resident_memory_without_ps_is_the_peak(
    platform_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "PROC", Path("/nothing/there"))
    monkeypatch.setenv("PATH", "/nothing/there")
    assert system.resident_bytes() == system.peak_bytes()


def test_a_processor_that_only_sysctl_tells_of(monkeypatch: pytest.MonkeyPatch) -> None:
    sysctl_values = {
        "machdep.cpu.brand_string": b"Apple M2\0",
        "hw.optional.arm.FEAT_BF16": (1).to_bytes(4, sys.byteorder),
        "hw.optional.fma": (0).to_bytes(4, sys.byteorder),
    }
    monkeypatch.setattr(system, "PROC", Path("/nothing/there"))
    monkeypatch.setattr(system, "_sysctl", lambda name: sysctl_values.get(name, b""))
    assert system.cpu_info() == "model name : Apple M2\nflags : bf16\n"


def test_windows_is_told_what_it_needs() -> None:
    """No verb, and nothing of the package that imports such calls, is imported for it."""
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "from cordee.cli.main import main\n"
        "codes = [main([verb]) for verb in ('train', 'plan', 'doctor')]\n"
        "import cordee\n"
        "try:\n    cordee.train\n"
        "except cordee.errors.ConfigError as error:\n    codes.append(error.message)\n"
        "print(sorted(name for name in sys.modules if name.startswith('cordee')), codes)"
    )
    result = subprocess.run([sys.executable, "-c", code], env=clean_environment(),
                          capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected_modules = [
        "cordee", "cordee.cli", "cordee.cli.main", "cordee.dist", "cordee.dist.streams",
        "cordee.errors", "cordee.hardware", "cordee.hardware.system",
    ]  # fmt: skip
    assert result.stdout.startswith(f"{expected_modules} [2, 2, 2, 'cordee needs the calls"), (
        result.stdout
    )
    assert result.stderr.count("WSL 2") == 3 and "Traceback" not in result.stderr


def test_other_systems_are_not_refused() -> None:
    system.check_system()


def test_a_system_without_locks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "fcntl", None)
    with pytest.raises(ConfigError, match="WSL 2"):
        system.check_system()
