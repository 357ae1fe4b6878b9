"""`pushstep events`: what has happened to a model, and what happens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from ..door import Door, ModelArgument, Table, operates, plain

COLUMNS = ("id", "time", "event", "actor", "version", "")
SHOWN = {"id", "time", "kind", "by", "actor", "timeline", "version", "edit"}


def _row(event: dict[str, Any]) -> tuple[Any, ...]:
    facts = ", ".join(f"{name}={plain(value)}" for name, value in event.items() if name not in SHOWN)
    at = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    return event["id"], at, event["kind"], event["actor"], event["version"], facts


@operates
def events(
    door: Door,
    model: ModelArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what happens, until it is interrupted.")
    ] = False,
    kind: Annotated[str | None, typer.Option(help="Only events of this kind.")] = None,
) -> None:
    """Show what has happened to a model, oldest first; with --json, and with --follow, a line for each event."""
    from ..rest import model_path

    path = model_path(model, "events")
    if not follow:
        found = door.all_of(path, "events", kind=kind)
        door.show(found, Table(COLUMNS, map(_row, found["events"])))
        return
    with door.stream("GET", path, {"kind": kind}, {"Accept": "text/event-stream"}) as answer:
        for name, data in _messages(answer.lines()):
            if door.as_json:
                typer.echo(json.dumps(data))
            elif "kind" in data:
                typer.echo("  ".join(map(plain, _row(data))))
            else:
                typer.echo(f"{name}: {plain(data)}", err=True)


def _messages(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The messages of a stream of server-sent events: name and data."""
    name, data = "", ""
    for line in lines:
        field, _, value = line.partition(":")
        if field == "event":
            name = value.strip()
        elif field == "data":
            data += value.strip()
        elif not line and data:
            yield name, json.loads(data)
            name, data = "", ""
