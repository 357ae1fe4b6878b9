"""`pushstep status`: prints which server answers and which models it holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..access import is_url
from ..door import Door, operates, plain


@operates
def status(
    door: Door,
    where: Annotated[str | None, typer.Argument(metavar="[SERVER]", help="The same as --server.")] = None,
    wait_s: Annotated[
        float, typer.Option("--wait", min=0.0, metavar="SECONDS", help="Wait so long for a server to start.")
    ] = 0.0,
) -> None:
    """Say which server answers and which models it holds."""
    from ..description import description_of

    if is_url(door.server):
        if wait_s:
            raise typer.BadParameter("a URL is not waited for: pass HOST:PORT", param_hint="--wait")
        root, held = door.ask("GET", "/v1"), door.all_of("/v1/models", "models")
        version, http, models = root["version"], door.server, [model["name"] for model in held["models"]]
        rank, ranks = 0, root.get("ranks", 1)
    else:
        found = description_of(door.server, door.security, wait_s)
        version, http, models = found.server_version, found.http_url, list(found.models)
        rank, ranks = int(found.rank), int(found.ranks)
    facts: dict[str, Any] = {"server": door.server, "version": version, "http": http, "models": models}
    if ranks > 1:
        facts |= {"rank": rank, "ranks": ranks}
    lines = [
        f"{name:8} {', '.join(value) or 'none' if isinstance(value, list) else plain(value)}"
        for name, value in facts.items()
    ]
    door.show(facts, said=lines)
