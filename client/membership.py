"""Who this worker is in a model, and how it becomes that: joining, waiting its turn, creating."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import AlreadyJoined, BeingCreated, ModelExists, NoCreationTicket
from pushstep.proto.layout import Layout
from pushstep.proto.process import this_process
from pushstep.proto.types_pb2 import Identity, Manifest

from .receipt import Receipt
from .retry import Retry
from .shield import shield
from .transport import Transport

LOOK_AGAIN_S: Final = 0.5


class Member:
    """A membership, and the sequence that it has reached."""

    def __init__(self, message: pb.Membership, known: Layout | None = None) -> None:
        """`known` serves where it is the model's: laying out a million parameters takes seconds."""
        self.uid = message.identity.model_uid
        self.timeline = message.identity.timeline
        self.worker = message.identity.worker
        self.epoch = message.identity.epoch
        self.sequence = message.identity.sequence
        self.version = message.version
        is_known = known is not None and known.manifest_hash == message.manifest_hash
        self.layout = known if known is not None and is_known else Layout(message.manifest)
        self.groups = list(message.groups)
        self.lease_s = message.lease_s
        self.lead = message.lead
        self.worker_state = message.worker_state
        self.policy = message.policy
        self.extras_version = message.extras_version
        self._forgotten = message.forgotten_epoch, message.forgotten_sequence
        self._receipts = list(message.receipts)

    def identity(self) -> Identity:
        """Who pushes, with the last sequence used."""
        return Identity(
            model_uid=self.uid,
            timeline=self.timeline,
            worker=self.worker,
            epoch=self.epoch,
            sequence=self.sequence,
        )

    def next_identity(self) -> Identity:
        """The identity of the next push."""
        identity = self.identity()
        identity.sequence += 1
        return identity

    def receipt_of(self, identity: Identity) -> Receipt | None:
        """The receipt that the server held for a push of an earlier epoch when this one was joined."""
        return next((Receipt.of(found) for found in self._receipts if found.identity == identity), None)

    def has_forgotten(self, identity: Identity) -> bool:
        """Whether the server cannot say any more what became of a push that it has no receipt of."""
        return (identity.epoch, identity.sequence) <= self._forgotten


def join(
    transport: Transport,
    retry: Retry,
    model: str,
    worker: str,
    manifest: Manifest | None,
    takeover: bool,
    attempt: int,
    old: Member | None,
    create: Callable[[pb.CreationTicket], Member] | None,
) -> tuple[Member, bool]:
    """Become a member, and whether that created the model.

    Waits out a live lease under this name and another worker's creation, within the retry time. `attempt` is this
    join's number, the same until it is answered: a copy of it that was on its way for long must not take over from what
    came of the others. `old` is the session's own earlier membership: it may join over itself, and is told if the model
    is no longer the one it was.
    """
    request = pb.JoinRequest(
        model=model, worker=worker, takeover=takeover, attempt=attempt, process=this_process()
    )
    if manifest is not None:
        request.manifest.CopyFrom(manifest)
    if old is not None:
        request.model_uid = old.uid
        request.epoch = old.epoch
    with retry.wait:
        return _join(transport, retry, request, create, None if old is None else old.layout)


def _join(
    transport: Transport,
    retry: Retry,
    request: pb.JoinRequest,
    create: Callable[[pb.CreationTicket], Member] | None,
    known: Layout | None,
) -> tuple[Member, bool]:
    model = request.model
    until_s = time.monotonic() + retry.for_s
    while True:
        try:
            answer = retry.run(lambda: transport.join(request))
        except AlreadyJoined as error:
            if time.monotonic() > until_s:
                raise
            retry.wait.told(error)
            # sooner than the lease ends: who holds the name may leave, or be gone
            shield.pause(min(error.retry_after_s or LOOK_AGAIN_S, LOOK_AGAIN_S))
            continue
        if answer.WhichOneof("result") == "member":
            return Member(answer.member, known), False
        if create is None:
            raise NoCreationTicket(model=model)
        ticket = answer.create
        try:
            return retry.run(lambda: create(ticket)), True  # noqa: B023
        except (NoCreationTicket, ModelExists, BeingCreated):
            # this ticket ran out, or an upload whose answer was lost has made the model: join what is there
            if time.monotonic() > until_s:
                raise
