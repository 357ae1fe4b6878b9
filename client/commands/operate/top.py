"""`pushstep top`: a server's models and their workers, live."""

from __future__ import annotations

import time
from typing import Annotated, Any, Final

import typer

from ..completion import model_names
from ..door import Door, Table, operates
from .workers import COLUMNS as WORKER_COLUMNS
from .workers import row as worker_row

COLUMNS: Final = ("model", "version", "versions/s", "workers", "staleness", "gradient norm", "problem")
# Of a model's workers, those that are shown.
MOST_WORKERS: Final = 20


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


def _row(model: dict[str, Any]) -> tuple[Any, ...]:
    step = model["last_step"] or {}
    rate = model["versions_per_s"]
    return (
        model["name"],
        model["version"],
        None if rate is None else f"{rate:.1f}",
        model["workers_live"],
        step.get("staleness"),
        step.get("gradient_norm"),
        model["failed"] or ("not finite" if model["parameters_nonfinite"] else None),
    )


def _tables(found: dict[str, Any]) -> list[Table]:
    tables = [Table(COLUMNS, map(_row, found["models"]))]
    if "workers" in found:
        tables.append(Table(WORKER_COLUMNS, map(worker_row, found["workers"])))
    return tables


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
    from rich.console import Console, Group
    from rich.live import Live

    rates, count = Rates(), 0
    console = Console()
    live = None if door.as_json or not console.is_terminal else Live(console=console, screen=looks is None)
    try:
        if live is not None:
            live.start()
        while True:
            found = _look(door, model, rates)
            if live is None:
                door.show(found, *_tables(found))
            else:
                live.update(Group(*(table.made() for table in _tables(found))), refresh=True)
            count += 1
            if count == looks:
                return
            time.sleep(every_s)
    except KeyboardInterrupt:
        return
    finally:
        if live is not None:
            live.stop()
