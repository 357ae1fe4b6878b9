"""Where a webhook may go: hosts on the server's list, at addresses that are public, connected to as they were checked.

A URL that an operator sends is an order to this server to connect to somewhere, from inside its network. So only hosts on
the list are resolved at all. The name is resolved once, every address it has is checked, and the connection goes to one of
those addresses: a name that resolves to something else a moment later changes nothing. Redirects are never followed.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pushstep.proto.errors import InvalidHook

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
LONGEST_URL: Final = 2000
PORTS: Final = {"https": 443, "http": 80}
# No user, no backslash, no escape in the host, no fragment, nothing that two readers could take for two things.
_URL: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9.-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*)?"
)
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# Blocks in which an IPv4 address is written as an IPv6 one: NAT64, 6to4, Teredo, mapped, compatible, translated.
_WRAPPED: Final = tuple(
    map(
        ipaddress.ip_network,
        (
            "64:ff9b::/96",
            "64:ff9b:1::/48",
            "2002::/16",
            "2001::/32",
            "::ffff:0:0/96",
            "::/96",
            "::ffff:0:0:0/96",
        ),
    )
)
Resolve = Callable[[str, int], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that may be reached, in its parts."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def host_field(self) -> str:
        """The value of the Host field."""
        return self.host if self.port == PORTS[self.scheme] else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Allowed:
    """What webhooks may reach: hosts as HOST or HOST:PORT, and networks that are not public."""

    hosts: Sequence[str] = ()
    networks: Sequence[str] = ()

    def target(self, url: str) -> Target:
        """The URL in its parts. InvalidHook if it may not be reached, whatever its host resolves to."""
        if len(url) > LONGEST_URL:
            raise InvalidHook(problem=f"a webhook's URL has at most {LONGEST_URL} characters")
        match = _URL.fullmatch(url)
        if match is None:
            raise InvalidHook(
                problem="a webhook's URL is https://HOST/PATH, in ASCII and with the host in small letters; "
                "no user, no fragment and no escapes in the host"
            )
        scheme, host = match["scheme"], match["host"]
        port = PORTS[scheme] if match["port"] is None else int(match["port"])
        literal = _literal(host)
        if literal is not None:
            self.require_public(literal)
        entries = {entry.lower() for entry in self.hosts}
        named = f"{host}:{port}" in entries or (host in entries and port == PORTS[scheme])
        if not named:
            raise InvalidHook(
                problem=f"webhooks may not reach {host} at port {port}: the setting webhook-hosts does not have it"
            )
        return Target(scheme, host, port, match["path"] or "/")

    def require_public(self, address: Address) -> None:
        """InvalidHook unless an address is public, or in one of the networks that the settings name."""
        networks = [ipaddress.ip_network(network) for network in self.networks]
        if any(address.version == network.version and address in network for network in networks):
            return
        wrapped = isinstance(address, ipaddress.IPv6Address) and any(address in block for block in _WRAPPED)
        if wrapped or not address.is_global or address.is_multicast or address.is_reserved:
            raise InvalidHook(
                problem=f"webhooks may not reach {address}, which is no public address; see webhook-networks"
            )

    def addresses(self, target: Target, resolve: Resolve) -> list[str]:
        """The addresses of a target's host, each checked. InvalidHook if one may not be reached, or there is none."""
        literal = _literal(target.host)
        found = [str(literal)] if literal is not None else list(resolve(target.host, target.port))
        if not found:
            raise InvalidHook(problem=f"{target.host} has no address")
        for address in found:
            self.require_public(ipaddress.ip_address(address.partition("%")[0]))
        return found


def _literal(host: str) -> Address | None:
    """The address that a host is; None for a name. InvalidHook for what only looks like one of them."""
    if host.startswith("["):
        try:
            return ipaddress.IPv6Address(host[1:-1])
        except ValueError as error:
            raise InvalidHook(problem=f"{host} is no IPv6 address") from error
    labels = host.split(".")
    # a name whose last label is a number is an address to many resolvers: decimal, octal, hexadecimal, or shortened
    if labels[-1].isdigit() or re.fullmatch(r"0x[0-9a-f]*", labels[-1]):
        try:
            return ipaddress.IPv4Address(host)  # four decimal numbers without leading zeros, and nothing else
        except ValueError as error:
            raise InvalidHook(problem=f"{host} is neither a name nor an IPv4 address") from error
    if not all(map(_LABEL.fullmatch, labels)):
        raise InvalidHook(problem=f"{host} is no host name")
    return None


def resolved(host: str, port: int) -> list[str]:
    """A host's addresses, asked of the system's resolver once. OSError."""
    found: list[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
