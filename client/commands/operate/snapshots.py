"""`pushstep snapshots`: what a model can go back to."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from ..door import Door, DryRunOption, ModelArgument, Table, YesOption, at_most_one, confirm, operates

COLUMNS = ("snapshot", "version", "timeline", "taken", "bytes", "by")


def _row(snapshot: dict[str, Any]) -> tuple[Any, ...]:
    if "damaged" in snapshot:
        return snapshot["id"], None, None, f"damaged: {snapshot['damaged']}", None, None
    return (
        snapshot["id"],
        snapshot["version"],
        snapshot["timeline"],
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["created"])),
        sum(file["bytes"] for file in snapshot["files"]),
        "the server" if snapshot["automatic"] else "hand",
    )


@operates
def snapshots(
    door: Door,
    model: ModelArgument,
    take: Annotated[bool, typer.Option("--take", help="Save the model as it is now.")] = False,
    restore: Annotated[
        str | None, typer.Option(metavar="ID", help="Go back to a snapshot, on a new timeline.")
    ] = None,
    delete: Annotated[str | None, typer.Option(metavar="ID", help="Delete a snapshot for good.")] = None,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Show a model's snapshots; take, restore or delete one."""
    from ..rest import model_path

    at_most_one(take=take, restore=restore, delete=delete)
    path = model_path(model, "snapshots")
    if take:
        answer = _waited_for("taking a snapshot", lambda: door.ask("POST", path, dry_run=dry_run))
        done = "" if dry_run else f"{answer['id']}: {model} at version {answer['version']}"
        door.show_edit(answer, done, dry_run=dry_run)
    elif restore is not None:
        if not dry_run:
            confirm(f"Set {model!r} back to {restore}? Its workers are told.", yes=yes)
        where = model_path(model, "snapshots", restore, "restore")
        answer = _waited_for("restoring", lambda: door.ask("POST", where, dry_run=dry_run))
        door.show_edit(answer, f"{model} is what {restore} holds", dry_run=dry_run)
    elif delete is not None:
        if not dry_run:
            confirm(f"Delete {delete} for good?", yes=yes)
        answer = door.ask("DELETE", model_path(model, "snapshots", delete), dry_run=dry_run)
        door.show_edit(answer, f"{delete} was deleted", dry_run=dry_run)
    else:
        found = door.all_of(path, "snapshots")
        door.show(found, Table(COLUMNS, map(_row, found["snapshots"])))


def _waited_for(what: str, call: Any) -> Any:
    """What `call` returns; a terminal shows that it is under way."""
    from rich.console import Console

    with Console(stderr=True).status(what):
        return call()
