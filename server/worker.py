"""One worker by name, as the server knows it: its epoch and lease, what it has in flight, what became of its pushes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from pushstep.proto.errors import PushstepError
from pushstep.proto.training_pb2 import Process
from pushstep.proto.types_pb2 import Receipt

from .candidate import Candidate

RECEIPTS_KEPT: Final = 8
JOINS_KEPT: Final = 8


class WorkerState(StrEnum):
    """Where a worker stands."""

    LIVE = "live"
    LEFT = "left"
    EXPIRED = "expired"
    EVICTED = "evicted"


@dataclass(slots=True)
class Verdict:
    """What became of one sequence: a receipt, and the error that its push was answered with, if any."""

    digest: int
    receipt: Receipt
    error: PushstepError | None = None
    # what it takes, once it is stored
    kept_bytes: int = 0


@dataclass(slots=True)
class Worker:
    """One worker by name, through all its epochs."""

    name: str
    epoch: int = 0
    # of the last sequence consumed in this epoch
    sequence: int = 0
    state: WorkerState = WorkerState.LEFT
    lease_until_s: float = 0.0
    # when it is next looked at whether the lease has run out (see Sessions)
    watched_s: float = 0.0
    last_seen_s: float = 0.0
    # position in the order of joins: the lowest live one leads
    joined: int = 0
    verdicts: deque[Verdict] = field(default_factory=lambda: deque(maxlen=RECEIPTS_KEPT))
    outcomes: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    base_version: int = 0
    staleness: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    worker_state: bytes = b""
    # of this epoch, by sequence: pushes without a verdict yet, and how many streams are bringing bodies of each
    held: dict[int, Candidate] = field(default_factory=dict)
    coming: dict[int, int] = field(default_factory=dict)
    # refused since the last push that was not; its headers are turned away once there were too many
    refused_in_row: int = 0
    quarantined: bool = False
    # how often since the server started
    quarantines: int = 0
    # the callers' numbers of the last joins; the last one is that of this epoch
    attempts: deque[int] = field(default_factory=lambda: deque(maxlen=JOINS_KEPT))
    # (epoch, sequence) of the last push whose receipt is not kept any more
    forgotten: tuple[int, int] = (0, 0)
    # where the session that has the name runs, if it has said so
    process: Process = field(default_factory=Process)
    # the first epoch of the session that has the name: it may join over itself, who had the name before may not
    since: int = 0
    # what all of this takes (session.py counts it)
    kept_bytes: int = 0

    @property
    def told_version(self) -> int:
        """The version in this epoch's last receipt; 0 before its first."""
        last = self.verdicts[-1].receipt if self.verdicts else None
        return int(last.version) if last is not None and last.identity.epoch == self.epoch else 0
