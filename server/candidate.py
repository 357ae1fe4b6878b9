"""A push between its complete body and its verdict: what the rooms that decide know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pushstep.proto.errors import PushstepError
from pushstep.proto.hyperparameters import Values, plain_values
from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.types_pb2 import Identity

from .staging import StagedPush

if TYPE_CHECKING:
    from .shared_answer import SharedAnswer


@dataclass(slots=True, eq=False)
class Candidate:
    """One push that waits for its verdict. Held by its worker, by sequence, until it has one."""

    header: PushHeader
    digest: int
    # None of a skip push, and of one whose body is at fault
    push: StagedPush | None = None
    fault: PushstepError | None = None
    staged_s: float = 0.0
    receive_s: float = 0.0
    # before its body was read
    waited_s: float = 0.0
    # the newest version that its worker knew of: what it was computed on, or the last receipt before it
    known_version: int = 0
    # counts as present and moves nothing
    skips: bool = False
    skip_reason: str = ""
    # what its step writes for its worker, where they share memory
    answer: SharedAnswer | None = None
    # the judge holds it, and it will be settled
    taken: bool = False

    @property
    def identity(self) -> Identity:
        """Who pushed it."""
        return self.header.identity

    @property
    def worker(self) -> str:
        """The name by which a round orders and counts it."""
        return self.header.identity.worker

    @property
    def weight(self) -> float:
        """Its share in a round: the samples that its gradient is over, or 1 when it does not say."""
        return self.header.samples or 1.0

    def edits(self) -> dict[int, Values]:
        """The hyperparameters that its worker changed, by group."""
        return {edit.group: plain_values(edit.values) for edit in self.header.edits}
