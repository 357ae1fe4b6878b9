"""The last events of a model, in bounded memory: who did what, after which version.

An operator's edit may be a mebibyte of JSON. Of a large event only enough is kept to tell what it was.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Final

EVENTS_KEPT: Final = 1000
# Sizes as JSON. In memory an event takes several times as much.
EVENT_BYTES: Final = 4 << 10
EVENTS_BYTES: Final = 1 << 20
# When an event is longer than EVENT_BYTES: the characters kept of a long fact, and the facts kept.
FACT_CHARACTERS: Final = 200
FACTS_KEPT: Final = 16


class Events:
    """The last events, oldest first: at most EVENTS_KEPT of them, and at most EVENTS_BYTES together."""

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
