"""How a command on a data folder ends that cannot do its work: a line on stderr, as JSON if that was asked for, and a status."""

from __future__ import annotations

import json

import typer


def failed(command: str, error: Exception, status: int, *, as_json: bool) -> typer.Exit:
    """Say why; what to raise. The JSON has the shape of the client's commands: {"error": {code, message, fields, exit}}."""
    if as_json:
        # of the catalogue; what is no error of its has no code
        code, fields = getattr(error, "code", ""), getattr(error, "fields", {})
        told = {"code": code, "message": str(error), "fields": fields, "exit": status}
        typer.echo(json.dumps({"error": told}), err=True)
    else:
        typer.echo(f"pushstep {command}: {error}", err=True)
    return typer.Exit(status)
