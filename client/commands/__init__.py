"""The `pushstep` command; one file per subcommand."""

from __future__ import annotations

import typer

from .demo import demo
from .status import status

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Use a pushstep server from the command line."
)
app.command()(demo)
app.command()(status)


def main() -> None:
    """Run the command line."""
    app()
