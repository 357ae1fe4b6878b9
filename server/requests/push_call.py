"""One push as its caller made it: of which model, with which header, and where its gradients lie."""

from __future__ import annotations

from dataclasses import dataclass, field

from pushstep.proto.errors import InvalidRequest
from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.types_pb2 import Identity

from ..models.held_pushes import HOLD_S
from ..models.model import Model
from ..shared_memory.answer import SharedAnswer
from ..shared_memory.region import Region


@dataclass(slots=True, eq=False)
class PushCall:
    """A push that is asked for."""

    model: Model
    header: PushHeader
    # where gradients lie that are not sent
    region: Region | None = None
    # what the step writes for the worker, where they share memory
    answer: SharedAnswer | None = None
    # bytes of its body that lie in the region
    region_bytes: int = 0
    started_s: float = field(init=False)
    # of its header
    identity: Identity = field(init=False)
    worker: str = field(init=False)

    def __post_init__(self) -> None:
        self.started_s = self.model.clock()
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
        coordinator, now_s = self.model.coordinator, self.model.clock()
        self.model.executor.apply(coordinator.on_fault(self.identity, error, now_s))
