"""bounded: stale synchronous parallel (SSP). A worker may run at most `bound` clocks ahead of the slowest live one.

A worker's clock is the number of its sequences that have been consumed since it came. Joiners, returners and workers
released from quarantine start at the slowest clock there is; who is gone or quarantined does not count. A push is let
in when its clock, as it will be once its predecessors are decided, is at most `bound` ahead of the slowest; until
then it waits before its body is read, and holds no memory. A bound of 0 is lockstep. Since the slowest clock never
falls while anyone is ahead of it, what was let in stays within the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field

from .candidate import Candidate
from .policy import Alone, Move, PolicySettings, View, listed
from .settings import Whole
from .worker import Worker


class BoundedSettings(PolicySettings):
    """How far a worker may run ahead."""

    policy: Literal["bounded"] = "bounded"
    bound: Whole = Field(default=3, description="clocks that a worker may be ahead of the slowest live one")


class BoundedPolicy:
    """Keeps the clocks."""

    name: ClassVar[str] = "bounded"
    waits: ClassVar[bool] = True

    def __init__(self, settings: BoundedSettings | None = None) -> None:
        self.settings = settings or BoundedSettings()
        # by name, with the epoch in which it counts
        self._clocks: dict[str, tuple[int, int]] = {}
        self._arrived: list[Candidate] = []

    def _slowest(self, view: View) -> int:
        """The slowest clock of the members, each of whom has one after this."""
        present = {worker.name: worker.epoch for worker in view.members}
        known = {
            name: (epoch, clock)
            for name, (epoch, clock) in self._clocks.items()
            if present.get(name) == epoch
        }
        slowest = min((clock for _, clock in known.values()), default=0)
        for name, epoch in present.items():
            known.setdefault(name, (epoch, slowest))
        self._clocks = known
        return slowest

    def adopt(self, settings: PolicySettings) -> None:
        """Go on under other settings."""
        if isinstance(settings, BoundedSettings):
            self.settings = settings

    def admits(self, worker: Worker, ahead: int, view: View) -> bool:
        """Whether the push's clock is within the bound."""
        slowest = self._slowest(view)
        _, clock = self._clocks.get(worker.name, (0, slowest))
        return clock + ahead - slowest <= self.settings.bound

    def take(self, candidate: Candidate) -> None:
        """Until the review that follows: who may send its body is applied."""
        self._arrived.append(candidate)

    def drop(self, candidate: Candidate) -> None:
        """Let go of it."""
        if candidate in self._arrived:
            self._arrived.remove(candidate)

    def review(self, view: View) -> list[Move]:
        """Whatever has arrived."""
        self._slowest(view)  # newcomers start at the clock of now, not of when they first push
        return [Alone(self._arrived.pop(0))] if self._arrived else []

    def consumed(self, worker: Worker) -> None:
        """One clock more, whatever the verdict was."""
        epoch, clock = self._clocks.get(worker.name, (worker.epoch, 0))
        if epoch == worker.epoch:
            self._clocks[worker.name] = (epoch, clock + 1)

    def deadline_s(self) -> float | None:
        """Only members that go let anyone in, and their leases have a clock of their own."""
        return None

    def close(self, view: View) -> tuple[list[Move], list[Candidate]]:
        """Hand over what no review has seen; who waits before its body asks again."""
        left, self._arrived = self._arrived, []
        return [], left

    def missing(self, view: View) -> str:
        """Who is behind."""
        slowest = self._slowest(view)
        behind = [name for name, (_, clock) in self._clocks.items() if clock == slowest]
        return f"it is {self.settings.bound} clocks ahead of {listed(behind)}"

    def shown(self, view: View) -> Callable[[Worker], dict[str, Any]]:
        """Its clock, and how far it is ahead of the slowest."""
        slowest = self._slowest(view)
        clocks = {name: clock for name, (_, clock) in self._clocks.items()}

        def show(worker: Worker) -> dict[str, Any]:
            clock = clocks.get(worker.name)
            return {} if clock is None else {"clock": clock, "clocks_ahead": clock - slowest}

        return show
