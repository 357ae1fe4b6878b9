"""Finds this process's TCP connections by the address of their peer.

gRPC does not expose a connection, but it names the peer of each call.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Container, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import unquote

Place = tuple[IPv4Address | IPv6Address, int]


def place_of(peer: str) -> Place | None:
    """A peer's address and port, from gRPC's text; None without an address, as on a Unix socket."""
    kind, _, rest = peer.partition(":")
    host, _, port = unquote(rest).rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdecimal():
        return None
    return ip_address(host.strip("[]")), int(port)


def connections_to(places: Container[Place]) -> Iterator[tuple[Place, socket.socket]]:
    """The TCP connections whose peers are in `places`, the last opened first. The caller closes each.

    Each is a descriptor of its own: closing it leaves the connection itself open.
    """
    try:
        numbers = sorted(map(int, os.listdir("/proc/self/fd")), reverse=True)
    except OSError:  # not Linux, or no descriptor is free
        return
    for number in numbers:
        with contextlib.suppress(OSError):
            found = socket_of(number)
            try:
                place = _place_of(found)
            except OSError:
                found.close()
                continue
            if place is not None and place in places:
                yield place, found
            else:
                found.close()


def socket_of(number: int) -> socket.socket:
    """A duplicate of the socket with this number, for the caller to close. OSError if it is not a socket.

    `socket.dup` is no substitute: it sets the connection itself to blocking, and gRPC's thread would block in it.
    """
    own = os.dup(number)
    try:
        return socket.socket(fileno=own)
    except OSError:
        os.close(own)
        raise


def _place_of(connection: socket.socket) -> Place | None:
    """The peer as gRPC writes it: an IPv4 peer of a dual-stack socket is IPv4. None if it is not TCP."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    host, port, *_ = connection.getpeername()
    address = ip_address(host)
    return getattr(address, "ipv4_mapped", None) or address, port
