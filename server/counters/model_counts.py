"""What is counted of one model since this process serves it: pushes, time in each room, refusals, journal, snapshots.

All times come from a push's receipt, which its worker gets too, so both say the same. To count a push takes 0.9 us, of the 340
that a small one takes through shared memory (`python -m tests.benchmarks metrics`).
"""

from __future__ import annotations

from typing import Final

from pushstep.proto.types_pb2 import OUTCOME_APPLIED, Outcome, Receipt

from .histogram import LONG_SECONDS, NUMBERS, Histogram

# The outcomes by number, in the words of receipts.
OUTCOMES: Final = {number: name.removeprefix("OUTCOME_").lower() for name, number in Outcome.items()}
_APPLIED: Final = int(OUTCOME_APPLIED)


class JournalCounts:
    """The records of one model's journal."""

    __slots__ = ("append", "appended_bytes", "records", "sync")

    def __init__(self) -> None:
        self.records = 0
        self.appended_bytes = 0
        self.append = Histogram()
        # each fsync
        self.sync = Histogram(LONG_SECONDS)


class SnapshotCounts:
    """The snapshots of one model."""

    __slots__ = ("created_s", "newest_bytes", "taken", "version")

    def __init__(self) -> None:
        self.taken = Histogram(LONG_SECONDS)
        # of the newest one: its time as seconds since the epoch, its files, and its version
        self.created_s = 0.0
        self.newest_bytes = 0
        self.version = 0

    def note(self, created_s: float, newest_bytes: int, version: int) -> None:
        """A snapshot is the newest one that is on the disk."""
        self.created_s, self.newest_bytes, self.version = created_s, newest_bytes, version


class ModelCounts:
    """Owned by the model. The event loop writes, except where the parts say otherwise."""

    __slots__ = (
        "journal",
        "outcomes",
        "publish",
        "pulls",
        "queue",
        "receive",
        "refusals",
        "snapshots",
        "staleness",
        "step",
        "wait",
    )

    def __init__(self) -> None:
        # pushes and uploads by outcome
        self.outcomes = [0] * (1 + max(OUTCOMES))
        self.receive, self.wait, self.queue = Histogram(), Histogram(), Histogram()
        self.step, self.publish = Histogram(), Histogram()
        self.staleness = Histogram(NUMBERS)
        self.pulls = 0
        # pushes that were answered with an error, by its code
        self.refusals: dict[str, int] = {}
        self.journal = JournalCounts()
        self.snapshots = SnapshotCounts()

    @property
    def rooms(self) -> dict[str, Histogram]:
        """How long pushes were in each room, in the order in which they pass them."""
        return {
            "receive": self.receive,
            "wait": self.wait,
            "queue": self.queue,
            "journal": self.journal.append,
            "step": self.step,
            "publish": self.publish,
        }

    def decided(self, receipt: Receipt) -> None:
        """Count a push that got its outcome, with the times in its receipt."""
        outcome, times = receipt.outcome, receipt.times
        self.outcomes[outcome] += 1
        self.receive.observe(times.receive_s)
        self.wait.observe(times.wait_s)
        if outcome == _APPLIED:
            self.queue.observe(times.queue_s)
            self.step.observe(times.step_s)
            self.staleness.observe(receipt.staleness)

    def uploaded(self, outcome: int) -> None:
        """Count an upload of values, which has no times."""
        self.outcomes[outcome] += 1

    def refused(self, code: str) -> None:
        """Count a push that was answered with an error."""
        self.refusals[code] = self.refusals.get(code, 0) + 1
