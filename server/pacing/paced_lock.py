"""A lock of which the holder works at a pace, until somebody else wants it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Literal

from .pace import Pace


class PacedLock(asyncio.Lock):
    """The lock of a model's folder. Who wants it does not wait for the pace of a snapshot that is being written there."""

    _pace: Pace | None = None

    @contextlib.contextmanager
    def at(self, pace: Pace) -> Iterator[None]:
        """A block, of who holds the lock, in which this pace is kept while nobody else wants the lock."""
        self._pace = pace
        try:
            yield
        finally:
            self._pace = None

    async def acquire(self) -> Literal[True]:
        """As asyncio's."""
        if self._pace is not None:
            self._pace.hurry()
        return await super().acquire()
