"""Hosts with networks of their own: namespaces of this machine on one bridge, cut and healed.

Not a test. Needs root and `ip`; names are unique, and everything goes when the context ends.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from types import TracebackType

import pytest


def require_namespaces() -> None:
    """Skips where network namespaces cannot be made, and says why."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    name = f"try{secrets.token_hex(3)}"
    result = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"no network namespaces here: {result.stderr.strip()}")
    subprocess.run(["ip", "netns", "del", name], check=True)


class NetworkNamespaces:
    """`count` namespaces with addresses 10.91.x.1, 10.91.x.2 ... on a bridge in another one."""

    def __init__(self, count: int) -> None:
        self.suffix, self.count = secrets.token_hex(3), count
        self.subnet = f"10.91.{secrets.randbelow(200) + 20}"

    def __enter__(self) -> NetworkNamespaces:
        try:
            hub = f"hub{self.suffix}"
            self._run("ip", "netns", "add", hub)
            self._run_in(hub, "ip", "link", "add", "br0", "type", "bridge")
            self._run_in(hub, "ip", "link", "set", "br0", "up")
            for number in range(self.count):
                namespace, host_end, hub_end = (
                    self.namespace(number),
                    f"n{self.suffix}{number}",
                    f"f{self.suffix}{number}",
                )
                self._run("ip", "netns", "add", namespace)
                self._run("ip", "link", "add", host_end, "type", "veth", "peer", "name", hub_end)
                self._run("ip", "link", "set", hub_end, "netns", hub)
                self._run_in(hub, "ip", "link", "set", hub_end, "master", "br0", "up")
                self._run("ip", "link", "set", host_end, "netns", namespace)
                self._run_in(namespace, "ip", "link", "set", host_end, "name", "eth0")
                self._run_in(namespace, "ip", "addr", "add", f"{self.ip(number)}/24", "dev", "eth0")
                self._run_in(namespace, "ip", "link", "set", "eth0", "up")
                self._run_in(namespace, "ip", "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            self.__exit__(None, None, None)
            pytest.skip(f"no network namespaces here: {error.stderr}")
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        for namespace in [
            *(self.namespace(number) for number in range(self.count)),
            f"hub{self.suffix}",
        ]:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)

    def namespace(self, number: int) -> str:
        """A host's namespace."""
        return f"h{self.suffix}{number}"

    def ip(self, number: int) -> str:
        """A host's address."""
        return f"{self.subnet}.{number + 1}"

    def command_prefix(self, number: int) -> tuple[str, ...]:
        """What a command begins with that runs on a host."""
        return ("ip", "netns", "exec", self.namespace(number))

    def sent_bytes(self, number: int) -> int:
        """What has left a host over the wire."""
        path = "/sys/class/net/eth0/statistics/tx_bytes"
        return int(self._run_in(self.namespace(number), "cat", path))

    def unplug(self, number: int) -> None:
        """Takes the wire away for good; nobody is told."""
        self._run_in(f"hub{self.suffix}", "ip", "link", "del", f"f{self.suffix}{number}")

    def cut(self, number: int) -> None:
        """Nothing passes, in either direction, until `heal`."""
        self._run_in(f"hub{self.suffix}", "ip", "link", "set", f"f{self.suffix}{number}", "down")

    def block_sending(self, number: int, other_number: int) -> None:
        """What a host sends to another one is lost, until `heal`; the other way is free."""
        self._run_in(
            self.namespace(number), "ip", "route", "add", "blackhole", f"{self.ip(other_number)}/32"
        )

    def heal(self, number: int) -> None:
        """A good network again."""
        self._run_in(f"hub{self.suffix}", "ip", "link", "set", f"f{self.suffix}{number}", "up")
        self._run_in(self.namespace(number), "ip", "route", "flush", "type", "blackhole")

    def _run_in(self, namespace: str, *command: str) -> str:
        return self._run("ip", "netns", "exec", namespace, *command)

    def _run(self, *command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
