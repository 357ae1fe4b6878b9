"""How fast a snapshot is written beside training: in slices, with a rest after each that is in proportion to it.

Writing takes a core, memory bandwidth and the disk from steps. A slice that took long, because steps needed them, is followed
by a longer rest. A snapshot ends in a bounded time all the same, and at once if somebody waits for it.
"""

from __future__ import annotations

import threading
import time
from typing import Final

# The share of its time in which a snapshot is written, if its limit allows.
SHARE: Final = 0.1


class Pace:
    """The pace of one snapshot. Without a limit there are no rests. Only `hurry` may be called in any thread."""

    def __init__(self, limit_s: float = 0.0) -> None:
        self._ends_s = time.monotonic() + limit_s
        self._left_bytes = 0
        self._hurries = threading.Event()
        if limit_s <= 0:
            self._hurries.set()

    def hurry(self) -> None:
        """Rest no more: somebody waits."""
        self._hurries.set()

    def expect(self, nbytes: int) -> None:
        """Note that so many bytes more are to be written or read."""
        self._left_bytes += nbytes

    def rest(self, taken_s: float, nbytes: int) -> None:
        """Rest after a slice of so many bytes, which took so long."""
        self._left_bytes -= nbytes
        if self._hurries.is_set() or nbytes <= 0:
            return
        slices = max(1.0, self._left_bytes / nbytes)
        spare_s = self._ends_s - time.monotonic() - slices * taken_s
        self._hurries.wait(max(0.0, min(taken_s * (1 / SHARE - 1), spare_s / slices)))


# For what somebody waits for.
AT_ONCE: Final = Pace()
