"""The options of commands that speak with a server: its address, and for those that ask who calls a token and certificates.

A token is never an argument itself, since every user of a machine sees the arguments of its processes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..transport.security import Security

ServerOption = Annotated[
    str, typer.Option("--server", envvar="PUSHSTEP_SERVER", help="HOST:PORT or unix:/path")
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


def security_of(server: str, token: str | None, tls_ca: Path | None, insecure: bool) -> Security:
    """How the server is spoken to. Ends the command for a token that was given as an argument. InvalidSettings."""
    from ..transport.security import TLS, Security

    tls = None if tls_ca is None else TLS(ca=tls_ca)
    return Security(server, None if token is None else read_token(token), tls, insecure)


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
