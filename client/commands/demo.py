"""`pushstep demo`: trains on real data through the service, and beside it with torch alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pushstep.proto.errors import WrongDtype


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the picture.")] = Path("demo-out"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training flights.")] = 3,
    workers: Annotated[int, typer.Option(min=1, max=16, help="Worker processes.")] = 2,
    wire: Annotated[
        str, typer.Option(help="What gradients travel in: float32, bfloat16, float16 or int8.")
    ] = "float32",
    policy: Annotated[
        str, typer.Option(help="When pushes are applied: async, bounded or sync; all: one after the other.")
    ] = "async",
    shards: Annotated[
        int, typer.Option(min=1, max=16, help="Ranks of the server, each of which holds a part of the model.")
    ] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one line of JSON; progress goes to stderr.")
    ] = False,
) -> None:
    """Train on real flights through a server and workers, and compare with torch's own optimizers."""
    # not needed for --help
    from ..demo.display import Display
    from ..demo.errors import DemoFailed
    from ..demo.run import run_demo
    from ..demo.served import POLICIES
    from ..gradients.compression import push_and_pull

    if policy not in (*POLICIES, "all"):
        raise typer.BadParameter(f"there are {', '.join(POLICIES)} and all", param_hint="--policy")
    try:
        push_and_pull(wire)
    except WrongDtype as unknown:
        raise typer.BadParameter(str(unknown), param_hint="--wire") from unknown
    try:
        result = run_demo(
            out=out,
            epochs=epochs,
            workers=workers,
            wire=wire,
            policies=POLICIES if policy == "all" else (policy,),
            display=Display(stderr=as_json),
            shards=shards,
        )
    except DemoFailed as failed:
        typer.echo(f"pushstep demo failed: {failed}", err=True)
        raise typer.Exit(1) from failed
    if as_json:
        typer.echo(result.as_json())
    short = result.shortcomings()
    for reason in short:
        typer.echo(f"pushstep demo failed: {reason}", err=True)
    if short:
        raise typer.Exit(1)
