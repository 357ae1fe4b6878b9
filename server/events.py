"""What has happened to a model: who did what, after which version. The last of it, in bounded memory.

An operator's edit may be a mebibyte of JSON; what is kept of it tells what it was, not all that it said.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Final

EVENTS_KEPT: Final = 1000
# As JSON. In memory an event takes some times as much.
EVENT_BYTES: Final = 4 << 10
EVENTS_BYTES: Final = 1 << 20
# What is kept of a fact that is longer, when all of them together are too long.
FACT_CHARACTERS: Final = 200
FACTS_KEPT: Final = 16


class Events:
    """The last events, oldest first: at most EVENTS_KEPT, and of EVENTS_BYTES together."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, dict[str, Any]]] = deque()
        self._bytes = 0
        self._seen = 0

    def note(self, event: Mapping[str, Any]) -> None:
        """Keep one more, with the next id."""
        self._seen += 1
        numbered = {"id": self._seen, **event}
        size = _bytes_of(numbered)
        if size > EVENT_BYTES:
            numbered = dict([(name, _cut(value)) for name, value in numbered.items()][:FACTS_KEPT])
            size = _bytes_of(numbered)
        self._kept.append((size, numbered))
        self._bytes += size
        while len(self._kept) > EVENTS_KEPT or self._bytes > EVENTS_BYTES:
            self._bytes -= self._kept.popleft()[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (event for _, event in self._kept)


def _bytes_of(event: Mapping[str, Any]) -> int:
    return len(json.dumps(event, default=str))


def _cut(value: Any) -> Any:
    text = json.dumps(value, default=str)
    return value if len(text) <= FACT_CHARACTERS else f"{text[:FACT_CHARACTERS]} [cut]"
