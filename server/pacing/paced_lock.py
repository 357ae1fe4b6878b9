"""A lock whose holder works at a pace until somebody else waits for the lock."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Literal

from .pace import Pace


class PacedLock(asyncio.Lock):
    """The lock of a model's folder. A task that waits for it has the snapshot that is being written finish at full speed."""

    _pace: Pace | None = None

    @contextlib.contextmanager
    def at(self, pace: Pace) -> Iterator[None]:
        """A block in which the lock's holder works at this pace. The pace ends when somebody else waits for the lock."""
        self._pace = pace
        try:
            yield
        finally:
            self._pace = None

    async def acquire(self) -> Literal[True]:
        """As asyncio's, but tells the holder to hurry first."""
        if self._pace is not None:
            self._pace.hurry()
        return await super().acquire()
