"""`pushstep groups`: a model's param groups, and edits of their hyperparameters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..door import Door, DryRunOption, ModelArgument, SetOption, Table, leaves, operates, pairs

NOT_SETTINGS = {
    "index",
    "rule",
    "optimizer",
    "params",
    "params_total",
    "held",
    "scheduled_by",
    "frozen",
    "etag",
}


def _row(group: dict[str, Any]) -> tuple[Any, ...]:
    settings = {name: value for name, value in group.items() if name not in NOT_SETTINGS}
    state = [*(["frozen"] if group["frozen"] else []), *(f"{name} held" for name in group["held"])]
    return (
        group["index"],
        group["rule"],
        ", ".join(f"{name}={value:g}" for name, value in settings.items() if not isinstance(value, bool)),
        group["params_total"],
        group["scheduled_by"],
        ", ".join(state),
    )


@operates
def groups(
    door: Door,
    model: ModelArgument,
    index: Annotated[
        int | None, typer.Argument(metavar="[INDEX]", help="One group; all if it is left out.")
    ] = None,
    values: SetOption = None,
    freeze: Annotated[
        bool | None, typer.Option("--freeze/--thaw", help="Step the group's parameters no more, or again.")
    ] = None,
    hold: Annotated[
        bool | None,
        typer.Option("--hold/--no-hold", help="Keep what is set against the workers' schedulers, or not."),
    ] = None,
    dry_run: DryRunOption = False,
) -> None:
    """Show a model's param groups, or change hyperparameters of one: `pushstep groups flights 0 --set lr=0.1`."""
    from ..rest import model_path

    changes = pairs(values or ())
    if freeze is not None:
        changes["frozen"] = freeze
    if changes:
        if index is None:
            raise typer.BadParameter("which group?", param_hint="INDEX")
        path = model_path(model, "param-groups", str(index))
        answer = door.ask("PATCH", path, changes, dry_run=dry_run, hold=hold)
        said = ", ".join(f"{name}={value}" for name, value in changes.items())
        door.show_edit(answer, f"group {index} of {model}: {said}", dry_run=dry_run)
    elif index is not None:
        shown = door.ask("GET", model_path(model, "param-groups", str(index)))
        door.show(shown, Table(("", f"group {index}"), leaves(shown)))
    else:
        found = door.all_of(model_path(model, "param-groups"), "param_groups")
        columns = ("group", "rule", "hyperparameters", "parameters", "scheduled by", "")
        door.show(found, Table(columns, map(_row, found["param_groups"])))
