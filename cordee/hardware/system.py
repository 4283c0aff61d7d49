"""Calls that not every system has, each with a portable way beside it.

Which way is taken follows from whether the call is there, never from a system's name; one that does
less says so.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cordee.errors import ConfigError

try:
    import fcntl
    import resource
except ImportError:  # Windows: nothing below `check_system` is used there
    fcntl = resource = None  # type: ignore[assignment]

PROC = Path("/proc")
DESCRIPTORS = (PROC / "self/fd", Path("/dev/fd"))
"""Where a process sees which descriptors it has open."""

STREAM_BYTES = 1 << 20
"""Buffer of a pair of streams: where packets keep no borders the default may be as low as 8 KiB."""

ADDRESS_OF_INTERFACE = (0x8915, 0xC0206921)
"""SIOCGIFADDR, an interface's IPv4 address: Linux's number, and the BSDs' and macOS's. A kernel
refuses the other's. In both the address stands at bytes 20 to 23 of the answer."""

SYSCTL_FLAGS = {
    "hw.optional.arm.FEAT_BF16": "bf16", "hw.optional.avx512f": "avx512f",
    "hw.optional.fma": "fma",
}  # fmt: skip
"""Where macOS says what /proc/cpuinfo calls a flag."""


def check_system() -> None:
    """ConfigError on a system without POSIX's calls (Windows)."""
    if fcntl is None:
        raise ConfigError(
            "cordee needs the calls of Linux or macOS, which this system does not have",
            values={"system": platform.system()},
            fix="on Windows, WSL 2: wsl --install, then install and run cordee inside it",
        )


# ---- processes ----


def memory_file(name: str) -> int:
    """A descriptor of an empty file that no folder shows and that ends with its last descriptor.
    Without memfd: a temporary file, on the disk of the system's temporary folder."""
    with suppress(AttributeError, OSError):
        return os.memfd_create(name)
    descriptor, path = tempfile.mkstemp(prefix=name)
    os.unlink(path)
    return descriptor


class AdoptedChild:
    """A child by `set_subreaper`, that some other process started and left; with the calls of
    `subprocess.Popen`, and as there an exit code that somebody else has taken is 0."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._exit_code: int | None = None

    def poll(self) -> int | None:
        if self._exit_code is None:
            with suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if not pid:
                    return None
                self._exit_code = os.waitstatus_to_exitcode(status)
        return self._exit_code or 0

    def wait(self, timeout: float | None = None) -> int:
        descriptor = os.pidfd_open(self.pid) if self.poll() is None else -1
        if descriptor >= 0:
            select.select([descriptor], [], [], timeout)
            os.close(descriptor)
        exit_code = self.poll()
        if exit_code is None:
            raise subprocess.TimeoutExpired(f"pid {self.pid}", timeout or 0.0)
        return exit_code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


ChildProcess = subprocess.Popen[bytes] | AdoptedChild


class ChildWatch:
    """A child that is seen to die at once: readable from then on. Without pidfd a thread waits for
    it, which also reaps it: its exit code is then known to `process` alone."""

    def __init__(self, process: ChildProcess) -> None:
        self._process, self._has_pidfd = process, True
        try:
            self._descriptor = os.pidfd_open(process.pid)
        except (AttributeError, OSError):
            self._has_pidfd = False
            self._descriptor, write_end = os.pipe()
            threading.Thread(target=self._wait, args=(write_end,), daemon=True).start()

    def fileno(self) -> int:
        """For a selector."""
        return self._descriptor

    def kill(self) -> None:
        """Ends the child, also a stopped one; nothing when it is dead."""
        with suppress(ProcessLookupError):
            if self._has_pidfd:
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
            else:
                self._process.kill()

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self._descriptor)

    def _wait(self, write_end: int) -> None:
        self._process.wait()
        os.close(write_end)


def die_with_parent(parent_pid: int, lifeline: int) -> None:
    """Lets this process die with `parent_pid`. Without prctl a thread waits for the end of the pipe
    `lifeline`, whose other end the parent alone has; so a stopped process dies when it goes on."""
    pr_set_pdeathsig = 1
    prctl = _libc("prctl")
    if prctl is not None and prctl(pr_set_pdeathsig, signal.SIGKILL) == 0:
        if os.getppid() != parent_pid:  # it died before we asked
            os._exit(1)
        return

    def wait_for_parent() -> None:
        os.read(lifeline, 1)
        os._exit(1)

    threading.Thread(target=wait_for_parent, name="cordee-lifeline", daemon=True).start()


def set_subreaper(is_on: bool) -> bool:
    """From now on orphans among this process's descendants become its children, so that it can wait
    for them; False on a system without such a call."""
    pr_set_child_subreaper = 36
    prctl = _libc("prctl")
    return prctl is not None and prctl(pr_set_child_subreaper, int(is_on), 0, 0, 0) == 0


def set_process_name(name: str, *, thread: bool = False) -> None:
    """What `top` and `ps` call this process, or this thread of it; without /proc, nothing."""
    with suppress(OSError):
        (PROC / ("thread-self" if thread else "self") / "comm").write_text(name)


def _libc(name: str) -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    """A function of the C library; None where it has none of that name."""
    with suppress(OSError, TypeError):
        return getattr(ctypes.CDLL(None), name, None)
    return None


# ---- sockets and pipes ----


def packet_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends for messages. SOCK_SEQPACKET, which keeps their borders; without it a
    SOCK_STREAM (see `type`), on which the caller writes lengths. macOS has the name, not the kind.
    """
    with suppress(AttributeError, OSError):
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for endpoint in sockets:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with suppress(OSError):
                endpoint.setsockopt(socket.SOL_SOCKET, option, STREAM_BYTES)
    return sockets


def nonblocking_pipe() -> tuple[int, int]:
    """A pipe that never blocks and that children do not inherit (what pipe2 makes in one call)."""
    descriptors = os.pipe()
    for descriptor in descriptors:
        os.set_blocking(descriptor, False)
    return descriptors


def open_tcp_connections() -> Iterator[socket.socket]:
    """This process's TCP connections, each as a second socket on it that is closed afterwards. Not
    those that listen."""
    for descriptor in open_descriptors():
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and not _is_listening(
                    connection
                ):
                    yield connection
        except OSError:
            continue


def open_descriptors() -> list[int]:
    """This process's descriptors, or numbers among which they are; one may be closed by now."""
    for folder in DESCRIPTORS:
        with suppress(OSError):
            return [int(name) for name in os.listdir(folder)]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return list(range(min(limit, 1 << 16) if limit >= 0 else 1 << 16))


def _is_listening(connection: socket.socket) -> bool:
    try:
        return bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except (AttributeError, OSError):  # no such question here: what listens has no peer
        try:
            connection.getpeername()
        except OSError:
            return True
        return False


def interface_of(ip: str) -> str:
    """The network interface that has this IPv4 address; "" when none is known to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            for request_code in ADDRESS_OF_INTERFACE:
                with suppress(OSError):  # an interface without one, or another kernel's number
                    reply = fcntl.ioctl(query_socket, request_code, request)
                    if socket.inet_ntoa(reply[20:24]) == ip:
                        return name
                    break
    return ""


# ---- memory and processor ----


def resident_bytes() -> int:
    """Memory that this process holds now. Without /proc `ps` says it, and without `ps` the most
    that it ever held is what is known."""
    with suppress(OSError, IndexError, ValueError):
        pages = (PROC / "self/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()
    with suppress(OSError, ValueError):
        command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
        return int(subprocess.run(command, capture_output=True, text=True).stdout) * 1024
    return peak_bytes()


def peak_bytes() -> int:
    """Most memory that this process ever held."""
    # The one fact that no call tells: macOS counts in bytes, all others in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def host_memory_bytes() -> int:
    """Memory of this machine; 0 when it does not say."""
    with suppress(OSError):
        meminfo_match = re.search(
            r"^MemTotal:\s*(\d+) kB", (PROC / "meminfo").read_text(), re.MULTILINE
        )
        if meminfo_match:
            return int(meminfo_match.group(1)) * 1024
    with suppress(OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def cpu_info() -> str:
    """The processor as /proc/cpuinfo tells it; without that, as far as `sysctl` does, in the same
    words (model name, flags). Empty when nothing does."""
    with suppress(OSError):
        return (PROC / "cpuinfo").read_text(errors="replace")
    model = sysctl_text("machdep.cpu.brand_string")
    flags = [flag for name, flag in SYSCTL_FLAGS.items() if sysctl_number(name)]
    lines = [
        f"model name : {model}" if model else "",
        f"flags : {' '.join(flags)}" if flags else "",
    ]
    return "".join(f"{line}\n" for line in lines if line)


def read_text(path: str | Path) -> str:
    """A file of the system; empty where it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def sysctl_text(name: str) -> str:
    """A text that the kernel tells by name; "" where it does not."""
    return _sysctl(name).rstrip(b"\0").decode(errors="replace")


def sysctl_number(name: str) -> int:
    """A whole number that the kernel tells by name; 0 where it does not."""
    return int.from_bytes(_sysctl(name), sys.byteorder)


def _sysctl(name: str) -> bytes:
    sysctlbyname = _libc("sysctlbyname")
    if sysctlbyname is None:
        return b""
    buffer = ctypes.create_string_buffer(256)
    size = ctypes.c_size_t(len(buffer))
    if sysctlbyname(name.encode(), buffer, ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        return b""
    return buffer.raw[: size.value]
