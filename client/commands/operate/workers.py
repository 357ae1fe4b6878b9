"""`pushstep workers`: who trains a model, and who shall not."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..door import Door, DryRunOption, ModelArgument, Table, YesOption, at_most_one, confirm, listed, operates

COLUMNS = ("worker", "state", "lag", "stale", "seen s", "applied", "other", "flight", "metrics")


def row(worker: dict[str, Any]) -> tuple[Any, ...]:
    """A worker's line in the table."""
    state = [worker["state"], *(word for word in ("lead", "quarantined") if worker[word])]
    outcomes = worker["outcomes"]
    others = sum(count for outcome, count in outcomes.items() if outcome != "applied")
    return (
        worker["name"],
        ", ".join(state),
        worker["lag"],
        worker["staleness"],
        worker["last_seen_s"],
        outcomes.get("applied", 0),
        others,
        worker["in_flight"],
        listed(worker["metrics"]),
    )


@operates
def workers(
    door: Door,
    model: ModelArgument,
    quarantine: Annotated[
        str | None, typer.Option(metavar="WORKER", help="Read nothing more of a worker.")
    ] = None,
    release: Annotated[
        str | None, typer.Option(metavar="WORKER", help="Read a worker's pushes again.")
    ] = None,
    evict: Annotated[
        str | None, typer.Option(metavar="WORKER", help="End a worker's session; it may join again by hand.")
    ] = None,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Show a model's workers; quarantine, release or evict one."""
    from ..rest import model_path

    at_most_one(quarantine=quarantine, release=release, evict=evict)
    if evict is not None:
        if not dry_run:
            confirm(f"End the session of {evict!r}?", yes=yes)
        answer = door.ask("DELETE", model_path(model, "workers", evict), dry_run=dry_run)
        door.show_edit(answer, f"{evict} was evicted from {model}", dry_run=dry_run)
    elif (name := quarantine or release) is not None:
        deed = "quarantine" if quarantine is not None else "release"
        answer = door.ask("POST", model_path(model, "workers", name, deed), dry_run=dry_run)
        done = "is in quarantine" if quarantine is not None else "was released"
        door.show_edit(answer, f"{name} of {model} {done}", dry_run=dry_run)
    else:
        found = door.all_of(model_path(model, "workers"), "workers")
        door.show(found, Table(COLUMNS, map(row, found["workers"])))
