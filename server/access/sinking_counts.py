"""Counts of what callers do that sink by themselves: a caller who pauses has all that it may do again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class SinkingCounts:
    """A number for each name, which sinks by `per_s` each second. The name noted the longest ago is forgotten first."""

    def __init__(self, per_s: float, most_names: int, clock: Callable[[], float]) -> None:
        self._per_s = per_s
        self._most_names = most_names
        self._clock = clock
        # as it was noted, and when
        self._noted: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._noted)

    def of(self, name: str) -> float:
        """A name's count now; 0.0 of one that is not known."""
        now_s = self._clock()
        count, noted_s = self._noted.get(name, (0.0, now_s))
        return max(0.0, count - (now_s - noted_s) * self._per_s)

    def note(self, name: str, count: float) -> None:
        """Set a name's count, from which it sinks."""
        self._noted.pop(name, None)
        self._noted[name] = count, self._clock()
        if len(self._noted) > self._most_names:
            self._noted.popitem(last=False)
