"""The rounds of one model's `sync` policy: how each ended, how long it was open, and how many pushes it had."""

from __future__ import annotations

from .histogram import LONG_SECONDS, NUMBERS, Histogram


class RoundCounts:
    """Owned by the pending pushes of a model."""

    def __init__(self) -> None:
        # rounds by what ended them
        self.closed: dict[str, int] = {}
        self.open = Histogram(LONG_SECONDS)
        self.pushes = Histogram(NUMBERS)

    def note(self, closed_by: str, open_s: float, pushes: int) -> None:
        """Count a round that is over."""
        self.closed[closed_by] = self.closed.get(closed_by, 0) + 1
        self.open.observe(open_s)
        self.pushes.observe(pushes)
