"""The options of commands that speak with a server: its address, and for those that ask who calls a token and certificates.

A token is never an argument itself, since every user of a machine sees the arguments of its processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..transport.security import Security

ServerOption = Annotated[
    str,
    typer.Option(
        "--server",
        envvar="PUSHSTEP_SERVER",
        help="HOST:PORT or unix:/path, as workers connect; or the REST door's URL.",
    ),
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="@FILE",
        help="The file with the token, or - for stdin; PUSHSTEP_TOKEN has it otherwise.",
    ),
]
TlsCaOption = Annotated[
    Path | None,
    typer.Option("--tls-ca", help="PEM file with the CA of the server's certificate; or PUSHSTEP_TLS_CA."),
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Send the token to another host without TLS, too.")
]


def is_url(server: str) -> bool:
    """Whether a server is named by its REST door's URL, in place of the address for workers."""
    return server.startswith(("http://", "https://"))


def host_and_port(url: str) -> str:
    """HOST:PORT of a URL. BadParameter."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        host, port = "", 0
    if not host:
        raise typer.BadParameter(f"{url} is no URL: write http://HOST:PORT", param_hint="--server")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def security_of(server: str, token: str | None, tls_ca: Path | None, insecure: bool) -> Security:
    """How the server is spoken to. BadParameter for a token or a file that is none, or for one that would be read on the way."""
    from pushstep.proto.errors import InvalidSettings, TokenNotSent

    from ..transport.security import CERT_VARIABLE, KEY_VARIABLE, TLS, Security

    tls: TLS | bool | None = None
    if tls_ca is not None:
        cert, key = (os.environ.get(name) or None for name in (CERT_VARIABLE, KEY_VARIABLE))
        tls = TLS(ca=tls_ca, cert=cert, key=key)
    address = server
    if is_url(server):
        address, tls = host_and_port(server), (tls or True) if server.startswith("https:") else False
    told = None if token is None else read_token(token)
    try:
        made = Security(address, told, tls, insecure)
        if made.is_tls:
            made.context()
    except TokenNotSent:
        raise typer.BadParameter(
            f"a token is not sent to {server} without TLS, where anyone on the way could read it: pass --tls-ca FILE, or "
            "--insecure on a network that you trust",
            param_hint="--token",
        ) from None
    except InvalidSettings as error:
        raise typer.BadParameter(error.message) from None
    return made


def read_token(option: str) -> str:
    """The token that --token names. BadParameter, which does not show it."""
    if option == "-":
        return sys.stdin.readline().strip()
    if not option.startswith("@"):
        raise typer.BadParameter(
            "a token as an argument is seen by every user of this machine: write it into a file and pass --token @FILE, "
            "or set PUSHSTEP_TOKEN",
            param_hint="--token",
        )
    try:
        return Path(option[1:]).read_text().split("\n", 1)[0].strip()
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is no text"
        raise typer.BadParameter(f"cannot read {option[1:]}: {problem}", param_hint="--token") from None
