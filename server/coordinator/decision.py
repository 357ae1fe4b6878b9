"""The coordinator's decisions. The caller applies them in the order given (models/executor.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pushstep.proto.errors import PushstepError
from pushstep.proto.types_pb2 import Ticket

from ..staging.gradient import StagedPush
from .policies.policy import Policy
from .push import PendingPush
from .worker import Decided


class Offer(Enum):
    """What to do with a push whose header has come."""

    # read the body, then call `on_body`
    READ = "read"
    # the policy holds it back: do not read the body, offer the header again after the next event
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Resolve:
    """A pending push is resolved: `decided` is its outcome. With an `error` it will never have one.

    Such an error says that its worker is fenced, expired or quarantined, or that its timeline has ended.
    """

    pending: PendingPush
    decided: Decided | None
    error: PushstepError | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Reduce:
    """Add these pushes up (staging/reduction.py) off the event loop, then call `reduced` with the result."""

    pushes: tuple[PendingPush, ...]
    skips: tuple[PendingPush, ...]
    mean: bool
    notes: tuple[str, ...]
    # the policy that closed the round: another one may be in force when the sum is there
    policy: Policy

    @property
    def weights(self) -> tuple[float, ...]:
        """Each push's weight."""
        return tuple(pending.weight for pending in self.pushes)

    @property
    def divisor(self) -> float:
        """The divisor of the weighted sum: for a mean the weights, added up in the pushes' order; else 1."""
        return sum(self.weights) if self.mean else 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """Execute the ticket over the push, then apply its `resolves`. `facts` are for observers."""

    ticket: Ticket
    push: StagedPush
    resolves: tuple[Resolve, ...]
    facts: Mapping[str, Any]
    # the hooks as they are after it, as JSON
    hooks: Sequence[Mapping[str, Any]] = ()
    # in a rank that only executes tickets: what its pushes brought, in the ticket's order; nobody is resolved there
    parts: Sequence[StagedPush] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """An entry for the model's events: what happened and who did it."""

    kind: str
    by: str
    facts: Mapping[str, Any]


Decision = Resolve | Reduce | Step | Event
