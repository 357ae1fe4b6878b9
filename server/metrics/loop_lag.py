"""How late the event loop is: a timer that notes by how much it was missed."""

from __future__ import annotations

import asyncio
from typing import Final

from ..counters.histogram import Histogram

# Four wake-ups a second take 0.01 % of a core.
EVERY_S: Final = 0.25


class LoopLag:
    """Measures the running loop from `start` to `stop`."""

    def __init__(self, found: Histogram) -> None:
        self._found = found
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Measure from now on."""
        loop = asyncio.get_running_loop()
        self._due_s = loop.time() + EVERY_S
        self._timer = loop.call_at(self._due_s, self._look)

    def _look(self) -> None:
        self._found.observe(max(0.0, asyncio.get_running_loop().time() - self._due_s))
        self.start()

    def stop(self) -> None:
        """Measure no more."""
        if self._timer is not None:
            self._timer.cancel()
