"""sync: one step per round. A round adds up one push of every worker, in the order of the workers' names.

A round opens with its first push, once `min_workers` are there. It expects the workers that are live at that moment,
and closes when all that it still expects have pushed, when `quorum` workers have, or `timeout_s` after it opened. A
worker that leaves, is evicted or quarantined, or lets its lease run out is no longer expected. Its push stays in the
round if it left or expired, and is dropped if it was evicted or quarantined. A worker that joins meanwhile is not
expected and may contribute.

A push is late if it was computed on a version before the one that the last round made, and its worker was not told of
that version either. A round that is refused, or that only has skips, makes none. A late push is dropped, or carried as its worker's single contribution. A skip push counts as
present and contributes nothing. A push that the gate rejected never gets here, so its worker is absent until the
time-out. Between the end of a round and the version that it makes nothing is decided: pushes that arrive wait for the
next round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

from pydantic import Field

from pushstep.proto.types_pb2 import Outcome

from ..push import PendingPush
from ..settings import Positive, Seconds
from ..worker import Worker
from .policy import Move, PolicySettings, Refuse, Round, View, listed

# What ends a round.
COMPLETE: Final = "complete"
QUORUM: Final = "quorum"
TIMEOUT: Final = "timeout"


class SyncSettings(PolicySettings):
    """Whom a round waits for, and what it makes of what it has got."""

    policy: Literal["sync"] = "sync"
    reduce: Literal["mean", "sum"] = Field(
        default="mean", description="divide the sum by the contributors' weight, or leave it a sum"
    )
    min_workers: Positive = Field(default=1, description="live workers before a round opens")
    quorum: Positive | None = Field(
        default=None, description="close once this many have pushed; null: all expected"
    )
    timeout_s: Seconds | None = Field(
        default=60.0,
        description="close this long after the round's first push; null: wait for the last lease",
    )
    late: Literal["drop", "carry"] = Field(
        default="drop",
        description="what becomes of a push of an earlier round: dropped_late, or part of this one",
    )

    def gradients_held(self, workers: int) -> int:
        """A round holds all pushes until the last one has come, and then their sum."""
        return max(workers, self.min_workers) + 1


@dataclass(slots=True)
class OpenRound:
    """The open round: the names that it expects, when it opened, and its pushes by worker name."""

    expected: set[str]
    opened_s: float
    pushes: dict[str, PendingPush] = field(default_factory=dict)


class SyncPolicy:
    """Opens, fills and closes rounds."""

    name: ClassVar[str] = "sync"
    waits: ClassVar[bool] = True

    def __init__(self, settings: SyncSettings) -> None:
        self.settings = settings
        self.round: OpenRound | None = None
        # pushes in no round yet: none is open, or the last one is being added up
        self._queue: list[PendingPush] = []

    def adopt(self, settings: PolicySettings) -> None:
        """Continue under other settings."""
        if isinstance(settings, SyncSettings):
            self.settings = settings

    def admits(self, worker: Worker, ahead: int, view: View) -> bool:
        """True: a push waits in its round with its body."""
        return True

    def take(self, pending: PendingPush) -> None:
        """Hold it for the open round or the next one."""
        self._queue.append(pending)

    def drop(self, pending: PendingPush) -> None:
        """Take a push out of the queue or the round. A round without pushes is open no longer."""
        if pending in self._queue:
            self._queue.remove(pending)
        elif self.round is not None and self.round.pushes.get(pending.worker) is pending:
            del self.round.pushes[pending.worker]
            if not self.round.pushes:
                self.round = None

    def review(self, view: View) -> list[Move]:
        """Open a round, add the pushes that have arrived, and close it if it waits for nothing more."""
        if view.busy:
            return []
        late = self._turn_away_late(view.round_version) if self.settings.late == "drop" else []
        if self.round is None and self._queue and len(view.members) >= self.settings.min_workers:
            self.round = OpenRound({worker.name for worker in view.members}, view.now_s)
        if self.round is None:
            return [*late, *self._turn_away_gone(view)]
        self.round.pushes.update({pending.worker: pending for pending in self._queue})
        self._queue.clear()
        ended_by, why = self._closed_by(self.round, view)
        return [*late, *self._end(self.round, ended_by, why)] if ended_by else late

    def _turn_away_gone(self, view: View) -> list[Move]:
        """Refuse queued pushes of workers that are gone: it is not known when a round will open."""
        present = {worker.name for worker in view.members}
        gone = [pending for pending in self._queue if pending.worker not in present]
        self._queue = [pending for pending in self._queue if pending not in gone]
        note = "its worker went before a round opened"
        return [Refuse(pending, Outcome.OUTCOME_DROPPED_LATE, "dropped_late", (note,)) for pending in gone]

    def _turn_away_late(self, since: int) -> list[Move]:
        late = [pending for pending in self._queue if pending.known_version < since]
        self._queue = [pending for pending in self._queue if pending not in late]
        return [
            Refuse(
                pending,
                Outcome.OUTCOME_DROPPED_LATE,
                "dropped_late",
                (f"its worker knew of version {pending.known_version}, the last round made {since}",),
            )
            for pending in late
        ]

    def _closed_by(self, open_round: OpenRound, view: View) -> tuple[str, str]:
        """Why the round is over, in one word and in full; empty while it is open."""
        present = {worker.name for worker in view.members}
        missing = (open_round.expected & present) - open_round.pushes.keys()
        if not missing:
            return COMPLETE, ""
        if self.settings.quorum is not None and len(open_round.pushes) >= self.settings.quorum:
            return QUORUM, f"quorum of {self.settings.quorum}, without {', '.join(sorted(missing))}"
        deadline_s = self.deadline_s()
        if deadline_s is not None and view.now_s >= deadline_s:
            return TIMEOUT, f"timed out without {', '.join(sorted(missing))}"
        return "", ""

    def _end(self, open_round: OpenRound, ended_by: str, why: str) -> list[Move]:
        self.round = None
        ordered = [open_round.pushes[name] for name in sorted(open_round.pushes)]
        skips = tuple(pending for pending in ordered if pending.skips)
        stepped = tuple(pending for pending in ordered if not pending.skips)
        notes = (f"round closed: {why}",) if why else ()
        mean = self.settings.reduce == "mean"
        return [Round(stepped, mean, skips, notes, ended_by, open_round.opened_s)]

    def consumed(self, worker: Worker) -> None:
        """Does nothing: rounds count pushes, not sequences."""

    def deadline_s(self) -> float | None:
        """The open round's time-out; None without one."""
        if self.round is None or self.settings.timeout_s is None:
            return None
        return self.round.opened_s + self.settings.timeout_s

    def close(self, view: View) -> tuple[list[Move], list[PendingPush]]:
        """Step the open round if it has its quorum. Otherwise hand its pushes over, by worker name."""
        open_round, queue = self.round, self._queue
        self.round, self._queue = None, []
        held = [] if open_round is None else [open_round.pushes[name] for name in sorted(open_round.pushes)]
        queue.sort(key=lambda pending: pending.worker)
        if open_round is not None and self.settings.quorum is not None and len(held) >= self.settings.quorum:
            return self._end(open_round, QUORUM, "the policy was changed at quorum"), queue
        return [], held + queue

    def missing(self, view: View) -> str:
        """What pushes wait for: the last round's sum, more workers, or pushes of expected workers."""
        if self.round is None:
            there = len(view.members)
            if view.busy or there >= self.settings.min_workers:
                return "the round before is being added up"
            return f"{there} of {self.settings.min_workers} workers are there"
        present = {worker.name for worker in view.members}
        awaited = (self.round.expected & present) - self.round.pushes.keys()
        return f"{listed(awaited)} {'have' if len(awaited) > 1 else 'has'} not pushed yet"

    def shown(self, view: View) -> Callable[[Worker], dict[str, Any]]:
        """Whether the open round waits for a worker or has its push."""
        open_round = self.round

        def show(worker: Worker) -> dict[str, Any]:
            if open_round is None:
                return {"round": "none"}
            if worker.name in open_round.pushes:
                return {"round": "present"}
            return {"round": "awaited" if worker.name in open_round.expected else "not expected"}

        return show
