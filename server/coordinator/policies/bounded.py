"""bounded: stale synchronous parallel (SSP). A worker runs at most `bound` clocks ahead of the slowest.

A worker's clock goes up by one with each of its sequences that is consumed. The slowest is the lowest clock of the
live workers. Workers that join, return or leave quarantine start at the slowest clock. Workers that are gone or
quarantined do not count. A push is let in when its clock, after its predecessors are decided, is at most `bound` ahead
of the slowest. Until then it waits before its body is read, and holds no memory. A bound of 0 is lockstep. The slowest
clock never falls while any worker is ahead of it, so a push that was let in stays within the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field

from ..push import PendingPush
from ..settings import Whole
from ..worker import Worker
from .policy import Move, PolicySettings, Single, View, listed


class BoundedSettings(PolicySettings):
    """How far a worker may run ahead."""

    policy: Literal["bounded"] = "bounded"
    bound: Whole = Field(default=3, description="clocks that a worker may be ahead of the slowest live one")


class BoundedPolicy:
    """Owns the workers' clocks."""

    name: ClassVar[str] = "bounded"
    waits: ClassVar[bool] = True

    def __init__(self, settings: BoundedSettings) -> None:
        self.settings = settings
        # (epoch, clock) by name; the clock counts in that epoch only
        self._clocks: dict[str, tuple[int, int]] = {}
        self._incoming: list[PendingPush] = []

    def _slowest(self, view: View) -> int:
        """The slowest clock of the members. Gives it to members without a clock, and forgets all others."""
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
        """Continue under other settings."""
        if isinstance(settings, BoundedSettings):
            self.settings = settings

    def admits(self, worker: Worker, ahead: int, view: View) -> bool:
        """True if the push's clock is within the bound."""
        slowest = self._slowest(view)
        _, clock = self._clocks.get(worker.name, (0, slowest))
        return clock + ahead - slowest <= self.settings.bound

    def take(self, pending: PendingPush) -> None:
        """Hold it until the review that follows. Every push whose body was let in is applied."""
        self._incoming.append(pending)

    def drop(self, pending: PendingPush) -> None:
        """Release it."""
        if pending in self._incoming:
            self._incoming.remove(pending)

    def review(self, view: View) -> list[Move]:
        """The step of the first push that has arrived."""
        self._slowest(view)  # newcomers start at the present clock, not at that of their first push
        return [Single(self._incoming.pop(0))] if self._incoming else []

    def consumed(self, worker: Worker) -> None:
        """Advance the worker's clock by one, whatever the outcome was."""
        epoch, clock = self._clocks.get(worker.name, (worker.epoch, 0))
        if epoch == worker.epoch:
            self._clocks[worker.name] = (epoch, clock + 1)

    def deadline_s(self) -> float | None:
        """None: without an event only the end of a lease lets a push in, and Sessions times leases."""
        return None

    def close(self, view: View) -> tuple[list[Move], list[PendingPush]]:
        """Hand over the pushes that no review has seen. Those without a body yet are offered again."""
        left, self._incoming = self._incoming, []
        return [], left

    def missing(self, view: View) -> str:
        """The slowest workers, in words."""
        slowest = self._slowest(view)
        behind = [name for name, (_, clock) in self._clocks.items() if clock == slowest]
        return f"it is {self.settings.bound} clocks ahead of {listed(behind)}"

    def shown(self, view: View) -> Callable[[Worker], dict[str, Any]]:
        """A worker's clock, and how far it is ahead of the slowest."""
        slowest = self._slowest(view)
        clocks = {name: clock for name, (_, clock) in self._clocks.items()}

        def show(worker: Worker) -> dict[str, Any]:
            clock = clocks.get(worker.name)
            return {} if clock is None else {"clock": clock, "clocks_ahead": clock - slowest}

        return show
