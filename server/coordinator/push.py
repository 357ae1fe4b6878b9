"""A push whose body is complete and whose outcome is not decided yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from pushstep.proto.errors import PushstepError
from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.types_pb2 import Identity, Ticket
from pushstep.proto.wire.hyperparameters import Values, plain_values

from ..staging.gradient import StagedPush
from .groups import EditPlan

# Timeline, worker, epoch and sequence.
Key = tuple[int, str, int, int]


def key_of(identity: Identity) -> Key:
    """What tells the pushes of one model apart."""
    return identity.timeline, identity.worker, identity.epoch, identity.sequence


def keys_of(ticket: Ticket) -> list[Key]:
    """The pushes that a ticket steps, in its order: those of a round, or the only one."""
    return [key_of(of.identity) for of in ticket.contributions] or [key_of(ticket.identity)]


@dataclass(slots=True, eq=False)
class PendingPush:
    """One push that waits for its outcome. Its worker holds it by sequence until then."""

    header: PushHeader
    digest: int
    # the identity in its header: model, timeline, worker, epoch and sequence
    identity: Identity = field(init=False)
    # its worker's name, by which a round orders and counts it
    worker: str = field(init=False)
    key: Key = field(init=False)
    # None for a skip push, and for one whose body is at fault
    push: StagedPush | None = None
    fault: PushstepError | None = None
    staged_s: float = 0.0
    receive_s: float = 0.0
    # how long it waited before its body was read
    waited_s: float = 0.0
    # the newest version that its worker knew of: its base version, or that of the last receipt before it
    known_version: int = 0
    # its worker counts as present, and nothing is applied
    skips: bool = False
    skip_reason: str = ""
    # the coordinator holds it and will resolve it
    accepted: bool = False
    # what its edits do to the groups, as last planned
    plan: EditPlan | None = None

    def __post_init__(self) -> None:
        self.identity = self.header.identity
        self.key = key_of(self.identity)
        self.worker = self.key[1]

    @property
    def weight(self) -> float:
        """Its weight in a round: the number of samples of its gradient, or 1 if that is not given."""
        return self.header.samples or 1.0

    def edits(self) -> dict[int, Values]:
        """The hyperparameters that its worker changed, by group index."""
        return {edit.group: plain_values(edit.values) for edit in self.header.edits}
