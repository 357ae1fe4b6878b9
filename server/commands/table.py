"""Findings as tables, for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..journal.examination import FileFinding
from .findings import ModelFindings, state_of


def show(folder: Path, found: Sequence[ModelFindings]) -> None:
    """Print each model's snapshots and journal, and what a server would load of them."""
    console = Console(highlight=False)
    if not found:
        console.print(f"{escape(str(folder))}: no models")
    for model in found:
        console.print(_heading(model), soft_wrap=True)
        if model.snapshots or model.journal:
            console.print(_table(model))
        console.print(_verdict(model), soft_wrap=True)


def _heading(model: ModelFindings) -> str:
    identity = model.identity
    if identity is None:
        return f"[bold]{model.name}[/]: {escape(model.problem) or 'no identity'}"
    clean = (
        "not stopped in order"
        if identity.clean_version is None
        else f"stopped at version {identity.clean_version}"
    )
    rest = f"; {escape(model.problem)}" if model.problem else ""
    return f"[bold]{model.name}[/]: uid {identity.uid.hex()}, timeline {identity.timeline}, {clean}{rest}"


def _table(model: ModelFindings) -> Table:
    table = Table("", "name", "records", "versions", "bytes", "state")
    table.columns[4].justify = "right"
    for entry in model.snapshots:
        kind = "automatic" if entry.get("automatic") else ""
        about = entry.get("problem", "")
        state = f"{entry['state']}{': ' if about else ''}{about}"
        if based_on := entry.get("based_on"):
            state += f", on {' + '.join(based_on)}"
        version = str(entry.get("version", ""))
        size = str(entry.get("bytes", ""))
        table.add_row(f"snapshot {kind}".strip(), entry["id"], "", version, size, escape(state))
    for found in model.journal:
        records = f"{found.first} to {found.last}" if found.last >= found.first else "none"
        table.add_row(
            "journal", found.path.name, records, _versions(found), str(found.size_bytes), _state(found)
        )
    return table


def _versions(found: FileFinding) -> str:
    if found.begins_at is None or found.ends_at is None:
        return ""
    return f"{found.begins_at[1]} to {found.ends_at[1]}"


def _state(found: FileFinding) -> str:
    if found.problem:
        return f"damaged at record {found.record}: {escape(found.problem)}"
    return f"torn tail of {found.torn_bytes} bytes" if found.torn_bytes else state_of(found)


def _verdict(model: ModelFindings) -> str:
    start = model.start
    if start is None:
        return "  a start has no model of it"
    if "refused" in start:
        return f"  a start refuses it: {escape(start['refused'])}"
    told = (
        "" if start["proven"] else ", a new one: what was acknowledged may be missing, and workers are told"
    )
    return f"  a start continues from version {start['version']} on timeline {start['timeline']}{told}"
