"""An etcd of one server, in a folder and on ports of its own: started, frozen, stopped, restored.

Not a test.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType

import pytest

START_DEADLINE_S = 30.0


def require_etcd() -> None:
    """Skips where no etcd is installed."""
    if shutil.which("etcd") is None:
        pytest.skip("needs the program etcd (Debian: etcd-server)")


class EtcdServer:
    """A context in which an etcd runs at `url`."""

    def __init__(self, folder: Path) -> None:
        require_etcd()
        self.folder = folder
        self.port, self._peer_port = _free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """As launch.register takes it."""
        return f"etcd://127.0.0.1:{self.port}"

    def __enter__(self) -> EtcdServer:
        self.start()
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts it on what its folder holds, and waits until it answers. A new folder makes a new
        cluster, as etcd names clusters by a token."""
        token = self.folder.with_name(f"{self.folder.name}.token")
        if not self.folder.exists():
            token.write_text(uuid.uuid4().hex)
        peer_url, url = f"http://127.0.0.1:{self._peer_port}", f"http://127.0.0.1:{self.port}"
        self._process = subprocess.Popen(
            ["etcd", "--name=one", f"--data-dir={self.folder}", f"--listen-client-urls={url}",
             f"--advertise-client-urls={url}", f"--listen-peer-urls={peer_url}",
             f"--initial-advertise-peer-urls={peer_url}", f"--initial-cluster=one={peer_url}",
             f"--initial-cluster-token={token.read_text()}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + START_DEADLINE_S
        while not self._is_healthy():
            assert time.monotonic() < deadline and self._process.poll() is None, "etcd: no start"
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends it without a warning, as a power cut does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It keeps its connections and answers nobody."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def _is_healthy(self) -> bool:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=2.0)
        try:
            connection.request("GET", "/health")
            return b'"true"' in connection.getresponse().read()
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, each another one."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
