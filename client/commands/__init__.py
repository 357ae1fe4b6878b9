"""The `pushstep` command; one file per subcommand.

Other packages add theirs by the entry-point group `pushstep.commands`: a name, and a function that typer takes.
"""

from __future__ import annotations

from importlib.metadata import entry_points, version
from typing import Annotated

import typer

from .bench import bench
from .demo import demo
from .explain import explain
from .export import export
from .import_file import import_file
from .operate.capacity import capacity
from .operate.events import events
from .operate.groups import groups
from .operate.hooks import hooks
from .operate.models import models
from .operate.settings import durability, gate, policy
from .operate.shards import shards
from .operate.snapshots import snapshots
from .operate.status import status
from .operate.top import top
from .operate.workers import workers

app = typer.Typer(no_args_is_help=True, help="Use a pushstep server from the command line.")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pushstep {version('pushstep')}")
        raise typer.Exit


@app.callback()
def options(
    asked: Annotated[
        bool,
        typer.Option("--version", help="Say which version this is.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Use a pushstep server from the command line."""


app.command("import")(import_file)
for _command in (
    bench, capacity, demo, durability, events, explain, export, gate, groups, hooks, models, policy, shards, snapshots, status, top, workers
):  # fmt: skip
    app.command()(_command)
for _entry in sorted(entry_points(group="pushstep.commands"), key=lambda entry: entry.name):
    # what it needs to run it imports when it runs
    app.command(_entry.name)(_entry.load())


def main() -> None:
    """Run the command line."""
    app(prog_name="pushstep")
