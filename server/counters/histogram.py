"""A histogram as plain numbers: how many values fell into each bucket, and their sum.

prometheus-client's own takes 0.5 us for a value, with its lock; this takes 0.1 us (`python -m tests.benchmarks metrics`). One
thread writes. Another may read at any time: it finds every value that was counted before, and may find the last one in
the buckets and not yet in the sum.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

# From less than the fastest step to the longest wait for a budget.
SECONDS: Final = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
# Of what takes a disk or other workers.
LONG_SECONDS: Final = (1e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
# Of versions, workers, pushes.
NUMBERS: Final = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)


class Histogram:
    """Counts values by the bucket that they fall into."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        """`bounds`: the largest value of each bucket, in order. One more bucket takes what is above the last."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """How many values were counted."""
        return sum(self.counts)
