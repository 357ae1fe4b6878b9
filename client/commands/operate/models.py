"""`pushstep models`: the models that a server holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..completion import model_names
from ..door import Door, DryRunOption, Table, YesOption, confirm, leaves, operates

COLUMNS = ("model", "version", "policy", "workers", "parameters", "bytes", "groups", "hooks", "problem")


def row(model: dict[str, Any]) -> tuple[Any, ...]:
    """A model's line in the table."""
    bad = model["parameters_nonfinite"]
    problem = model["failed"] or (f"not finite: {', '.join(bad)}" if bad else None)
    return (
        model["name"],
        model["version"],
        model["policy"]["policy"],
        model["workers_live"],
        model["parameters"],
        model["bytes"],
        model["groups"],
        model["hooks"],
        problem,
    )


@operates
def models(
    door: Door,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="One model; all if it is left out.", autocompletion=model_names
        ),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the model and its snapshots.")] = False,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Show the models of a server, or one of them; delete one."""
    from ..rest import model_path

    if model is None:
        if delete:
            raise typer.BadParameter("which model?", param_hint="MODEL")
        found = door.all_of("/v1/models", "models")
        lost = [(entry["name"], *[None] * 7, entry["detail"]) for entry in found["not_loaded"]]
        door.show(found, Table(COLUMNS, [*map(row, found["models"]), *lost]))
        return
    if not delete:
        shown = door.ask("GET", model_path(model))
        door.show(shown, Table(("", model), leaves(shown)))
        return
    if not dry_run:
        confirm(f"Delete {model!r} and its snapshots for good?", yes=yes)
    answer = door.ask("DELETE", model_path(model), dry_run=dry_run)
    door.show_edit(answer, f"{model} was deleted", dry_run=dry_run)
