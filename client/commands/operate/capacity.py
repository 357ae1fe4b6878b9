"""`pushstep capacity`: what a server holds, and how many workers it carries."""

from __future__ import annotations

from typing import Annotated

import typer

from ..completion import model_names
from ..door import Door, Table, leaves, operates


@operates
def capacity(
    door: Door,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Also how many workers of this model are carried.",
            autocompletion=model_names,
        ),
    ] = None,
    push_every_s: Annotated[
        float | None, typer.Option(help="How often each of them pushes, in seconds.")
    ] = None,
) -> None:
    """Show what a server holds of what it may, its measured rates, and the workers that these are enough for."""
    shown = door.ask("GET", "/v1/capacity", model=model, push_every_s=push_every_s)
    door.show(shown, Table(("", "capacity"), leaves(shown)))
