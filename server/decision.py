"""What the judge decides, for whoever drives it to carry out, in the order given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pushstep.proto.errors import PushstepError
from pushstep.proto.types_pb2 import Ticket

from .candidate import Candidate
from .staging import StagedPush
from .worker import Verdict


class Offer(Enum):
    """What to do with a push whose header has come."""

    # read the body, then say that it is staged
    READ = "read"
    # the policy lets it wait: do not read the body, offer it again after the next event
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Settle:
    """The push has its verdict; or, with an error, it will never have one (fenced, or of an ended timeline)."""

    candidate: Candidate
    verdict: Verdict | None
    error: PushstepError | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Combine:
    """Add these pushes up (see reduction.py), away from the loop, and say that they are `combined`."""

    candidates: tuple[Candidate, ...]
    skips: tuple[Candidate, ...]
    mean: bool
    notes: tuple[str, ...]

    @property
    def weights(self) -> tuple[float, ...]:
        """Each push's weight."""
        return tuple(candidate.weight for candidate in self.candidates)

    @property
    def divisor(self) -> float:
        """What the weighted sum is divided by: the contributors' weight, added up in their order."""
        return sum(self.weights) if self.mean else 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """Execute the ticket over the push, then settle what was decided with it. `facts` are for observers."""

    ticket: Ticket
    push: StagedPush
    settles: tuple[Settle, ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Note:
    """Something for the model's events: who did what."""

    kind: str
    by: str
    facts: Mapping[str, Any]


Decision = Settle | Combine | Step | Note
