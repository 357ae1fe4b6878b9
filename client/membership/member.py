"""The membership of a worker in a model, and how to get one: join, wait until the name is free, create the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import (
    AlreadyJoined,
    BeingCreated,
    ModelExists,
    NoCreationTicket,
    RolledBack,
    Superseded,
)
from pushstep.proto.process import this_process
from pushstep.proto.types_pb2 import Identity, Manifest
from pushstep.proto.wire.layout import Layout

from ..transport.channel import Transport
from ..transport.retry import Retry
from ..transport.shield import shield
from .receipt import Receipt

LOOK_AGAIN_S: Final = 0.5


class Member:
    """A membership as the server's answer gave it, and the last sequence that the worker has used."""

    def __init__(self, message: pb.Membership, known: Layout | None = None) -> None:
        """`known` is used if it has the model's manifest: laying out a million parameters takes seconds."""
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
        self.rolled_back = message.rolled_back
        # the model lies in several ranks
        self.is_sharded = message.HasField("shards")
        self._forgotten = message.forgotten_epoch, message.forgotten_sequence
        self._receipts = list(message.receipts)

    def identity(self) -> Identity:
        """This worker's identity, with the last sequence used."""
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
        """The receipt of a push of an earlier epoch, if the join brought it; otherwise None."""
        return next((Receipt.of(found) for found in self._receipts if found.identity == identity), None)

    def undone_since(self, timeline: int, model: str) -> Superseded:
        """The error for a caller that knows an earlier timeline: RolledBack if a crash has undone versions, else Superseded."""
        if not self.rolled_back:
            return Superseded(model=model, timeline=self.timeline, got=timeline)
        versions, version = self.rolled_back, self.version
        return RolledBack(model=model, versions=versions, version=version, timeline=self.timeline)

    def has_forgotten(self, identity: Identity) -> bool:
        """Whether the server has forgotten the receipts up to this push, so that its outcome is unknown."""
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
    told_version: int,
    create: Callable[[pb.CreationTicket], Member] | None,
) -> tuple[Member, bool]:
    """Join; the membership, and whether this join created the model.

    If the name has a live lease, or another worker is creating the model, it waits for the retry time at most; then it
    raises AlreadyJoined, NoCreationTicket, ModelExists or BeingCreated. `attempt` is this join's number, the same in every
    retry: a delayed copy of the request must not end the membership that another copy opened. `old` is the session's own
    earlier membership, which it may replace; the server tells it if the model is now another one. `told_version`: the
    newest version that a receipt has told it of. If the model does not exist and `create` is None, it raises NoCreationTicket.
    """
    request = pb.JoinRequest(
        model=model, worker=worker, takeover=takeover, attempt=attempt, process=this_process()
    )
    if manifest is not None:
        request.manifest.CopyFrom(manifest)
    if old is not None:
        request.model_uid = old.uid
        request.epoch = old.epoch
        request.timeline, request.version = old.timeline, told_version
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
            # ask before the lease ends: the holder of the name may leave or be gone sooner
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
            # the ticket ran out, or an upload whose answer was lost has created the model: join again
            if time.monotonic() > until_s:
                raise
