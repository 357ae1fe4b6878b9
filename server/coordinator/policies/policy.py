"""The interface of every policy, and the moves that it makes. A policy decides when a push is applied.

A policy is a synchronous state machine. It holds the pending pushes that have passed the gate and are not decided yet.
At each review it looks at the members and the time. It says which pushes are stepped alone, which are stepped as a
round, and which are refused. It never looks at a gradient's values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

from pushstep.proto.errors import OverCapacity
from pushstep.proto.types_pb2 import Outcome

from ..push import PendingPush
from ..settings import Settings
from ..worker import Worker


class PolicySettings(Settings):
    """Base of every policy's settings."""

    policy: str

    def gradients_held(self, workers: int) -> int:
        """The most gradients that the policy keeps in staging at once, for a number of live workers; 0: it keeps none."""
        return 0


def require_gradients_fit(
    settings: PolicySettings, workers: int, gradient_bytes: int, staging_bytes: int
) -> None:
    """OverCapacity if what a policy keeps at once does not fit in staging."""
    held = settings.gradients_held(workers)
    if held * gradient_bytes > staging_bytes:
        raise OverCapacity(
            problem=f"policy {settings.policy} with {workers} workers keeps {held} buffers of {gradient_bytes} bytes, "
            f"staging has {staging_bytes}",
            setting="staging-bytes",
        )


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may look at."""

    now_s: float
    # the current version, whose step may not be taken yet
    version: int
    # live workers that are not quarantined, longest joined first
    members: Sequence[Worker]
    # a round is being added up, so its version does not exist yet
    busy: bool = False
    # the version that this policy's last round made, after which uploads may have made others; 0 before the first
    round_version: int = 0


@dataclass(frozen=True, slots=True)
class Single:
    """Step this push by itself."""

    pending: PendingPush
    lr_scale: float = 1.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Round:
    """Add these pushes up, in this order, and step the result. `skips` are answered with its version."""

    pushes: tuple[PendingPush, ...]
    mean: bool
    # pushes whose workers are present without a contribution
    skips: tuple[PendingPush, ...] = ()
    notes: tuple[str, ...] = ()
    # what ended it, in one word, and when it was opened
    closed_by: str = "complete"
    opened_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Refuse:
    """Give this push an outcome that changes nothing."""

    pending: PendingPush
    outcome: Outcome
    reason: str
    notes: tuple[str, ...] = ()


NAMES_SHOWN: Final = 5


def listed(names: Iterable[str]) -> str:
    """The first `NAMES_SHOWN` names in words, and how many more there are."""
    found = sorted(names)
    more = len(found) - NAMES_SHOWN
    return ", ".join(found[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


Move = Single | Round | Refuse


class Policy(Protocol):
    """One model's policy. coordinator.py and pending.py call it."""

    name: ClassVar[str]
    # True if workers wait for each other; else its `View.members` are left empty
    waits: ClassVar[bool]

    @property
    def settings(self) -> PolicySettings:
        """The current settings."""

    def adopt(self, settings: PolicySettings) -> None:
        """Continue under other settings of the same policy."""

    def admits(self, worker: Worker, ahead: int, view: View) -> bool:
        """True if a push may send its body now. `ahead`: its worker's earlier pushes that are undecided."""

    def take(self, pending: PendingPush) -> None:
        """Hold a pending push until a review decides it. At most one push per worker is held at a time."""

    def drop(self, pending: PendingPush) -> None:
        """Release a push that gets no outcome: its worker was fenced, say, or its timeline ended."""

    def review(self, view: View) -> list[Move]:
        """The moves to make now. Called after every event, until there are none."""

    def consumed(self, worker: Worker) -> None:
        """A sequence of this worker got its outcome."""

    def deadline_s(self) -> float | None:
        """When a review is due if no event comes; None if none is."""

    def close(self, view: View) -> tuple[list[Move], list[PendingPush]]:
        """End this policy. Returns the moves that it can still make, and the pushes for the next policy."""

    def missing(self, view: View) -> str:
        """What pushes wait for, in words."""

    def shown(self, view: View) -> Callable[[Worker], dict[str, Any]]:
        """A function that returns a worker's state, for operators. One lookup serves all workers."""
