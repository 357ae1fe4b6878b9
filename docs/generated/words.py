"""Words of Markdown that the generated pages share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table. A text may have lines; a cell has one."""
    made = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return "".join(f"| {' | '.join(cell(text) for text in row)} |\n" for row in made) + "\n"


def cell(text: str) -> str:
    """A text on one line, whose bars divide no cells."""
    return re.sub(r"\s*\n\s*", " ", text).strip().replace("|", "\\|")


def anchored(level: int, title: str, anchor: str) -> str:
    """A heading with an anchor of its own."""
    return f"{'#' * level} {title} {{: #{anchor} }}\n\n"


def block(value: Any) -> str:
    """An example, as JSON."""
    return f"```json\n{json.dumps(value, indent=2)}\n```\n\n"


def slug(text: str) -> str:
    """An anchor made of a text."""
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")
