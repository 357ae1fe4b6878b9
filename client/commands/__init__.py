"""The `pushstep` command; one file per subcommand."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from .demo import demo
from .status import status

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Use a pushstep server from the command line."
)


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


app.command()(demo)
app.command()(status)


def main() -> None:
    """Run the command line."""
    app()
