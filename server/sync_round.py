"""sync: one step per round, of one push of every worker, added up in the order of the workers' names.

A round opens with its first push, once `min_workers` are there, and expects whoever is live at that moment. It closes
when everyone whom it still expects has pushed, when `quorum` workers have, or `timeout_s` after it opened; who leaves,
is evicted or quarantined or lets its lease run out is no longer expected, while a push that it had handed in stays. Who
joins meanwhile is not expected and may contribute. A push whose round is over is late: one that was computed on a
version before the one that the last round made, by a worker that was not told of it either. It is dropped, or carried as
its worker's single contribution. A skip push counts as present and
contributes nothing; a push that the gate rejected never gets here, so its worker is absent until the time-out.
Between the end of a round and the version that it makes nothing is decided: what arrives waits for the next round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from pushstep.proto.types_pb2 import Outcome

from .candidate import Candidate
from .policy import Move, PolicySettings, Together, TurnAway, View, listed
from .settings import Positive, Seconds
from .worker import Worker


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


@dataclass(slots=True)
class Round:
    """One round that is open."""

    expected: set[str]
    opened_s: float
    pushes: dict[str, Candidate] = field(default_factory=dict)


class SyncPolicy:
    """Opens, fills and closes rounds."""

    name: ClassVar[str] = "sync"
    waits: ClassVar[bool] = True

    def __init__(self, settings: SyncSettings | None = None) -> None:
        self.settings = settings or SyncSettings()
        self.round: Round | None = None
        # the version that the last round made; None until it is there. Before the first one nothing is late
        self._since: int | None = 0
        # not in a round yet: none is open, or the last one is being added up
        self._queue: list[Candidate] = []

    def adopt(self, settings: PolicySettings) -> None:
        """Go on under other settings."""
        if isinstance(settings, SyncSettings):
            self.settings = settings

    def admits(self, worker: Worker, ahead: int, view: View) -> bool:
        """Always: what waits in a round waits with its body."""
        return True

    def take(self, candidate: Candidate) -> None:
        """Hold it for the round that is open or the next one."""
        self._queue.append(candidate)

    def drop(self, candidate: Candidate) -> None:
        """Take a push back out of the round."""
        if candidate in self._queue:
            self._queue.remove(candidate)
        elif self.round is not None and self.round.pushes.get(candidate.worker) is candidate:
            del self.round.pushes[candidate.worker]
            if not self.round.pushes:
                self.round = None

    def review(self, view: View) -> list[Move]:
        """Open a round, put in what has arrived, and close it if nothing more is to be waited for."""
        if view.busy:
            return []
        if self._since is None:
            self._since = view.version
        late = self._turn_away_late(self._since) if self.settings.late == "drop" else []
        if self.round is None and self._queue and len(view.members) >= self.settings.min_workers:
            self.round = Round({worker.name for worker in view.members}, view.now_s)
        if self.round is None:
            return [*late, *self._turn_away_gone(view)]
        self.round.pushes.update({candidate.worker: candidate for candidate in self._queue})
        self._queue.clear()
        why = self._closed_by(self.round, view)
        return [*late, *self._end(self.round, why)] if why else late

    def _turn_away_gone(self, view: View) -> list[Move]:
        """Nobody knows when a round will open: whose worker has gone is not held for it."""
        present = {worker.name for worker in view.members}
        gone = [candidate for candidate in self._queue if candidate.worker not in present]
        self._queue = [candidate for candidate in self._queue if candidate not in gone]
        note = "its worker went before a round opened"
        return [
            TurnAway(candidate, Outcome.OUTCOME_DROPPED_LATE, "dropped_late", (note,)) for candidate in gone
        ]

    def _turn_away_late(self, since: int) -> list[Move]:
        late = [candidate for candidate in self._queue if candidate.known_version < since]
        self._queue = [candidate for candidate in self._queue if candidate not in late]
        return [
            TurnAway(
                candidate,
                Outcome.OUTCOME_DROPPED_LATE,
                "dropped_late",
                (f"its worker knew of version {candidate.known_version}, the last round made {since}",),
            )
            for candidate in late
        ]

    def _closed_by(self, open_round: Round, view: View) -> str:
        """Why the round is over; empty while it is not."""
        present = {worker.name for worker in view.members}
        missing = (open_round.expected & present) - open_round.pushes.keys()
        if not missing:
            return "complete"
        if self.settings.quorum is not None and len(open_round.pushes) >= self.settings.quorum:
            return f"quorum of {self.settings.quorum}, without {', '.join(sorted(missing))}"
        deadline_s = self.deadline_s()
        if deadline_s is not None and view.now_s >= deadline_s:
            return f"timed out without {', '.join(sorted(missing))}"
        return ""

    def _end(self, open_round: Round, why: str) -> list[Move]:
        self.round, self._since = None, None
        ordered = [open_round.pushes[name] for name in sorted(open_round.pushes)]
        skips = tuple(candidate for candidate in ordered if candidate.skips)
        stepped = tuple(candidate for candidate in ordered if not candidate.skips)
        notes = () if why == "complete" else (f"round closed: {why}",)
        return [Together(stepped, self.settings.reduce == "mean", skips, notes)]

    def consumed(self, worker: Worker) -> None:
        """Rounds count pushes, not sequences."""

    def deadline_s(self) -> float | None:
        """The open round's time-out."""
        if self.round is None or self.settings.timeout_s is None:
            return None
        return self.round.opened_s + self.settings.timeout_s

    def close(self, view: View) -> tuple[list[Move], list[Candidate]]:
        """At quorum the open round is stepped; otherwise its pushes are handed over, in worker order."""
        open_round, queue = self.round, self._queue
        self.round, self._queue = None, []
        held = [] if open_round is None else [open_round.pushes[name] for name in sorted(open_round.pushes)]
        queue.sort(key=lambda candidate: candidate.worker)
        if open_round is not None and self.settings.quorum is not None and len(held) >= self.settings.quorum:
            return self._end(open_round, "the policy was changed at quorum"), queue
        return [], held + queue

    def missing(self, view: View) -> str:
        """Who has not pushed, or is not there."""
        if self.round is None:
            there = len(view.members)
            if view.busy or there >= self.settings.min_workers:
                return "the round before is being added up"
            return f"{there} of {self.settings.min_workers} workers are there"
        present = {worker.name for worker in view.members}
        awaited = (self.round.expected & present) - self.round.pushes.keys()
        return f"{listed(awaited)} {'have' if len(awaited) > 1 else 'has'} not pushed yet"

    def shown(self, view: View) -> Callable[[Worker], dict[str, Any]]:
        """Whether the open round waits for it or has its push."""
        open_round = self.round

        def show(worker: Worker) -> dict[str, Any]:
            if open_round is None:
                return {"round": "none"}
            if worker.name in open_round.pushes:
                return {"round": "present"}
            return {"round": "awaited" if worker.name in open_round.expected else "not expected"}

        return show
