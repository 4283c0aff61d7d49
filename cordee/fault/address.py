"""HOST:PORT as text, and the sockets that it means.

Not here: the handshake. Traded away: nothing is asked of a name server by the thread that carries
the traffic; who dials a name resolves it first (`resolve`), in a thread of its own.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from typing import Any

from cordee.errors import ConfigError

Place = tuple[socket.AddressFamily, Any]
"""An address family and what `connect` takes."""

_PORT = re.compile("[0-9]{1,5}")


def split(address: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" or "[IPV6]:PORT"; ConfigError for anything else."""
    host, colon, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    right = colon and bare and _PORT.fullmatch(port) and int(port) < 65536
    if not right or (":" in bare) != (bare != host) or not bare.isprintable() or " " in bare:
        fix = f"[{address}]:29500" if address.count(":") > 1 else f"{bare or '127.0.0.1'}:29500"
        raise ConfigError("this is not HOST:PORT", values={"address": address}, fix=fix)
    return bare, int(port)


def joined(host: str, port: int) -> str:
    """The text of a host and a port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve(address: str) -> list[Place]:
    """Where HOST:PORT may be dialled, best first; OSError when the name is known to nobody. A name
    may take seconds; a number never does."""
    host, port = split(address)
    numeric = socket.AI_NUMERICHOST if is_number(host) else 0
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=numeric)
    except UnicodeError as cause:  # a label that is too long for a name
        raise OSError(errno.EINVAL, "not a name") from cause
    return [(row[0], row[4]) for row in found]


def is_number(host: str) -> bool:
    """Whether a host is written as a number, not as a name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def listen(bind: str) -> socket.socket:
    """A listening socket; ConfigError when the host is not of this machine or the port is taken."""
    host, port = split(bind)
    values = {"bind": bind}
    try:
        family, place = resolve(bind)[0]
    except OSError as cause:
        what = f"the name {host} does not resolve"
        raise ConfigError(what, values=values, fix=joined(own_ip(), port)) from cause
    try:
        return _listening(family, place)
    except OSError as cause:
        if cause.errno == errno.EADDRINUSE:
            free = _free_port(family, place)
            what = "the port is taken by another process"
            raise ConfigError(what, values=values, fix=joined(host, free)) from cause
        if cause.errno == errno.EACCES:
            what = "ports below 1024 need special rights"
            raise ConfigError(what, values=values, fix=joined(host, 29500)) from cause
        what = f"{host} is not an address of this machine"
        raise ConfigError(what, values=values, fix=joined(own_ip(), port)) from cause


def own_ip() -> str:
    """The address of this machine towards the world; the loopback's when there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("192.0.2.1", 9))  # chooses a route; nothing is sent
        except OSError:
            return "127.0.0.1"
        return str(asked.getsockname()[0])


def ip_of(place: Any) -> str:
    """The address in what `getsockname` and `accept` return."""
    return str(place[0]).removeprefix("::ffff:")


def _listening(family: socket.AddressFamily, place: Any) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(place)
        made.listen(256)
    except OSError:
        made.close()
        raise
    return made


def _free_port(family: socket.AddressFamily, place: Any) -> int:
    """The next port above that is free; 0, any, when none of twenty is."""
    for port in range(place[1] + 1, min(place[1] + 21, 65536)):
        try:
            _listening(family, (place[0], port, *place[2:])).close()
        except OSError:
            continue
        return port
    return 0
