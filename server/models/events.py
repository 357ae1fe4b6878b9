"""What happens to a model: its last events, in bounded memory.

An operator's edit may be a mebibyte of JSON. Of a large event only enough is kept to tell what it was.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from itertools import islice
from typing import Any, Final

EVENTS_KEPT: Final = 1000
# Sizes as JSON. In memory an event takes several times as much.
EVENT_BYTES: Final = 4 << 10
EVENTS_BYTES: Final = 1 << 20
# Of an event longer than EVENT_BYTES: the characters kept of each fact, and the facts kept.
FACT_CHARACTERS: Final = 200
FACTS_KEPT: Final = 16
# The author of what is done through the operators' door, and of what the server does by itself.
OPERATOR: Final = "operator"
SERVER: Final = "server"
# Who is behind the request that is being answered. The operators' door sets it, once for each request.
ACTOR: Final[ContextVar[str]] = ContextVar("actor", default=OPERATOR)


class Events:
    """The last events, oldest first: at most EVENTS_KEPT of them, and at most EVENTS_BYTES together."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, dict[str, Any]]] = deque()
        self._bytes = 0
        self._seen = 0
        # the name of this log: ids begin anew in each process, so an id says which event only together with this name
        self.log = secrets.token_hex(4)
        # why no further event comes; empty while the model lives
        self.ended = ""
        # all so far by kind
        self.counts: dict[str, int] = {}
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def newest(self) -> int:
        """The id of the last event."""
        return self._seen

    @property
    def oldest(self) -> int:
        """The id of the first event that is kept."""
        return self._seen - len(self._kept) + 1

    def record(self, kind: str, by: str, facts: Mapping[str, Any]) -> None:
        """Note that something was done, and by whom."""
        actor = ACTOR.get() if by == OPERATOR else by if by == SERVER else f"worker:{by}"
        self.note({"time": time.time(), "kind": kind, "by": by, "actor": actor, **facts})

    def note(self, event: Mapping[str, Any]) -> None:
        """Keep one more, with the next id."""
        self._seen += 1
        self.counts[event["kind"]] = self.counts.get(event["kind"], 0) + 1
        numbered = {"id": self._seen, **event}
        size = _bytes_of(numbered)
        if size > EVENT_BYTES:
            numbered = dict([(name, _cut(value)) for name, value in numbered.items()][:FACTS_KEPT])
            size = _bytes_of(numbered)
        self._kept.append((size, numbered))
        self._bytes += size
        while len(self._kept) > EVENTS_KEPT or self._bytes > EVENTS_BYTES:
            self._bytes -= self._kept.popleft()[0]
        self._wake()

    def end(self, why: str) -> None:
        """Tell all who wait that no further event comes."""
        self.ended = why
        self._wake()

    def _wake(self) -> None:
        for waits in self._waiting:
            if not waits.done():
                waits.set_result(None)

    def since(self, after: int) -> list[dict[str, Any]]:
        """The kept events with an id above `after`, oldest first."""
        newer = islice(reversed(self._kept), max(0, self._seen - after))
        return [event for _, event in newer][::-1]

    async def wait(self, after: int, timeout_s: float) -> bool:
        """Wait for an event with an id above `after`, or the end. False if neither has come in that time."""
        if self._seen > after or self.ended:
            return True
        waits: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waits)
        try:
            await asyncio.wait([waits], timeout=timeout_s)
        finally:
            self._waiting.discard(waits)
        return waits.done()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (event for _, event in self._kept)


def _bytes_of(event: Mapping[str, Any]) -> int:
    return len(json.dumps(event, default=str))


def _cut(value: Any) -> Any:
    text = json.dumps(value, default=str)
    return value if len(text) <= FACT_CHARACTERS else f"{text[:FACT_CHARACTERS]} [cut]"
