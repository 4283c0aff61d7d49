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


def need_namespaces() -> None:
    """Skips where network namespaces cannot be made, and says why."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    name = f"try{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    subprocess.run(["ip", "netns", "del", name], check=True)


class Net:
    """`count` namespaces with addresses 10.91.x.1, 10.91.x.2 ... on a bridge in another one."""

    def __init__(self, count: int) -> None:
        self.key, self.count = secrets.token_hex(3), count
        self.subnet = f"10.91.{secrets.randbelow(200) + 20}"

    def __enter__(self) -> Net:
        try:
            hub = f"hub{self.key}"
            self._run("ip", "netns", "add", hub)
            self._in(hub, "ip", "link", "add", "br0", "type", "bridge")
            self._in(hub, "ip", "link", "set", "br0", "up")
            for number in range(self.count):
                name, near, far = self.name(number), f"n{self.key}{number}", f"f{self.key}{number}"
                self._run("ip", "netns", "add", name)
                self._run("ip", "link", "add", near, "type", "veth", "peer", "name", far)
                self._run("ip", "link", "set", far, "netns", hub)
                self._in(hub, "ip", "link", "set", far, "master", "br0", "up")
                self._run("ip", "link", "set", near, "netns", name)
                self._in(name, "ip", "link", "set", near, "name", "eth0")
                self._in(name, "ip", "addr", "add", f"{self.ip(number)}/24", "dev", "eth0")
                self._in(name, "ip", "link", "set", "eth0", "up")
                self._in(name, "ip", "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            self.__exit__(None, None, None)
            pytest.skip(f"no network namespaces here: {error.stderr}")
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        for name in [*(self.name(number) for number in range(self.count)), f"hub{self.key}"]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def name(self, number: int) -> str:
        """A host's namespace."""
        return f"h{self.key}{number}"

    def ip(self, number: int) -> str:
        """A host's address."""
        return f"{self.subnet}.{number + 1}"

    def prefix(self, number: int) -> tuple[str, ...]:
        """What a command begins with that runs on a host."""
        return ("ip", "netns", "exec", self.name(number))

    def sent_bytes(self, number: int) -> int:
        """What has left a host over the wire."""
        place = "/sys/class/net/eth0/statistics/tx_bytes"
        return int(self._in(self.name(number), "cat", place))

    def unplug(self, number: int) -> None:
        """Takes the wire away for good; nobody is told."""
        self._in(f"hub{self.key}", "ip", "link", "del", f"f{self.key}{number}")

    def cut(self, number: int) -> None:
        """Nothing passes, in either direction, until `heal`."""
        self._in(f"hub{self.key}", "ip", "link", "set", f"f{self.key}{number}", "down")

    def deafen(self, number: int, towards: int) -> None:
        """What a host sends to another one is lost, until `heal`; the other way is free."""
        self._in(self.name(number), "ip", "route", "add", "blackhole", f"{self.ip(towards)}/32")

    def heal(self, number: int) -> None:
        """A good network again."""
        self._in(f"hub{self.key}", "ip", "link", "set", f"f{self.key}{number}", "up")
        self._in(self.name(number), "ip", "route", "flush", "type", "blackhole")

    def _in(self, name: str, *words: str) -> str:
        return self._run("ip", "netns", "exec", name, *words)

    def _run(self, *words: str) -> str:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout
