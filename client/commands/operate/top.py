"""`pushstep top`: a server's models and their workers, live."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pushstep.proto.errors import NoAnswer, ServerUnavailable, Unavailable

from ..completion import model_names
from ..door import Door, operates, wide_console
from ..failure import words_of
from .screen import MOST_WORKERS, screen

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Rates:
    """How fast versions come, from one look to the next."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[int, float]] = {}

    def of(self, name: str, version: int, now_s: float) -> float | None:
        """Versions per second since the last look; None at the first, and after a restore."""
        before = self._before.get(name)
        self._before[name] = version, now_s
        if before is None or version < before[0]:
            return None
        return (version - before[0]) / max(now_s - before[1], 1e-3)


def _look(door: Door, model: str | None, rates: Rates) -> dict[str, Any]:
    from ..rest import model_path

    held = [door.ask("GET", model_path(model))] if model else door.all_of("/v1/models", "models")["models"]
    now_s = time.monotonic()
    for each in held:
        each["versions_per_s"] = rates.of(each["name"], each["version"], now_s)
    found: dict[str, Any] = {"models": held}
    if len(held) == 1:
        path = model_path(held[0]["name"], "workers")
        found |= {"workers": door.ask("GET", path, limit=MOST_WORKERS)["workers"]}
    return found


@operates
def top(
    door: Door,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="One model, with its workers; all if left out.",
            autocompletion=model_names,
        ),
    ] = None,
    every_s: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    looks: Annotated[int | None, typer.Option(min=1, help="End after so many looks.")] = None,
) -> None:
    """Show models, and one model's workers, as they train, until it is interrupted; with --json a line for each look."""
    from rich.live import Live

    rates, count, found = Rates(), 0, None
    console = wide_console()
    is_live = not door.as_json and console.is_terminal
    # with a number of looks the last one stays on the terminal
    live = Live(console=console, screen=looks is None, auto_refresh=False) if is_live else None
    try:
        if live is not None:
            live.start()
        while True:
            problem = ""
            try:
                found = _look(door, model, rates)
            except (ServerUnavailable, NoAnswer, Unavailable) as error:
                # one that was there may come again: who looks at it sees since when it is gone
                if found is None or live is None:
                    raise
                problem = words_of(error)
            count += 1
            if live is not None:
                live.update(_drawn(console, door, found, problem), refresh=True)
            elif door.as_json:
                typer.echo(json.dumps(found))
            else:
                console.print(_drawn(console, door, found, problem))
            if count == looks:
                return
            time.sleep(every_s)
    except KeyboardInterrupt:
        return
    finally:
        if live is not None:
            live.stop()


def _drawn(console: Console, door: Door, found: dict[str, Any], problem: str) -> RenderableType:
    height = console.height if console.is_terminal else 1000
    made: RenderableType = screen(found, door.server, console.width, height, problem)
    return made
