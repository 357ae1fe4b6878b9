"""Checks the addresses that `connect` takes, and finds out what listens there if it is not a pushstep server.

A wrong address is found here, before gRPC retries it over and over. gRPC cannot distinguish a server that is missing,
one that is about to start, and one that speaks another protocol.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import socket
import ssl
import time
from typing import Final
from urllib.parse import quote

from pushstep.proto.errors import InvalidAddress

# Address schemes that gRPC takes beside HOST:PORT.
_GRPC_S_OWN: Final = ("dns:", "ipv4:", "ipv6:", "unix-abstract:", "vsock:")
_PROBE_S: Final = 2.0
_SPEAKS_TLS: Final = "it speaks TLS: pass tls=TLS(ca=...), or set PUSHSTEP_TLS_CA"
_REFUSED: Final = (
    "it ended the connection after the handshake: it asks for a certificate of yours, TLS(cert=..., key=...), or does not "
    "accept the one that it was shown"
)
_AGAIN_S: Final = 0.3
# OpenSSL's names for bytes that are no TLS.
_NO_TLS: Final = frozenset(
    {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"}
)


class Address:
    """An address that was checked. InvalidAddress, which says what to write, for a malformed one."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._host: tuple[str, int] | None = None
        self._path = ""
        if not isinstance(text, str):
            raise InvalidAddress(address=text, problem="an address is a str, HOST:PORT or unix:/path")
        scheme, slashes, rest = text.partition("://")
        if text.startswith("unix:"):
            self._path = rest if slashes and scheme == "unix" else text.removeprefix("unix:")
            if not self._path:
                raise InvalidAddress(address=text, problem="it names no socket: write unix:/path")
        elif slashes and f"{scheme}:" not in _GRPC_S_OWN:
            raise InvalidAddress(address=text, problem=_of_url(scheme, rest))
        elif not text.startswith(_GRPC_S_OWN):
            self._host = _host_and_port(text)

    @property
    def target(self) -> str:
        """The address as gRPC reads it."""
        return target_of(self.text)

    def why_nobody_listens(self) -> str | None:
        """The system's error of a connection there; None if something accepts it, or it is not known."""
        try:
            with contextlib.closing(self._connected()):
                return None
        except (TimeoutError, _NotTried):
            return None
        except OSError as error:
            return error.strerror or str(error)

    def why_not_secure(self, context: ssl.SSLContext | None) -> str | None:
        """In words, why no TLS connection comes about, or why a plain one does not; None if that is not the cause.

        `context`: what TLS is spoken with; None if plain bytes were sent.
        """
        found = self._why_not_secure(context)
        if found == _REFUSED:
            # or it was about to stop: then this is not the cause
            time.sleep(_AGAIN_S)
            found = self._why_not_secure(context)
        return found

    def _why_not_secure(self, context: ssl.SSLContext | None) -> str | None:
        if self._host is None:
            return None
        tried = context
        if tried is None:
            tried = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            tried.check_hostname, tried.verify_mode = False, ssl.CERT_NONE
        try:
            tried.set_alpn_protocols(["h2", "http/1.1"])
            with (
                self._connected() as connection,
                tried.wrap_socket(connection, server_hostname=self._host[0]) as secured,
            ):
                # a server that asks for a certificate refuses after the handshake
                has_ended = not secured.recv(1)
        except ssl.SSLCertVerificationError as error:
            return f"its certificate is not accepted: {error.verify_message}"
        except ssl.SSLEOFError:
            if context is None:
                return None  # a server that stops ends any connection, whatever it speaks
            has_ended = True
        except ssl.SSLError as error:
            if context is None:
                return _SPEAKS_TLS if "ALERT" in (error.reason or "") else None
            if error.reason in _NO_TLS:
                return "it speaks no TLS: pass tls=False, if the network is trusted"
            return f"the TLS handshake failed: {error.reason}"
        except OSError:
            return None
        if context is None:
            return _SPEAKS_TLS
        return _REFUSED if has_ended else None

    def what_speaks_http(self, context: ssl.SSLContext | None = None) -> str | None:
        """In words, which HTTP server listens there; None if none does. `context`: for TLS."""
        if self._host is None:
            return None
        host, port = self._host
        connection = http.client.HTTPConnection(host, port, timeout=_PROBE_S)
        if context is not None:
            connection = http.client.HTTPSConnection(host, port, timeout=_PROBE_S, context=context)
        try:
            connection.request("GET", "/v1")
            body = connection.getresponse().read(1 << 16)
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        try:
            grpc = str(json.loads(body)["grpc"])
        except (ValueError, TypeError, KeyError):
            return "it speaks HTTP: workers connect to the address that pushstep-server prints behind grpc="
        return (
            f"it is a pushstep server's REST door, for operators: workers connect to {_seen_from(host, grpc)}"
        )

    def _connected(self) -> socket.socket:
        if self._host is not None:
            return socket.create_connection(self._host, timeout=_PROBE_S)
        if not self._path:
            raise _NotTried
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(_PROBE_S)
            made.connect(self._path)
        except BaseException:
            made.close()
            raise
        return made


class _NotTried(Exception):
    """The address has one of gRPC's own schemes, and no connection was tried."""


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon:
        raise InvalidAddress(address=text, problem=f"it has no port: write {text or 'HOST'}:7070")
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InvalidAddress(address=text, problem=f"{port!r} is no port: write HOST:PORT")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or (":" in host and not bracketed):
        raise InvalidAddress(address=text, problem="write HOST:PORT, an IPv6 host as [::1]:PORT")
    return (host[1:-1] if bracketed else host), int(port)


def _of_url(scheme: str, rest: str) -> str:
    where = rest.split("/")[0] or "HOST:PORT"
    if scheme in ("http", "https"):
        return f"URLs are for the REST door; workers connect to the gRPC port as HOST:PORT, such as {where.rpartition(':')[0] or where}:7070"
    return f"it is written without {scheme}://, as {where}"


def _seen_from(host: str, grpc: str) -> str:
    """The server's gRPC address: its own port, with the host under which the server was reached."""
    return f"{f'[{host}]' if ':' in host else host}:{grpc.rpartition(':')[2]}"


def target_of(address: str) -> str:
    """An address as gRPC reads it: a Unix socket's path is part of a URI, so it is percent-encoded."""
    scheme, colon, path = address.partition(":")
    return f"unix:{quote(path)}" if colon and scheme == "unix" else address


def is_same_host(address: str) -> bool:
    """Whether an address is certainly on this machine: a Unix socket, localhost or a loopback address."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
