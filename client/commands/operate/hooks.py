"""`pushstep hooks`: what a model has installed, and what can be installed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..door import Door, DryRunOption, ModelArgument, SetOption, Table, at_most_one, listed, operates, pairs

COLUMNS = ("hook", "kind", "point", "settings", "failures", "dropped")


def _row(hook: dict[str, Any]) -> tuple[Any, ...]:
    return (
        hook["id"],
        hook["kind"],
        hook["point"],
        listed(hook["settings"]),
        hook["failures"],
        hook["dropped"],
    )


@operates
def hooks(
    door: Door,
    model: ModelArgument,
    add: Annotated[str | None, typer.Option(metavar="NAME", help="Install a hook of the catalogue.")] = None,
    point: Annotated[str, typer.Option("--at", metavar="POINT", help="Where: one of torch's.")] = "step_pre",
    first: Annotated[bool, typer.Option("--first", help="In front of the others.")] = False,
    change: Annotated[str | None, typer.Option(metavar="ID", help="Change a hook's settings.")] = None,
    remove: Annotated[str | None, typer.Option(metavar="ID", help="Remove a hook.")] = None,
    catalogue: Annotated[bool, typer.Option("--catalogue", help="Show what can be installed.")] = False,
    values: SetOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Show a model's hooks; add one: `pushstep hooks flights --add clip_grad_norm --set max_norm=1.0`."""
    from ..rest import model_path

    at_most_one(add=add, change=change, remove=remove, catalogue=catalogue)
    settings = pairs(values or ())
    if settings and add is None and change is None:
        raise typer.BadParameter("of which hook? pass --add or --change", param_hint="--set")
    path = model_path(model, "hooks")
    if catalogue:
        known = door.ask("GET", "/v1/hooks")
        rows = [(hook["name"], hook["kind"], ", ".join(hook["points"])) for hook in known["hooks"]]
        door.show(known, Table(("hook", "kind", "points"), rows))
    elif add is not None:
        new = {"name": add, "point": point, "settings": settings, "prepend": first}
        answer = door.ask("POST", path, new, dry_run=dry_run)
        made = "" if dry_run else answer["id"]
        door.show_edit(answer, f"{made} was added to {model}", dry_run=dry_run)
    elif change is not None:
        answer = door.ask(
            "PATCH", model_path(model, "hooks", change), {"settings": settings}, dry_run=dry_run
        )
        door.show_edit(answer, f"{change} of {model} was changed", dry_run=dry_run)
    elif remove is not None:
        answer = door.ask("DELETE", model_path(model, "hooks", remove), dry_run=dry_run)
        door.show_edit(answer, f"{remove} was removed from {model}", dry_run=dry_run)
    else:
        found = door.all_of(path, "hooks")
        door.show(found, Table(COLUMNS, map(_row, found["hooks"])))
