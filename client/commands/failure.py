"""How a command ends that has not done what it was asked: an exit status for scripts, and words that say what to do.

The messages of the catalogue are written for a training loop, or for REST; here the same errors name options of the
command. With --json a failure is one line of JSON on stderr, and stdout stays empty.
"""

from __future__ import annotations

import errno
import json
from enum import IntEnum
from typing import Final

import typer

from pushstep.proto import errors


class Exit(IntEnum):
    """The exit statuses of all commands. Click itself ends with 2 for a wrong command line, and 130 for Ctrl-C."""

    DONE = 0
    # the server refused it, or what was looked at is not well
    REFUSED = 1
    USAGE = 2
    # no server was reached, or it went away
    UNREACHABLE = 3


_UNREACHABLE: Final = (errors.ServerUnavailable, errors.InvalidAddress, errors.TlsFailed, errors.NoAnswer)
# In place of the catalogue's template: the same fields.
_TEXTS: Final[dict[type[errors.PushstepError], str]] = {
    errors.ServerUnavailable: (
        "no pushstep server answers at {address} ({problem}); start one with: pushstep-server, or say where it is: "
        "--server HOST:PORT, or PUSHSTEP_SERVER"
    ),
    errors.Unauthenticated: "{problem}: pass --token @FILE, or set PUSHSTEP_TOKEN",
    errors.PermissionDenied: (
        "{problem} (needed: {need}): pass the token of someone who may, by --token @FILE or PUSHSTEP_TOKEN"
    ),
    errors.UnknownModel: "no model is named {model!r}: `pushstep models` lists them",
    errors.UnknownGroup: (
        "model {model!r} has {groups} param groups; there is no group {group}: `pushstep groups {model}` lists them"
    ),
    errors.UnknownHook: "model {model!r} has no hook {hook!r}: `pushstep hooks {model}` lists them",
    errors.UnknownSnapshot: (
        "model {model!r} has no snapshot {snapshot!r}: `pushstep snapshots {model}` lists them"
    ),
    errors.UnknownWorker: (
        "no worker {worker!r} has joined model {model!r}: `pushstep workers {model}` lists them"
    ),
}
# Behind the catalogue's message.
_ADVICE: Final[dict[type[errors.PushstepError], str]] = {
    errors.TlsFailed: "of this command: --tls-ca FILE, or PUSHSTEP_TLS_CA",
    errors.InvalidAddress: (
        "pass --server HOST:PORT with the port behind grpc=, or a URL, http://HOST:PORT, for the REST door itself"
    ),
    errors.HostNotAllowed: "name the server as it was told to be named: pushstep-server --allowed-hosts",
}


def words_of(error: errors.PushstepError | OSError) -> str:
    """What is wrong and what to do, for who has typed a command."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    text = _TEXTS.get(type(error))
    try:
        said = error.message if text is None else text.format(**error.fields)
    except KeyError:  # of a server of another version
        said = error.message
    advice = _ADVICE.get(type(error))
    if advice is None and text is None and error.code:
        advice = f"pushstep explain {error.code}"
    return said if advice is None else f"{said}\n({advice})"


def failed(error: errors.PushstepError | OSError, *, as_json: bool) -> typer.Exit:
    """Say why on stderr; what to raise. A closed pipe is click's to handle: it ends without a word."""
    if isinstance(error, BrokenPipeError):
        raise error
    status = Exit.UNREACHABLE if isinstance(error, _UNREACHABLE) else Exit.REFUSED
    if as_json:
        code = errno.errorcode.get(error.errno or 0, "") if isinstance(error, OSError) else error.code
        fields = {} if isinstance(error, OSError) else error.fields
        told = {"code": code, "message": words_of(error), "fields": fields, "exit": int(status)}
        typer.echo(json.dumps({"error": told}), err=True)
    else:
        typer.echo(words_of(error), err=True)
    return typer.Exit(status)
