"""`pushstep check`: shows what a data folder holds, verified, and cuts a damaged journal off."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .data_folder import DataFolder
    from .findings import ModelFindings


def check(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A server's data folder, or one model's in it.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Cut a damaged journal off in front of the damage; asks first. Files are renamed, never deleted.",
        ),
    ] = False,
    snapshots: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where the server keeps its snapshots, if not in DIR. Nothing is written there.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Repair without asking.")] = False,
) -> None:
    """Show what a stopped server's folder holds, every byte verified, and what a start would continue from.

    The exit status is 0 if all is well, 1 if something is damaged, 2 if the folder cannot be checked.
    """
    # not needed for --help
    from pushstep.proto.errors import PushstepError

    from ..process.folder_lock import DataFolderLocked
    from .data_folder import NoDataFolder, opened
    from .failure import failed

    if yes and not repair:
        raise typer.BadParameter("it answers what --repair asks", param_hint="--yes")
    if repair and not yes and not sys.stdin.isatty():
        raise typer.BadParameter(
            "nobody can be asked without a terminal; pass --yes, too", param_hint="--repair"
        )
    try:
        with _silent(), opened(folder, snapshots) as data:
            status = _checked(data, as_json=as_json, repair=repair, yes=yes)
    except (NoDataFolder, DataFolderLocked, PushstepError, OSError, ValueError) as error:
        raise failed("check", error, 2, as_json=as_json) from error
    raise typer.Exit(status)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Log nothing: the report says it."""
    log = logging.getLogger("pushstep")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(before)


def _checked(data: DataFolder, *, as_json: bool, repair: bool, yes: bool) -> int:
    import asyncio
    import json

    from .findings import findings_of, mend, steps_of
    from .progress import shown
    from .table import show

    catalog = data.catalog()
    catalog.device.open()

    async def all_found() -> list[ModelFindings]:
        steps = sum(steps_of(catalog, name) for name in data.models)
        with shown(steps, quiet=as_json) as told:
            return [await findings_of(catalog, name, told) for name in data.models]

    found = asyncio.run(all_found())
    if repair:
        broken = [model for model in found if model.repair is not None]
        if not as_json:
            show(data.path, found)
        if broken and _agreed(broken, yes=yes):
            for model in broken:
                mend(catalog, model)
            found = asyncio.run(all_found())
        elif not as_json:
            return _status(found)
    if as_json:
        facts = {"folder": str(data.path), "ok": not _status(found), "models": [m.dump() for m in found]}
        typer.echo(json.dumps(facts))
    else:
        show(data.path, found)
    return _status(found)


def _status(found: list[ModelFindings]) -> int:
    return 0 if all(model.is_well for model in found) else 1


def _agreed(broken: list[ModelFindings], *, yes: bool) -> bool:
    """Say what a repair will do, and ask."""
    for model in broken:
        if model.repair is None:
            continue
        typer.echo(f"model {model.name}, record {model.repair.record}: {model.repair.problem}", err=True)
        for step in model.repair.steps():
            typer.echo(f"  {step}", err=True)
        if model.repair.loses:
            typer.echo(
                "  identity.json: the next timeline, because pushes that were acknowledged are lost; workers are told",
                err=True,
            )
    return yes or typer.confirm("Do this? Nothing is deleted.", err=True)
