"""`pushstep status`: prints which server answers and which models it holds."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .access import InsecureOption, TlsCaOption, TokenOption, security_of


def status(
    server: Annotated[
        str, typer.Argument(envvar="PUSHSTEP_SERVER", help="HOST:PORT or unix:/path")
    ] = "localhost:7070",
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    token: TokenOption = None,
    tls_ca: TlsCaOption = None,
    insecure: InsecureOption = False,
) -> None:
    """Say which server answers and which models it holds."""
    # not needed for --help
    from pushstep.proto.errors import PushstepError

    from ..transport.dial import dial

    try:
        transport, found = dial(server, timeout_s=3.0, security=security_of(server, token, tls_ca, insecure))
    except PushstepError as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(1) from error
    transport.close()
    facts = {
        "server": server,
        "version": found.server_version,
        "http": found.http_url,
        "models": list(found.models),
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        typer.echo(f"{name:8} {', '.join(value) if isinstance(value, list) else value}")
