"""The workers' door: gRPC. Decode, call the room, encode; errors leave as the catalogue says.

Bulk methods take and give raw messages, which frames.py reads and writes, so that tensor bytes never pass through a
protobuf object. Any protobuf client can talk to them all the same.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from importlib.metadata import version as installed_version
from typing import Any, Final

import grpc
import torch

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import (
    Draining,
    InvalidRequest,
    PushstepError,
    Quarantined,
)
from pushstep.proto.frames import MAX_CHUNK_BYTES, Piece, pack
from pushstep.proto.parts import WHOLE_BYTES, parts_of
from pushstep.proto.status import TRAILER, brief, to_trailer
from pushstep.proto.types_pb2 import GroupValues, Identity, Receipt

from .arena import ArenasCopy
from .bulk import BulkStream
from .catalog import Catalog
from .copies import COPIES_AT_ONCE, ModelCopies, copy_of
from .counted_parts import CountedParts
from .grpc_methods import abort, answered, answering, only, streamed, streaming
from .intake import Intake
from .membership import join, leave
from .model import Model
from .publish import Published
from .pull_answers import (
    extras_header,
    have_version,
    header_frames,
    newest,
    published_header,
    published_messages,
    state_bodies,
    state_header,
    wire_of,
)
from .readers import Context, Readers
from .rows_asked import pulled_rows
from .shared_answer import SharedAnswer
from .shared_memory import SharedMemory
from .tarpit import Tarpit
from .threads import INLINE_PARTS, PULLS, REQUESTS
from .timed_messages import TimedMessages
from .upload import Upload

log = logging.getLogger("pushstep.grpc")
SERVICE: Final = "pushstep.v1.TrainingService"
# read once: each connect asks, and the package's files may be gone by then, or the process's descriptors
VERSION: Final = installed_version("pushstep")


class GrpcDoor:
    """The methods of TrainingService."""

    def __init__(self, catalog: Catalog, memory: SharedMemory, stall_s: float) -> None:
        self.catalog = catalog
        self.budget = catalog.staging
        self.memory = memory
        self.stall_s = stall_s
        self.readers = Readers(catalog.reading, stall_s)
        self.tarpit = Tarpit()
        self._copies = ModelCopies(COPIES_AT_ONCE)
        self.draining = False
        self.http_url = ""
        self.unix_path = ""

    def handler(self) -> grpc.GenericRpcHandler:
        """What a grpc.aio server is given."""
        # Also those of one message, as far as gRPC is concerned: that way the door waits for it, and not for ever.
        call, stream = grpc.stream_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler

        def one(method: Callable[[Any], Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
            return answering(method, self._refuse, self.readers)

        def many(
            method: Callable[[Any], AsyncGenerator[bytes, None]],
        ) -> Callable[[Any, Context], Awaitable[None]]:
            return streaming(method, self._refuse, self.readers)

        async def joined(messages: AsyncIterator[bytes], context: Context) -> Any:
            by_whom = partial(self.join, peer=context.peer())
            return await one(answered(by_whom, pb.JoinRequest))(messages, context)

        async def joined_in_parts(messages: AsyncIterator[bytes], context: Context) -> None:
            await many(partial(self.join_in_parts, peer=context.peer()))(messages, context)

        methods: dict[str, Any] = {
            "Describe": call(one(answered(self.describe, pb.DescribeRequest))),
            "Join": call(joined),
            "JoinInParts": stream(joined_in_parts),
            "Heartbeat": call(one(answered(self.heartbeat, pb.HeartbeatRequest))),
            "Leave": call(one(answered(self.leave, pb.LeaveRequest))),
            "OpenRegion": call(one(answered(self.open_region, pb.OpenRegionRequest))),
            "Upload": call(one(self.upload)),
            "Push": call(one(self.push)),
            "Exchange": stream(many(self.exchange)),
            "Pull": stream(many(streamed(self.pull, pb.PullRequest))),
            "PullRows": stream(many(self.pull_rows)),
            "PullState": stream(many(streamed(self.pull_state, pb.PullStateRequest))),
            "PullExtras": stream(many(streamed(self.pull_extras, pb.PullExtrasRequest))),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def describe(self, request: pb.DescribeRequest) -> pb.DescribeResponse:
        """Describe."""
        return pb.DescribeResponse(
            server_version=VERSION,
            max_chunk_bytes=MAX_CHUNK_BYTES,
            models=sorted(self.catalog.models),
            unix_path=self.unix_path,
            http_url=self.http_url,
            memory_path=self.memory.path,
        )

    async def join(self, request: pb.JoinRequest, peer: str = "") -> pb.JoinResponse:
        """Join. `peer`: whose connection it came on."""
        self._take_new_work()
        return await join(self.catalog, request, peer, WHOLE_BYTES)

    async def join_in_parts(
        self, messages: AsyncIterator[bytes], peer: str = ""
    ) -> AsyncGenerator[bytes, None]:
        """JoinInParts. `peer`: whose connection it came on."""
        self._take_new_work()
        parts = CountedParts("a join", self.budget)
        try:
            await parts.read(TimedMessages(messages, self.stall_s))
            response = await join(self.catalog, await parts.parsed(pb.JoinRequest), peer)
            whole = await REQUESTS.run(response.SerializeToString)
        finally:
            parts.release()
        del response
        await self.readers.budget.claim(len(whole))
        try:
            for part in parts_of(whole):
                yield pb.JoinPart(part=part).SerializeToString()
        finally:
            self.readers.budget.give_back(len(whole))

    async def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatResponse:
        """Heartbeat."""
        model = self.catalog.get(request.model, request.identity.model_uid)
        model.require_current(request.identity)
        model.executor.carry_out(model.judge.heard(request.identity, time.monotonic()))
        return pb.HeartbeatResponse(version=model.version, lease_s=model.sessions.lease_s)

    async def leave(self, request: pb.LeaveRequest) -> pb.LeaveResponse:
        """Leave."""
        answer = await leave(self.catalog, request)
        self.memory.close_stale()
        return answer

    async def open_region(self, request: pb.OpenRegionRequest) -> pb.OpenRegionResponse:
        """OpenRegion."""
        self._take_new_work()
        model = self.catalog.get(request.model, request.identity.model_uid)
        model.require_current(request.identity)
        model.sessions.require(request.identity, time.monotonic())
        return await self.memory.open(model, request)

    async def upload(self, messages: AsyncIterator[bytes]) -> pb.UploadResponse:
        """Upload."""
        self._take_new_work()
        with BulkStream(messages, pb.UploadRequest, self.stall_s, self.budget) as stream:
            upload = Upload(self.catalog, (await stream.header()).header)
            try:
                await upload.admit()
                await stream.feed(upload.place)
                return await upload.commit()
            finally:
                upload.release()

    async def push(self, messages: AsyncIterator[bytes]) -> pb.PushResponse:
        """Push."""
        return await self.pushed(BulkStream(messages, pb.PushRequest, self.stall_s, self.budget))

    async def pushed(self, stream: BulkStream[pb.PushRequest]) -> pb.PushResponse:
        """Push, however its stream comes."""
        with stream:
            _, _, receipt, _ = await self._take_push(stream)
        return pb.PushResponse(receipt=receipt)

    async def exchange(self, messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Exchange."""
        published, answer = await self.exchanged(
            BulkStream(messages, pb.PushRequest, self.stall_s, self.budget)
        )
        async for message in published_messages(published, answer):
            yield message

    async def exchanged(self, stream: BulkStream[pb.PushRequest]) -> tuple[Published, pb.PullHeader]:
        """Exchange, however its stream comes: what was published, and the answer's header."""
        with stream:
            model, header, receipt, shared = await self._take_push(stream, pulls=True)
        begun_s = time.monotonic()
        published = await newest(model, header.pull, header.identity.timeline, shared)
        answer = await published_header(model, published, header.manifest_hash)
        answer.receipt.CopyFrom(receipt)
        answer.groups.extend(receipt.groups)
        answer.receipt.times.publish_s = time.monotonic() - begun_s
        return published, answer

    async def pull(self, request: pb.PullRequest) -> AsyncGenerator[bytes, None]:
        """Pull."""
        model = self.catalog.get(request.model, request.identity.model_uid)
        groups = model.group_values()
        if request.HasField("identity"):
            model.require_current(request.identity)
            model.executor.carry_out(model.judge.heard(request.identity, time.monotonic()))
        else:
            model.require_whole()
        shared = self._shared_answer(model, request.options, request.identity)
        published = await newest(model, request.options, request.timeline, shared)
        answer = await published_header(model, published, request.manifest_hash)
        answer.groups.extend(groups)
        async for message in published_messages(published, answer):
            yield message

    async def pull_rows(self, messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """PullRows, of a message that has not been parsed."""
        async with aclosing(pulled_rows(self.catalog, self.readers.budget, await only(messages))) as answers:
            async for answer in answers:
                yield answer

    async def pull_state(self, request: pb.PullStateRequest) -> AsyncGenerator[bytes, None]:
        """PullState."""
        model = self.catalog.get(request.model)
        values = model.group_values()
        async with copy_of(self._copies, model) as (_, copy):
            async for message in self._state_messages(model, copy, values):
                yield message

    async def _state_messages(
        self, model: Model, copy: ArenasCopy, values: list[GroupValues]
    ) -> AsyncGenerator[bytes, None]:
        segments, bodies = state_bodies(copy)
        few = len(copy.layout.slots) <= INLINE_PARTS
        header = await PULLS.run_unless(few, state_header, model, copy, segments)
        header.groups.extend(values)
        for message in await header_frames(header):
            yield message
        frames = pack(bodies)
        while (frame := await PULLS.run(next, frames, None)) is not None:
            yield frame

    async def pull_extras(self, request: pb.PullExtrasRequest) -> AsyncGenerator[bytes, None]:
        """PullExtras."""
        model = self.catalog.get(request.model)
        model.require_whole()
        extras = model.extras
        await self.readers.budget.claim(extras.nbytes)
        try:
            content = await PULLS.run(extras.file)
            yield pb.PullResponse(header=extras_header(model, extras, len(content))).SerializeToString()
            frames = pack([[Piece(torch.frombuffer(bytearray(content), dtype=torch.uint8), torch.uint8)]])
            while (frame := await PULLS.run(next, frames, None)) is not None:
                yield frame
        finally:
            self.readers.budget.give_back(extras.nbytes)

    async def _take_push(
        self, stream: BulkStream[pb.PushRequest], *, pulls: bool = False
    ) -> tuple[Model, pb.PushHeader, Receipt, SharedAnswer | None]:
        self._take_new_work()
        header = (await stream.header()).header
        if pulls:
            wire_of(header.pull.dtype)  # what cannot be answered is refused before it is stepped
        model = self.catalog.get(header.model, header.identity.model_uid)
        region = self.memory.of(header.identity, header.region)
        answer = self._shared_answer(model, header.pull, header.identity) if pulls else None
        intake = Intake(model, header, region, answer)
        try:
            await intake.admit()
            try:
                commit = await stream.feed(intake.place) if intake.has_body else None
            except InvalidRequest as error:
                intake.fault(error)
                raise
            return model, header, await intake.commit(commit), answer
        finally:
            intake.release()

    def _shared_answer(
        self, model: Model, options: pb.PullOptions, identity: Identity
    ) -> SharedAnswer | None:
        region = self.memory.of(identity, options.region)
        return (
            None if region is None else SharedAnswer(model, region, identity.timeline, have_version(options))
        )

    async def _refuse(self, context: Context, refusal: PushstepError) -> None:
        """End a call with an error."""
        log.debug("refused: %s", refusal.message)
        async with contextlib.AsyncExitStack() as around:
            if isinstance(refusal, Quarantined):
                await around.enter_async_context(self.tarpit.refusing(refusal, context.peer()))
            await abort(
                context, refusal.grpc_status, brief(refusal.message), ((TRAILER, to_trailer(refusal)),)
            )

    def _take_new_work(self) -> None:
        self.catalog.require_loaded()
        if self.draining:
            raise Draining()
