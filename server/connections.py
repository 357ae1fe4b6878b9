"""The connections of this process by their other end: gRPC has no word for one, but says the peer of each call."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Container, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import unquote

Place = tuple[IPv4Address | IPv6Address, int]


def place_of(peer: str) -> Place | None:
    """Where a peer is, from gRPC's words for it; None of one without an address, as on a Unix socket."""
    kind, _, rest = peer.partition(":")
    host, _, port = unquote(rest).rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdecimal():
        return None
    return ip_address(host.strip("[]")), int(port)


def connections_to(places: Container[Place]) -> Iterator[tuple[Place, socket.socket]]:
    """The TCP connections whose other ends are in `places`, the last opened first; each to be closed by the caller.

    Closing one leaves the connection itself alone: it is a descriptor of its own.
    """
    try:
        numbers = sorted(map(int, os.listdir("/proc/self/fd")), reverse=True)
    except OSError:  # another system than Linux, or no descriptor left to look with
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
    """A socket by its number, to be closed by the caller without closing the original. OSError if it is none.

    Not by `socket.dup`, which sets the connection itself to blocking: gRPC's thread would wait in it.
    """
    own = os.dup(number)
    try:
        return socket.socket(fileno=own)
    except OSError:
        os.close(own)
        raise


def _place_of(connection: socket.socket) -> Place | None:
    """As gRPC writes it: an IPv4 peer of a socket that listens for both is an IPv4 peer."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    host, port, *_ = connection.getpeername()
    address = ip_address(host)
    return getattr(address, "ipv4_mapped", None) or address, port
