"""When a push is applied: what every policy is, and the moves that it makes.

A policy is a synchronous state machine. It holds the candidates that have passed the gate and were not decided yet,
and at each review it looks at who is there and what time it is, and says which of them are stepped, alone or
together, and which are turned away. It never sees a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

from pushstep.proto.types_pb2 import Outcome

from .candidate import Candidate
from .settings import Settings
from .worker import Worker


class PolicySettings(Settings):
    """Base of every policy's settings."""

    policy: str


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may look at."""

    now_s: float
    # the last one that a ticket was written for
    version: int
    # live workers that are not quarantined, longest joined first
    members: Sequence[Worker]
    # a round is being added up: its version is not there yet
    busy: bool = False


@dataclass(frozen=True, slots=True)
class Alone:
    """Step this push by itself."""

    candidate: Candidate
    lr_scale: float = 1.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Together:
    """Add these pushes up, in this order, and step the result; answer `absent` with the version that it makes."""

    candidates: tuple[Candidate, ...]
    mean: bool
    # present without a contribution
    skips: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TurnAway:
    """Give this push a verdict that moves nothing."""

    candidate: Candidate
    outcome: Outcome
    reason: str
    notes: tuple[str, ...] = ()


NAMES_SHOWN: Final = 5


def listed(names: Iterable[str]) -> str:
    """Some workers' names, in words."""
    found = sorted(names)
    more = len(found) - NAMES_SHOWN
    return ", ".join(found[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


Move = Alone | Together | TurnAway


class Policy(Protocol):
    """One model's policy: `judge.py` asks it."""

    name: ClassVar[str]
    # whether workers wait for each other under it, so that it matters who is there
    waits: ClassVar[bool]

    @property
    def settings(self) -> PolicySettings:
        """As they stand."""

    def adopt(self, settings: PolicySettings) -> None:
        """Go on under other settings of the same policy."""

    def admits(self, worker: Worker, ahead: int, view: View) -> bool:
        """Whether a push may send its body now. `ahead`: pushes of its worker that come before it, not decided yet."""

    def take(self, candidate: Candidate) -> None:
        """Hold a candidate until a review decides it. At most one of each worker is held at a time."""

    def drop(self, candidate: Candidate) -> None:
        """Let go of a candidate without a verdict: its worker was fenced, or its timeline ended."""

    def review(self, view: View) -> list[Move]:
        """What is to be done now. Called after every event, until there is nothing."""

    def consumed(self, worker: Worker) -> None:
        """A sequence of this worker got its verdict."""

    def deadline_s(self) -> float | None:
        """When a review is due although nothing happens."""

    def close(self, view: View) -> tuple[list[Move], list[Candidate]]:
        """The end of this policy: the moves that it can still make, and the candidates for the next one to judge."""

    def missing(self, view: View) -> str:
        """What pushes wait for, in words."""

    def shown(self, view: View) -> Callable[[Worker], dict[str, Any]]:
        """What an operator may want to know of each worker under this policy: looked up once for all of them."""
