"""How objects look in a notebook: a small table, in the notebook's own colours, in which every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

LONGEST_TEXT = 300


def facts(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """HTML with a title and a line for each fact."""
    lines = "".join(
        f"<tr><th scope='row' style='text-align:left'>{_text(name)}</th><td style='text-align:left'>{_text(value)}</td></tr>"
        for name, value in rows
    )
    return f"<div><strong>{_text(title)}</strong><table>{lines}</table></div>"


def brief(texts: Sequence[object], most: int = 3) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(map(str, texts[:most])) + more


def _text(value: object) -> str:
    text = str(value)
    return escape(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}...")
