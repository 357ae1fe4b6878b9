"""What a connection to a server is secured with: TLS, and a token that says who calls.

A token goes over TLS, to this host, or, if told so, over a network that is trusted. It is in no text of ours.
"""

from __future__ import annotations

import os
import re
import ssl
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from pushstep.proto.errors import InvalidSettings, TokenNotSent

from .address import is_same_host

# The characters of a bearer token (RFC 6750).
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]{1,512}=*")
TOKEN_VARIABLE: Final = "PUSHSTEP_TOKEN"  # noqa: S105 - its name
CA_VARIABLE: Final = "PUSHSTEP_TLS_CA"
CERT_VARIABLE: Final = "PUSHSTEP_TLS_CLIENT_CERT"
KEY_VARIABLE: Final = "PUSHSTEP_TLS_CLIENT_KEY"


@dataclass(frozen=True, kw_only=True)
class TLS:
    """Whose certificates are believed, and which is shown. Each is the path of a PEM file."""

    ca: str | Path | None = None
    """The CA of the server's certificate; None for the public ones."""
    cert: str | Path | None = None
    """A certificate of one's own, for a server that asks for one."""
    key: str | Path | None = None
    """Its private key."""


class Security:
    """How one address is spoken to: the options of `connect`, completed by the environment.

    `token`: who calls; by default that of PUSHSTEP_TOKEN. `tls`: the files, or True; by default TLS is spoken if
    PUSHSTEP_TLS_CA names a CA. `insecure`: the token may go to another host without TLS.
    """

    def __init__(
        self,
        address: str,
        token: str | None = None,
        tls: TLS | bool | None = None,
        insecure: bool = False,
    ) -> None:
        """InvalidSettings for an option, or a file, that cannot be used. TokenNotSent without TLS."""
        found = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
        _check_token(found)
        if not isinstance(tls, (TLS, bool, type(None))):
            raise InvalidSettings(problem=f"tls={tls!r}: use True, False or TLS(ca=..., cert=..., key=...)")
        self._token = found
        self._insecure = insecure
        self._wanted = tls
        self._use_for(address)

    def _use_for(self, address: str) -> None:
        self._tls = None if is_unix(address) else _tls(self._wanted)
        self._content = self._read()
        if self._tls is None:
            self.require_private(address)

    def at(self, address: str) -> Security:
        """The same for another address of the same service. InvalidSettings, TokenNotSent."""
        made = copy(self)
        made._use_for(address)
        return made

    def with_token(self, token: str) -> Security:
        """The same with another token. InvalidSettings."""
        _check_token(token)
        made = copy(self)
        made._token = token
        return made

    def require_private(self, address: str) -> None:
        """TokenNotSent unless the token may go to this address without TLS."""
        if self._token and not self._insecure and not is_same_host(address):
            raise TokenNotSent(address=address)

    @property
    def is_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self._tls is not None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """What each call of gRPC carries."""
        return (("authorization", f"Bearer {self._token}"),) if self._token else None

    @property
    def headers(self) -> dict[str, str]:
        """What each request of REST carries."""
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def credentials(self) -> grpc.ChannelCredentials | None:
        """What a channel is made with; None for a plain one."""
        if self._tls is None:
            return None
        ca, cert, key = self._content
        return grpc.ssl_channel_credentials(ca, key, cert)

    def context(self) -> ssl.SSLContext:
        """The same for REST, and for a look at what is wrong. InvalidSettings."""
        if self._tls is None:
            raise InvalidSettings(problem="the server is reached over TLS: pass tls=, or --tls-ca")
        try:
            context = ssl.create_default_context(cafile=self._tls.ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self._tls.cert is not None and self._tls.key is not None:
                context.load_cert_chain(self._tls.cert, self._tls.key, password=lambda: "")
        except OSError as error:
            problem = (isinstance(error, ssl.SSLError) and error.reason) or error.strerror
            raise InvalidSettings(
                problem=f"{_names(self._tls)}: no certificates that can be used ({problem})"
            ) from None
        return context

    def renew(self) -> bool:
        """Read the files anew, such as a certificate that was renewed. Whether they have changed."""
        try:
            content = self._read()
        except InvalidSettings:
            return False  # they may be being written
        changed = content != self._content
        self._content = content
        return changed

    def _read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        if self._tls is None:
            return None, None, None
        return _content(self._tls.ca), _content(self._tls.cert), _content(self._tls.key)


def _check_token(token: object) -> None:
    """InvalidSettings, which does not show it."""
    if not isinstance(token, str) or (token and not _TOKEN.fullmatch(token)):
        raise InvalidSettings(
            problem="token= is no token: letters, digits and '._~+/-', as --make-token prints"
        )


def is_unix(address: str) -> bool:
    """Whether an address is a Unix socket: its bytes do not leave this host, and it speaks no TLS."""
    return isinstance(address, str) and address.startswith(("unix:", "unix-abstract:"))


def _tls(asked: TLS | bool | None) -> TLS | None:
    if asked is False:
        return None
    env = os.environ
    ca = env.get(CA_VARIABLE) or None
    if isinstance(asked, TLS):
        found = asked
    elif asked or ca is not None:
        found = TLS(ca=ca, cert=env.get(CERT_VARIABLE) or None, key=env.get(KEY_VARIABLE) or None)
    else:
        return None
    if (found.cert is None) != (found.key is None):
        raise InvalidSettings(
            problem="a certificate of one's own and its key go together: TLS(cert=..., key=...)"
        )
    return found


def _names(tls: TLS) -> str:
    return ", ".join(str(path) for path in (tls.ca, tls.cert, tls.key) if path is not None)


def _content(path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidSettings(problem=f"cannot read {path}: {error.strerror}") from None
