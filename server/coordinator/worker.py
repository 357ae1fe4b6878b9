"""One worker by name: its epoch and lease, its pushes in flight, and the outcomes of its last pushes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from pushstep.proto.errors import CATALOGUE, PushstepError
from pushstep.proto.training_pb2 import Process
from pushstep.proto.types_pb2 import OUTCOME_APPLIED, OUTCOME_REJECTED, Receipt

from ..counters.model_counts import OUTCOMES
from .push import PendingPush

RECEIPTS_KEPT: Final = 8
JOINS_KEPT: Final = 8
APPLIED: Final = OUTCOMES[OUTCOME_APPLIED]
REJECTED: Final = OUTCOMES[OUTCOME_REJECTED]


class WorkerState(StrEnum):
    """The state of a worker."""

    LIVE = "live"
    LEFT = "left"
    EXPIRED = "expired"
    EVICTED = "evicted"


@dataclass(slots=True)
class Decided:
    """A decided push: its digest, its receipt, and the error that it was answered with, if any."""

    digest: int
    receipt: Receipt
    error: PushstepError | None = None
    # estimated memory; set when it is stored
    kept_bytes: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """The epoch and sequence of its push."""
        return self.receipt.identity.epoch, self.receipt.identity.sequence

    def dump(self) -> dict[str, Any]:
        """The outcome as JSON."""
        error = self.error
        return {
            "digest": self.digest,
            "receipt": self.receipt.SerializeToString().hex(),
            "error": None if error is None else [error.code, error.message, dict(error.fields)],
        }

    @classmethod
    def parsed(cls, dumped: Mapping[str, Any]) -> Decided:
        """The outcome that `dump` wrote."""
        error = None
        if dumped["error"] is not None:
            code, message, fields = dumped["error"]
            error = CATALOGUE[code](message, **fields)
        return cls(dumped["digest"], Receipt.FromString(bytes.fromhex(dumped["receipt"])), error)


@dataclass(slots=True)
class Worker:
    """One worker by name, through all its epochs."""

    name: str
    epoch: int = 0
    # the last sequence consumed in this epoch
    sequence: int = 0
    state: WorkerState = WorkerState.LEFT
    lease_until_s: float = 0.0
    # when Sessions next checks whether the lease has run out
    watched_s: float = 0.0
    last_seen_s: float = 0.0
    # position in the order of joins; the live worker with the lowest one leads
    joined: int = 0
    decided_pushes: deque[Decided] = field(default_factory=lambda: deque(maxlen=RECEIPTS_KEPT))
    outcomes: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    base_version: int = 0
    staleness: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    worker_state: bytes = b""
    # of this epoch, by sequence: the pending pushes, and how many streams bring a body of each
    undecided: dict[int, PendingPush] = field(default_factory=dict)
    receiving: dict[int, int] = field(default_factory=dict)
    # number of refused pushes in a row. At the gate's `quarantine_after` the worker is quarantined, and its headers are
    # refused
    refused_in_row: int = 0
    quarantined: bool = False
    # by an operator, and not for its refused pushes
    quarantined_by_hand: bool = False
    # number of quarantines since the server started
    quarantines: int = 0
    # the callers' numbers of the last joins; the last one opened this epoch
    attempts: deque[int] = field(default_factory=lambda: deque(maxlen=JOINS_KEPT))
    # (epoch, sequence) of the last push whose receipt is no longer kept
    forgotten: tuple[int, int] = (0, 0)
    # the process of the session that has the name, if it has said so
    process: Process = field(default_factory=Process)
    # first epoch of the current session. Only that session may rejoin without `takeover`
    session_epoch: int = 0
    # estimated memory of all of this (sessions.py counts it)
    kept_bytes: int = 0

    @property
    def last_receipt_version(self) -> int:
        """The version in this epoch's last receipt; 0 before its first."""
        last = self.decided_pushes[-1].receipt if self.decided_pushes else None
        return int(last.version) if last is not None and last.identity.epoch == self.epoch else 0

    def dump(self) -> dict[str, Any]:
        """The worker as JSON, which shares no object with it."""
        return {
            "name": self.name,
            "epoch": self.epoch,
            "sequence": self.sequence,
            "state": str(self.state),
            "joined": self.joined,
            "outcomes": dict(self.outcomes),
            "duplicates": self.duplicates,
            "refused_in_row": self.refused_in_row,
            "quarantined": self.quarantined,
            "quarantined_by_hand": self.quarantined_by_hand,
            "attempts": list(self.attempts),
            "forgotten": list(self.forgotten),
            "since": self.session_epoch,
            "worker_state": self.worker_state.hex(),
            "process": self.process.SerializeToString().hex(),
            "verdicts": [decided.dump() for decided in self.decided_pushes],
        }

    @classmethod
    def parsed(cls, dumped: Mapping[str, Any]) -> Worker:
        """The worker that `dump` wrote."""
        worker = cls(
            dumped["name"],
            epoch=dumped["epoch"],
            sequence=dumped["sequence"],
            state=WorkerState(dumped["state"]),
            joined=dumped["joined"],
            outcomes=dict(dumped["outcomes"]),
            duplicates=dumped["duplicates"],
            worker_state=bytes.fromhex(dumped["worker_state"]),
            refused_in_row=dumped["refused_in_row"],
            quarantined=dumped["quarantined"],
            quarantined_by_hand=dumped.get("quarantined_by_hand", False),
            session_epoch=dumped.get("since", 0),
            process=Process.FromString(bytes.fromhex(dumped.get("process", ""))),
        )
        # older snapshots lack these fields
        worker.attempts.extend(dumped.get("attempts", ()))
        epoch, sequence = dumped.get("forgotten", (0, 0))
        worker.forgotten = (epoch, sequence)
        worker.decided_pushes.extend(map(Decided.parsed, dumped["verdicts"]))
        worker.base_version = worker.last_receipt_version
        return worker


def count_failed(workers: Mapping[str, Worker], decided: Decided) -> None:
    """Count as rejected, not as applied, a push whose step has failed."""
    worker = workers.get(decided.receipt.identity.worker)
    if worker is not None and worker.outcomes.get(APPLIED, 0) > 0:
        worker.outcomes[APPLIED] -= 1
        worker.outcomes[REJECTED] = worker.outcomes.get(REJECTED, 0) + 1


def put_outcomes(rows: Iterable[Mapping[str, Any]], decided: Iterable[Decided]) -> None:
    """Put outcomes into the dumped workers that have them, in place of what was known of them then."""
    known = {bytes(each.receipt.identity.SerializeToString(deterministic=True)): each for each in decided}
    if not known:
        return
    names = {each.receipt.identity.worker for each in known.values()}
    for row in rows:
        for place, verdict in enumerate(row["verdicts"] if row["name"] in names else ()):
            was = Receipt.FromString(bytes.fromhex(verdict["receipt"]))
            now = known.get(was.identity.SerializeToString(deterministic=True))
            if now is None:
                continue
            if (was.outcome, now.receipt.outcome) == (OUTCOME_APPLIED, OUTCOME_REJECTED):
                row["outcomes"][APPLIED] -= 1
                row["outcomes"][REJECTED] = row["outcomes"].get(REJECTED, 0) + 1
            row["verdicts"][place] = now.dump()
