"""A remote optimizer in a few words: its param groups and its last push."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..membership.receipt import Receipt
from ..notebook import brief, facts

MOST_GROUPS = 4


def summary(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each of the first param groups."""
    lines = [f"group {number}: {_settings(group)}" for number, group in enumerate(groups[:MOST_GROUPS])]
    left = len(groups) - MOST_GROUPS
    return [*lines, f"{left} groups more"] if left > 0 else lines


def _settings(group: Mapping[str, Any]) -> str:
    numbers = [
        f"{name}={value:g}"
        for name, value in group.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and (name == "lr" or value)
    ]
    return f"{brief(numbers, 6)}, {len(group['params'])} parameters"


def shown(session: str, groups: Sequence[Mapping[str, Any]], receipt: Receipt | None) -> str:
    """The same for a notebook, with the last receipt."""
    lines = [tuple(line.split(": ", 1)) if ": " in line else ("", line) for line in summary(groups)]
    last = "none yet" if receipt is None else receipt.explain()
    return facts(f"RemoteOptimizer of {session}", [*((a, b) for a, b in lines), ("last push", last)])
