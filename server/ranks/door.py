"""The workers' door of a rank above 0: parts of pushes, exact pulls, and the part of a new model. All else is rank 0's."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import (
    InvalidRequest,
    MalformedFrame,
    NotTheCoordinator,
    PushstepError,
)
from pushstep.proto.types_pb2 import Identity

from ..arenas.publisher import Published
from ..coordinator.decision import Decision, Offer
from ..models.catalog import Catalog
from ..models.model import Model
from ..process.request_log import about
from ..process.threads import PUSHES
from ..requests.pull import (
    exact_answer,
    exactly_stepped,
    published_header,
    published_messages,
    wire_of,
)
from ..requests.pull_rows import Gathered, Turns
from ..requests.push import PushHandler
from ..requests.push_call import PushCall
from ..requests.receiving import admit
from ..requests.upload import Upload
from ..shared_memory.regions import SharedMemory
from ..streams.bulk import BulkStream
from ..traces.request_spans import Traces
from ..worker_door.servicer import GrpcDoor
from .follower import Follower, HeldPart
from .other import OtherRank


@dataclass(frozen=True, slots=True)
class _NoJudge:
    """Reads every push: rank 0 decides about it."""

    model: Model

    def on_header(self, header: pb.PushHeader, now_s: float) -> Offer:
        """Read it, if it is of this model and timeline. ModelLost, Superseded."""
        self.model.coordinator.require_current(header.identity)
        return Offer.READ

    def on_chunk(self, identity: Identity, now_s: float) -> None:
        """Nothing."""

    def on_stream_end(self, identity: Identity) -> None:
        """Nothing."""

    def on_fault(self, identity: Identity, error: PushstepError, now_s: float) -> list[Decision]:
        """Nothing: the worker's own call to rank 0 does not come to its end."""
        return []


class PartPushes(PushHandler):
    """Push and Exchange: parts of pushes, whose steps rank 0 orders."""

    def __init__(self, catalog: Catalog, memory: SharedMemory, ranks: OtherRank) -> None:
        super().__init__(catalog, memory)
        self._ranks = ranks

    async def push(self, stream: BulkStream[pb.PushRequest]) -> pb.PushResponse:
        """A part of one gradient. The receipt is rank 0's."""
        with stream:
            await self._stepped(stream, pulls=False)
        return pb.PushResponse()

    async def exchange(self, stream: BulkStream[pb.PushRequest]) -> tuple[Published, pb.PullHeader]:
        """A part of a push, answered with this part of the version that it makes."""
        with stream:
            part, follower, header = await self._stepped(stream, pulls=True)
        model = follower.model
        answer = part.answer if part.answer is not None else exact_answer(model, header.pull, model.timeline)
        return await exactly_stepped(model, answer, header.manifest_hash)

    async def _stepped(
        self, stream: BulkStream[pb.PushRequest], *, pulls: bool
    ) -> tuple[HeldPart, Follower, pb.PushHeader]:
        self._catalog.require_open()
        header = (await stream.header()).header
        about(header.model, header.identity.worker, header.identity.sequence)
        if pulls:
            wire_of(header.pull.dtype)
        follower = self._ranks.follower_of(header.model, header.identity.model_uid, header.manifest_hash)
        model = follower.model
        call = PushCall(model, header)
        call.judge = _NoJudge(model)
        if header.held_digest:
            held = follower.held(header.identity)
            if held is None or held.digest != header.held_digest:
                raise follower.not_held(header.identity)
        else:
            held = await self._received(stream, follower, call, pulls=pulls)
        await follower.outcome(held, call.hold_s)
        return held, follower, header

    async def _received(
        self, stream: BulkStream[pb.PushRequest], follower: Follower, call: PushCall, *, pulls: bool
    ) -> HeldPart:
        model, header = follower.model, call.header
        receiving = await admit(call)
        try:
            commit = await stream.feed(receiving.take)
            pending = await receiving.finish(commit)
            model.require_whole()
            answer = exact_answer(model, header.pull, header.identity.timeline) if pulls else None
            blocks = receiving.known_blocks(follower.part) if pending.push is not None else {}
            part = HeldPart(pending.identity, pending.digest, pending.push, receiving.hand_over(), answer)
            return follower.hold(part, pending.fault, blocks)
        finally:
            receiving.release()


@dataclass(frozen=True, slots=True)
class PartTurns(Turns):
    """PullRows: rows of this part, when rank 0 orders it."""

    ranks: OtherRank

    def admit(self, model: Model, request: pb.PullRowsRequest) -> None:
        """See `Turns.admit`. NotTheCoordinator, ManifestChanged, RanksDiffer."""
        if not request.read:
            raise NotTheCoordinator(rank=self.ranks.rank, what="a pull of the newest rows")
        self.ranks.follower_of(model.name, b"", request.manifest_hash)
        model.require_whole()

    async def gathered(
        self, model: Model, request: pb.PullRowsRequest, gather: Callable[[], Gathered]
    ) -> Gathered:
        """See `Turns.gathered`. VersionGone."""
        follower = self.ranks.follower_of(model.name, model.uid, request.manifest_hash)
        return await follower.reads.ordered(int(request.read), gather)


class PartDoor(GrpcDoor):
    """The same methods, of which most are refused by name."""

    def __init__(
        self,
        catalog: Catalog,
        memory: SharedMemory,
        stall_s: float,
        traces: Traces | None,
        ranks: OtherRank,
    ) -> None:
        super().__init__(catalog, memory, stall_s, traces, PartPushes(catalog, memory, ranks))
        self.ranks = ranks
        self.row_turns = PartTurns(ranks)

    def _refused(self, what: str) -> NotTheCoordinator:
        return NotTheCoordinator(rank=self.ranks.rank, what=what)

    async def _refusing(self, what: str) -> AsyncGenerator[bytes, None]:
        for _ in ():
            yield b""
        raise self._refused(what)

    async def join(self, request: pb.JoinRequest, peer: str = "") -> pb.JoinResponse:
        """Join: rank 0's."""
        raise self._refused("Join")

    def join_in_parts(self, messages: AsyncIterator[bytes], peer: str = "") -> AsyncGenerator[bytes, None]:
        """JoinInParts: rank 0's."""
        return self._refusing("Join")

    async def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatResponse:
        """Heartbeat: rank 0's."""
        raise self._refused("Heartbeat")

    async def leave(self, request: pb.LeaveRequest) -> pb.LeaveResponse:
        """Leave: rank 0's."""
        raise self._refused("Leave")

    def pull_extras(self, request: pb.PullExtrasRequest) -> AsyncGenerator[bytes, None]:
        """PullExtras: rank 0's."""
        return self._refusing("PullExtras")

    async def pull(self, request: pb.PullRequest) -> AsyncGenerator[bytes, None]:
        """Pull: the version that rank 0 has answered with, and no other."""
        about(request.model, request.identity.worker, request.identity.sequence)
        if not request.options.HasField("version"):
            raise self._refused("a pull of the newest version")
        follower = self.ranks.follower_of(request.model, request.identity.model_uid, request.manifest_hash)
        wire_of(request.options.dtype)
        published = await follower.exactly(int(request.timeline), request.options)
        model = follower.model
        model.counts.pulls += 1
        answer = await published_header(model, published, request.manifest_hash)
        async for message in published_messages(published, answer):
            yield message

    async def pull_state(self, request: pb.PullStateRequest) -> AsyncGenerator[bytes, None]:
        """PullState: this part of the version that rank 0 has answered with, and no other."""
        about(request.model)
        if not request.HasField("version"):
            raise self._refused("a pull of the newest state")
        follower = self.ranks.follower_of(request.model, b"", request.manifest_hash)
        copy = await follower.state(int(request.version))
        async for message in self._state_messages(follower.model, copy, []):
            yield message

    async def upload(self, messages: AsyncIterator[bytes]) -> pb.UploadResponse:
        """Upload: the part of a new model."""
        self.catalog.require_open()
        with BulkStream(messages, pb.UploadRequest, self.stall_s, self.budget) as stream:
            header = (await stream.header()).header
            if header.kind != pb.UPLOAD_KIND_CREATE:
                raise self._refused("an upload that makes no model")
            await self.ranks.creations.until_promised(header.model, int(header.ticket))
            upload = PartUpload(self.catalog, header)
            upload.ranks = self.ranks
            try:
                await upload.admit()
                await stream.feed(upload.place)
                return await upload.commit()
            finally:
                upload.release()


class PartUpload(Upload):
    """The part of a new model. The model is made when rank 0 says so, in all ranks."""

    ranks: OtherRank

    async def admit(self) -> None:
        """See `Upload.admit`. Only rank 0 takes a ticket back: after an upload that broke off another one may come."""
        self._comes_again = True
        await super().admit()

    async def _create(self) -> pb.UploadResponse:
        header = self._header
        promised = self.ranks.creations.promised(header.model, int(header.ticket))
        if header.extras_bytes:
            raise MalformedFrame(problem="buffers go to rank 0")
        model = await PUSHES.run(self._catalog.new_model, header.model, self._layout, promised.uid)
        model.shard = promised.shard
        await model.writer.submit(lambda: self._fill(model.arenas, header.steps))
        # a worker that was cut off uploads again: the newest counts, until rank 0 has the model made
        replaced = model if promised.is_taken else promised.model
        if not promised.is_taken:
            self.ranks.creations.part_is_here(promised, model)
        if replaced is not None:
            await replaced.close()
        if promised.made is not None:
            await promised.made
        self._has_place = True
        return pb.UploadResponse(version=model.version, timeline=model.timeline)

    def _laid_out(self, manifest: bytes) -> Any:
        part = self.ranks.creations.promised(self._header.model, int(self._header.ticket)).shard.part
        if part is None:
            raise InvalidRequest("no part of it is here")
        return part.layout
