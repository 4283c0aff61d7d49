"""HOST:PORT as text, and the sockets that it means."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from typing import Any

from cordee.errors import ConfigError

DIAL_TIMEOUT_S = 1.0
"""After this time without an answer a dial is given up."""

SocketAddress = tuple[socket.AddressFamily, Any]
"""An address family and what `connect` takes."""

_PORT = re.compile("[0-9]{1,5}")


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" or "[IPV6]:PORT"; ConfigError for anything else."""
    host, colon, port = address.rpartition(":")
    bare_host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_valid = colon and bare_host and _PORT.fullmatch(port) and int(port) < 65536
    if (
        not is_valid
        or (":" in bare_host) != (bare_host != host)
        or not bare_host.isprintable()
        or " " in bare_host
    ):
        fix = (
            f"[{address}]:29500" if address.count(":") > 1 else f"{bare_host or '127.0.0.1'}:29500"
        )
        raise ConfigError("this is not HOST:PORT", values={"address": address}, fix=fix)
    return bare_host, int(port)


def format_address(host: str, port: int) -> str:
    """The text of a host and a port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve(address: str) -> list[SocketAddress]:
    """Where HOST:PORT may be dialled, best first; OSError when the name is known to nobody. A name
    may take seconds; a number never does."""
    host, port = parse_address(address)
    lookup_flags = socket.AI_NUMERICHOST if is_ip_literal(host) else 0
    try:
        address_infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=lookup_flags)
    except UnicodeError as cause:  # a label that is too long for a name
        raise OSError(errno.EINVAL, "not a name") from cause
    return [(info[0], info[4]) for info in address_infos]


def is_ip_literal(host: str) -> bool:
    """Whether a host is written as a number, not as a name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def open_listener(bind_address: str) -> socket.socket:
    """A listening socket; ConfigError when the host is not of this machine or the port is taken."""
    host, port = parse_address(bind_address)
    values = {"bind": bind_address}
    try:
        family, sockaddr = resolve(bind_address)[0]
    except OSError as cause:
        problem = f"the name {host} does not resolve"
        raise ConfigError(
            problem, values=values, fix=format_address(outbound_ip(), port)
        ) from cause
    try:
        return _bind_listener(family, sockaddr)
    except OSError as cause:
        if cause.errno == errno.EADDRINUSE:
            free_port = _next_free_port(family, sockaddr)
            problem = "the port is taken by another process"
            raise ConfigError(
                problem, values=values, fix=format_address(host, free_port)
            ) from cause
        if cause.errno == errno.EACCES:
            problem = "ports below 1024 need special rights"
            raise ConfigError(problem, values=values, fix=format_address(host, 29500)) from cause
        problem = f"{host} is not an address of this machine"
        raise ConfigError(
            problem, values=values, fix=format_address(outbound_ip(), port)
        ) from cause


def outbound_ip() -> str:
    """The address of this machine towards the world; the loopback's when there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe_socket:
        try:
            probe_socket.connect(("192.0.2.1", 9))  # chooses a route; nothing is sent
        except OSError:
            return "127.0.0.1"
        return str(probe_socket.getsockname()[0])


def listening_endpoint(address: str) -> tuple[str, int]:
    """IP and port where somebody listens at HOST:PORT. May take seconds. ConnectionRefusedError:
    nobody does, at none of the name's addresses; gaierror: no such name; OSError: no answer."""
    failure: OSError = ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens")
    for family, sockaddr in resolve(address):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe_socket:
                probe_socket.settimeout(DIAL_TIMEOUT_S)
                probe_socket.connect(sockaddr)
                # TCP meets itself when nobody listens on a port of this machine that it has drawn.
                if probe_socket.getsockname() != probe_socket.getpeername():
                    return str(sockaddr[0]), int(sockaddr[1])
        except ConnectionRefusedError:
            continue
        except OSError as cause:
            failure = cause
    raise failure


def _bind_listener(family: socket.AddressFamily, sockaddr: Any) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(sockaddr)
        listener.listen(256)
    except OSError:
        listener.close()
        raise
    return listener


def _next_free_port(family: socket.AddressFamily, sockaddr: Any) -> int:
    """The next port above that is free; 0, any, when none of twenty is."""
    for port in range(sockaddr[1] + 1, min(sockaddr[1] + 21, 65536)):
        try:
            _bind_listener(family, (sockaddr[0], port, *sockaddr[2:])).close()
        except OSError:
            continue
        return port
    return 0
