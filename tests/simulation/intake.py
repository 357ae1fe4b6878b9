"""What arrives at one server process, as server/intake.py and server/membership.py take it: joins, and pushes.

A push is a stream: its header is offered, its body comes through the network or breaks off, and it stays open until
there is an answer, `push_pending`, or nobody who waits for one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pushstep.proto.errors import (
    AlreadyJoined,
    Fenced,
    NotHeld,
    OverBudget,
    OverCapacity,
    PushPending,
    PushstepError,
)
from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.types_pb2 import GroupValues, Identity, Receipt
from pushstep.server.coordinator.decision import Offer
from pushstep.server.coordinator.push import PendingPush
from pushstep.server.coordinator.worker import Decided

from .intent import Intent

if TYPE_CHECKING:
    from .house import House

# How long an answer is waited for before the worker is told to ask again.
HOLD_S = 1.0
BODY_BYTES = 200


@dataclass
class Answer:
    """What goes back to a worker: an error, or a receipt with the version that its exchange brings."""

    error: PushstepError | None = None
    receipt: Receipt | None = None
    version: int = 0


@dataclass
class Joined:
    """A membership."""

    identity: Identity
    version: int
    receipts: list[Receipt]
    forgotten: tuple[int, int]
    groups: list[GroupValues]
    lead: bool


@dataclass(eq=False)
class Stream:
    """One attempt of one push, from its header to its answer."""

    header: PushHeader
    intent: Intent
    reply: Callable[[Answer], None]
    offered: bool = False
    reserved: bool = False
    over: bool = False


class Intake:
    """The door of one server process."""

    def __init__(self, house: House) -> None:
        self._house = house
        self.streams: list[Stream] = []
        # offered, and told to wait with their bodies
        self.waiting: list[Stream] = []

    def close(self) -> None:
        """The process ends: nobody hears of its streams again."""
        self.streams.clear()
        self.waiting.clear()

    # Who is there.

    def join(
        self,
        name: str,
        takeover: bool,
        epoch: int | None,
        attempt: int,
        reply: Callable[[Joined | PushstepError], None],
    ) -> None:
        """As membership.py: who has the name may join over itself."""
        house = self._house
        try:
            worker, decisions = house.coordinator.join(
                name, house.agenda.now_s, takeover, attempt, epoch or 0
            )
        except (AlreadyJoined, Fenced, OverCapacity) as error:
            reply(error)
            return
        house.witness.heard(name)
        house.witness.joined(worker, attempt, epoch or 0)
        house.executor.apply(decisions)
        identity = Identity(
            model_uid=house.coordinator.uid, timeline=house.timeline, worker=name, epoch=worker.epoch
        )
        receipts = copy.deepcopy(house.coordinator.receipts_of(worker))
        house.witness.reminded(worker, receipts)
        lead = house.coordinator.sessions.leads(worker)
        groups = house.commits.groups.messages()
        reply(Joined(identity, house.commits.version, receipts, worker.forgotten, groups, lead))

    def heartbeat(self, identity: Identity) -> None:
        """A sign of life."""
        house = self._house
        house.witness.heard(identity.worker)
        with contextlib.suppress(PushstepError):  # the worker's next push finds out
            house.executor.apply(house.coordinator.on_heartbeat(identity, house.agenda.now_s))

    def leave(self, identity: Identity, lr: float | None = None) -> None:
        """A worker goes, with an lr that no push of its has carried."""
        house = self._house
        if lr is not None:
            house.witness.leaves(identity, lr)
        edits = None if lr is None else {0: {"lr": lr}}
        _, decisions = house.coordinator.on_leave(identity, house.agenda.now_s, edits)
        house.executor.apply(decisions)

    # Streams.

    def push(self, header: PushHeader, intent: Intent, reply: Callable[[Answer], None]) -> Stream:
        """One attempt. The stream is what a broken connection ends."""
        house = self._house
        stream = Stream(header, intent, reply)
        self.streams.append(stream)
        house.witness.heard(header.identity.worker)
        house.agenda.after(HOLD_S, lambda: self._pending(stream))
        if header.held_digest:
            try:
                house.coordinator.on_retry(header, house.agenda.now_s)
            except PushstepError as error:
                self.end(stream, Answer(error))
            else:
                self._await(stream)
        else:
            self._offer(stream)
        return stream

    def broken(self, stream: Stream) -> None:
        """Its worker has gone, or does not wait any more."""
        self.end(stream, None)

    def offer_again(self, stream: Stream) -> None:
        """Something has happened since it was told to wait."""
        if stream in self.waiting:
            self.waiting.remove(stream)
            self._offer(stream)

    def _offer(self, stream: Stream) -> None:
        house = self._house
        try:
            offer = house.coordinator.on_header(stream.header, house.agenda.now_s)
        except PushstepError as error:
            self.end(stream, Answer(error))
            return
        house.witness.offered(stream.header, offer)
        if offer is Offer.WAIT:
            self.waiting.append(stream)
            return
        stream.offered = True
        try:
            house.budget.reserve(BODY_BYTES)
        except OverBudget as error:
            self.end(stream, Answer(error))
            return
        stream.reserved = True
        name = stream.header.identity.worker
        house.network.bring(name, lambda: self._complete(stream), lambda: self.end(stream, None))

    def _complete(self, stream: Stream) -> None:
        if stream.over or stream not in self.streams:
            return
        house = self._house
        house.witness.heard(stream.header.identity.worker)
        pending = PendingPush(stream.header, stream.intent.digest, push=stream.intent.staged())
        house.witness.comes(stream.header.identity, stream.intent)
        try:
            decisions = house.coordinator.on_body(pending, house.agenda.now_s)
        except PushstepError as error:
            self.end(stream, Answer(error))
            return
        if pending.accepted:
            stream.reserved = False  # handed over
            house.executor.keep(pending)
        house.executor.apply(decisions)
        self._await(stream)

    def _await(self, stream: Stream) -> None:
        identity = stream.header.identity
        waiters = self._house.executor.waiters(identity)
        if waiters is not None:
            waiters.append(stream)
            return  # until it is settled, or the time is up
        decided = self._house.coordinator.decided_of(identity)
        if decided is None:
            self.end(stream, Answer(NotHeld(worker=identity.worker, sequence=identity.sequence)))
        else:
            self.answer(stream, decided)

    def _pending(self, stream: Stream) -> None:
        identity = stream.header.identity
        pending = self._house.executor.waited_for(stream)
        if pending is None and stream not in self.waiting:
            return  # answered; or its body is under way, and not broken off
        error = PushPending(
            worker=identity.worker,
            policy=self._house.coordinator.policy.name,
            why="simulated",
            digest=0 if pending is None else pending.digest,
            retry_after_s=0.0,
        )
        self.end(stream, Answer(error))

    def answer(self, stream: Stream, decided: Decided) -> None:
        """A push has been decided."""
        if decided.error is not None:
            self.end(stream, Answer(copy.copy(decided.error)))
        else:
            self.end(stream, Answer(None, decided.receipt))

    def end(self, stream: Stream, answer: Answer | None) -> None:
        """Once. None: its connection is gone."""
        if stream.over or stream not in self.streams:
            return
        house = self._house
        stream.over = True
        self.streams.remove(stream)
        if stream in self.waiting:
            self.waiting.remove(stream)
        if stream.offered:
            house.coordinator.on_stream_end(stream.header.identity)
        if stream.reserved:
            house.budget.release(BODY_BYTES)
        if answer is not None:
            answer.receipt = copy.deepcopy(answer.receipt)
            answer.version = house.arenas.version if house.arenas.timeline == house.timeline else 0
            stream.reply(answer)
