"""How many requests a caller of the operators' door may send in a while: beyond that they are answered at a pace.

Each request takes the event loop that pushes come through, 1 ms of it or so. One who asks without an end would take all that
workers leave, so a caller has FREE requests at once, PER_S in each second, and what is beyond waits for its turn. A caller is
the holder of a token, or an address where nobody has one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from .sinking_counts import SinkingCounts

# Enough for a page, a script over all groups of a model, and a restart of many; a flood brings as many in a few seconds.
FREE: Final = 3000
PER_S: Final = 60.0
# Requests of one caller that wait; more are refused.
MOST_WAITING: Final = 16
MOST_CALLERS: Final = 10_000


class RequestRate:
    """What each caller has left. Used on the event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._taken = SinkingCounts(PER_S, MOST_CALLERS, clock)

    def wait_s(self, who: str) -> float | None:
        """Count a request: how long it has to wait for its turn. None if too many wait already; it is not counted then."""
        taken = self._taken.of(who)
        is_refused = taken >= FREE + MOST_WAITING
        taken += 0.0 if is_refused else 1.0
        self._taken.note(who, taken)
        return None if is_refused else max(0.0, taken - FREE) / PER_S
