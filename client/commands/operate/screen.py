"""What `pushstep top` draws: a headline, the models, one model's workers, and what is wrong, at any width."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..door import listed, plain

# Of a model's workers, those that are shown.
MOST_WORKERS: Final = 20
_LONGEST: Final = 32
# Between two columns, as the box of the tables has it.
GAP: Final = 3


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, its text, and how soon it goes when the terminal is narrow: 0 never, the highest first."""

    heading: str
    text: Callable[[Mapping[str, Any]], Any]
    goes: int = 0
    number: bool = True


def _step(name: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda model: (model["last_step"] or {}).get(name)


def _problem(model: Mapping[str, Any]) -> str:
    if model["failed"]:
        return str(model["failed"])
    return (
        f"not finite: {', '.join(model['parameters_nonfinite'])}" if model["parameters_nonfinite"] else "ok"
    )


def _rate(model: Mapping[str, Any]) -> str | None:
    rate = model["versions_per_s"]
    return None if rate is None else f"{rate:.1f}"


def _state(worker: Mapping[str, Any]) -> str:
    return ", ".join([worker["state"], *(word for word in ("lead", "quarantined") if worker[word])])


def _refused(worker: Mapping[str, Any]) -> int:
    return sum(count for outcome, count in worker["outcomes"].items() if outcome != "applied")


MODELS: Final = (
    Column("model", lambda model: model["name"], number=False),
    Column("version", lambda model: model["version"]),
    Column("/s", _rate),
    Column("workers", lambda model: model["workers_live"]),
    Column("policy", lambda model: model["policy"]["policy"], goes=2, number=False),
    Column("stale", _step("staleness"), goes=1),
    Column("gradient norm", _step("gradient_norm"), goes=3),
    Column("clip", _step("clip_factor"), goes=4),
    Column("timeline", lambda model: model["timeline"], goes=6),
    Column("hooks", lambda model: model["hooks"], goes=5),
    Column("state", _problem, number=False),
)
WORKERS: Final = (
    Column("worker", lambda worker: worker["name"], number=False),
    Column("state", _state, number=False),
    Column("lag", lambda worker: worker["lag"]),
    Column("stale", lambda worker: worker["staleness"], goes=2),
    Column("seen s", lambda worker: f"{worker['last_seen_s']:.1f}"),
    Column("applied", lambda worker: worker["outcomes"].get("applied", 0)),
    Column("other", _refused),
    Column("flight", lambda worker: worker["in_flight"], goes=3),
    Column("again", lambda worker: worker["duplicates"], goes=4),
    Column("metrics", lambda worker: listed(worker["metrics"]), goes=1, number=False),
)


def headline(found: Mapping[str, Any], server: str) -> str:
    """The first line: where, when, and how much of it there is."""
    models, workers = len(found["models"]), sum(model["workers_live"] for model in found["models"])
    rates = [model["versions_per_s"] for model in found["models"] if model["versions_per_s"] is not None]
    rate = f"   {sum(rates):.1f} versions/s" if rates else ""
    return f"{server}   {time.strftime('%H:%M:%S')}   models: {models}   live workers: {workers}{rate}"


def screen(found: Mapping[str, Any], server: str, width: int, height: int, problem: str = "") -> Any:
    """All of it as rich draws it, no wider and no higher than the terminal."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(plain(headline(found, server)), style="bold", no_wrap=True, overflow="ellipsis")]
    if problem:
        parts.append(Text(problem, style="bold red"))
    workers = found.get("workers", [])
    # of the lines, headings and the gap take some
    room = max(
        height - len(parts) - 3 - (4 if workers else 0) - (problem.count("\n") + 1 if problem else 0), 1
    )
    shown = found["models"][:room]
    parts.append(_table(MODELS, shown, width))
    if workers:
        parts.append(_table(WORKERS, workers[: max(room - len(shown), 1)], width))
    left = len(found["models"]) - len(shown)
    if left:
        parts.append(Text(f"and {left} more models", style="dim"))
    return Group(*parts)


def fitting(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """The numbers of the columns that fit: those that go first are left out until the others do."""
    kept = list(range(len(columns)))
    widths = [
        min(max([len(column.heading), *(len(row[n]) for row in rows)]), _LONGEST)
        for n, column in enumerate(columns)
    ]
    while sum(widths[n] + GAP for n in kept) > width and any(columns[n].goes for n in kept):
        kept.remove(max(kept, key=lambda n: columns[n].goes))
    return kept


def _table(columns: Sequence[Column], entries: Sequence[Mapping[str, Any]], width: int) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [[plain(column.text(entry)) for column in columns] for entry in entries]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), expand=False)
    kept = fitting(columns, rows, width)
    for n in kept:
        side = "right" if columns[n].number else "left"
        table.add_column(columns[n].heading, justify=side, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for entry, row in zip(entries, rows, strict=True):
        table.add_row(*(Text(row[n]) for n in kept), style=_style(entry))
    return table


def _style(entry: Mapping[str, Any]) -> str:
    """Red for what needs somebody, dim for who is gone."""
    if entry.get("failed") or entry.get("parameters_nonfinite"):
        return "red"
    if entry.get("quarantined"):
        return "yellow"
    return "" if entry.get("state", "live") == "live" else "dim"
