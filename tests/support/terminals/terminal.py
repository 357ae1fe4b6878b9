"""The other side of a pseudo-terminal: what a program draws there."""

from __future__ import annotations

import os


def read_some(terminal: int) -> str:
    """What has been drawn since; "" once the program is gone."""
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # the other side is closed
        return ""


def read_until(terminal: int, words: str) -> None:
    """Read until the words are there."""
    seen = ""
    while words not in seen:
        some = read_some(terminal)
        assert some, seen
        seen += some
