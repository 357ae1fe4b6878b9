"""One push as its caller made it: of which model, with which header, and where its gradients lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from pushstep.proto.errors import InvalidRequest, PushstepError
from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.types_pb2 import Identity

from ..coordinator.decision import Decision, Offer
from ..models.held_pushes import HOLD_S
from ..models.model import Model
from ..parts.exact import ExactAnswer
from ..shared_memory.answer import SharedAnswer
from ..shared_memory.region import Region


class Judge(Protocol):
    """Who says whether a push is read: the model's coordinator, or in a rank above 0 nobody, since rank 0 decides."""

    def on_header(self, header: PushHeader, now_s: float) -> Offer:
        """A header has come."""

    def on_chunk(self, identity: Identity, now_s: float) -> None:
        """A chunk has come."""

    def on_stream_end(self, identity: Identity) -> None:
        """The stream of a push that is read has ended."""

    def on_fault(self, identity: Identity, error: PushstepError, now_s: float) -> list[Decision]:
        """A push broke a rule before its body was complete."""


@dataclass(slots=True, eq=False)
class PushCall:
    """A push that is asked for."""

    model: Model
    header: PushHeader
    # where gradients lie that are not sent
    region: Region | None = None
    # what the step writes for the worker, where they share memory
    answer: SharedAnswer | ExactAnswer | None = None
    # bytes of its body that lie in the region
    region_bytes: int = 0
    started_s: float = field(init=False)
    judge: Judge = field(init=False)
    # of its header
    identity: Identity = field(init=False)
    worker: str = field(init=False)

    def __post_init__(self) -> None:
        self.started_s = self.model.clock()
        self.judge = self.model.coordinator
        self.identity = self.header.identity
        self.worker = self.identity.worker

    @property
    def hold_s(self) -> float:
        """How long the caller lets it wait for other workers."""
        return min(self.header.hold_s or HOLD_S, HOLD_S)

    @property
    def until_s(self) -> float:
        """When that is over."""
        return self.started_s + self.hold_s

    def fault(self, error: InvalidRequest) -> None:
        """Count against the worker a push that broke a rule before its body was complete."""
        self.model.executor.apply(self.judge.on_fault(self.identity, error, self.model.clock()))
