"""Completion of names that a server knows, in a shell: asked when the user presses Tab, soon given up, never loud."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Final

import typer

_ANSWER_S: Final = 1.0


def model_names(context: typer.Context, incomplete: str) -> list[str]:
    """The models of the server that the command line, or the environment, names. None if it does not answer at once."""
    from pushstep.proto.errors import PushstepError

    from .access import is_url, security_of
    from .description import described

    given: dict[str, Any] = context.params
    server = given.get("server") or os.environ.get("PUSHSTEP_SERVER") or "localhost:7070"
    ca, token = given.get("tls_ca"), given.get("token")
    # a token from stdin is not there while a line is being typed
    from_file = token if token != "-" else None  # noqa: S105
    with contextlib.suppress(PushstepError, typer.BadParameter, OSError):
        security = security_of(
            server, from_file, None if ca is None else Path(ca), bool(given.get("insecure"))
        )
        found = None if is_url(server) else described(server, security, _ANSWER_S)
        return [name for name in (found.models if found else ()) if name.startswith(incomplete)]
    return []
