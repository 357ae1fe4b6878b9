"""The workers' gRPC door: decodes a request, calls `server/requests/`, and encodes the answer or error.

Bulk methods take and give raw messages, which `proto/wire/frames.py` reads and writes. So tensor bytes never pass
through a protobuf object, and any protobuf client can still call these methods.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from importlib.metadata import version as installed_version
from typing import Any, Final

import grpc
import torch

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import NoSharedMemory, PushstepError, Quarantined
from pushstep.proto.errors.status import TRAILER, brief, to_trailer
from pushstep.proto.types_pb2 import GroupValues
from pushstep.proto.wire.frames import MAX_CHUNK_BYTES, Piece, pack
from pushstep.proto.wire.parts import WHOLE_BYTES, parts_of

from ..access.caller import may_use, require_named
from ..arenas.arenas_copy import ArenasCopy
from ..counters.server_counts import WORKERS_DOOR
from ..models.catalog import Catalog
from ..models.copies import COPIES_AT_ONCE, ModelCopies, copy_of
from ..models.model import Model
from ..process.inline import INLINE_PARTS
from ..process.request_log import TRACE_ID, RequestLog, about
from ..process.threads import PULLS, REQUESTS
from ..requests.join import join, leave
from ..requests.pull import (
    extras_header,
    header_frames,
    led,
    newest,
    published_header,
    published_messages,
    require_map,
    shared_answer,
    state_bodies,
    state_header,
)
from ..requests.pull_rows import Turns, pulled_rows
from ..requests.push import PushHandler
from ..requests.upload import Upload
from ..shared_memory.regions import SharedMemory
from ..streams.bulk import BulkStream
from ..streams.counted_parts import CountedParts
from ..streams.readers import Context, Readers
from ..streams.timed_messages import TimedMessages
from ..traces.request_spans import Traces, trace_of
from .methods import abort, answered, answering, only, streamed, streaming, traced, traceparent_of
from .steps import StepCalls
from .throttle import Throttle

log = RequestLog("pushstep.grpc")
SERVICE: Final = "pushstep.v1.TrainingService"
# read once: each connect asks for it, and later the package's files, or free descriptors, may be gone
VERSION: Final = installed_version("pushstep")


class GrpcDoor:
    """The methods of TrainingService."""

    def __init__(
        self,
        catalog: Catalog,
        memory: SharedMemory,
        stall_s: float,
        traces: Traces | None = None,
        pushes: PushHandler | None = None,
    ) -> None:
        """`pushes` None: those of a model that is here whole, or that this rank leads."""
        self.traces = traces
        self.catalog = catalog
        self.budget = catalog.staging
        self.memory = memory
        self.stall_s = stall_s
        self.counts = catalog.counts
        self.readers = Readers(catalog.reading, stall_s, self.counts)
        self.throttle = Throttle()
        self.pushes = pushes or PushHandler(catalog, memory)
        self.row_turns = Turns()
        self.steps = StepCalls(catalog, self.pushes, stall_s, traces)
        self._copies = ModelCopies(COPIES_AT_ONCE)
        self._part_copies = asyncio.Semaphore(COPIES_AT_ONCE)
        self.http_url = ""
        self.unix_path = ""

    def handler(self) -> grpc.GenericRpcHandler:
        """The handler to add to a grpc.aio server."""
        # To gRPC a request of one message is a stream, too: so `only` waits for the message, with a limit.
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
            "Push": call(traced("push", one(self.push), self.traces)),
            "Exchange": stream(traced("exchange", many(self.exchange), self.traces)),
            "TakeSteps": stream(many(self.take_steps)),
            "Pull": stream(traced("pull", many(streamed(self.pull, pb.PullRequest)), self.traces)),
            "PullRows": stream(many(self.pull_rows)),
            "PullState": stream(many(streamed(self.pull_state, pb.PullStateRequest))),
            "PullExtras": stream(many(streamed(self.pull_extras, pb.PullExtrasRequest))),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def describe(self, request: pb.DescribeRequest) -> pb.DescribeResponse:
        """Describe: the server's version, limits, models and addresses."""
        ranks = self.catalog.ranks
        return pb.DescribeResponse(
            rank=0 if ranks is None else ranks.rank,
            ranks=0 if ranks is None else ranks.world,
            server_version=VERSION,
            max_chunk_bytes=MAX_CHUNK_BYTES,
            joined_chunks=True,
            models=sorted(filter(may_use, self.catalog.models)),
            unix_path=self.unix_path,
            http_url=self.http_url,
            memory_path=self.memory.path,
        )

    def take_steps(self, messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """TakeSteps: pushes over one call."""
        return self.steps.take(messages)

    async def join(self, request: pb.JoinRequest, peer: str = "") -> pb.JoinResponse:
        """Join. `peer`: gRPC's text for the connection's peer."""
        self.catalog.require_open()
        return await join(self.catalog, request, peer, WHOLE_BYTES)

    async def join_in_parts(
        self, messages: AsyncIterator[bytes], peer: str = ""
    ) -> AsyncGenerator[bytes, None]:
        """JoinInParts: a join whose request and answer come in parts. `peer`: as for `join`."""
        self.catalog.require_open()
        parts = CountedParts("a join", self.budget)
        try:
            await parts.read(TimedMessages(messages, self.stall_s))
            request = await parts.parsed(pb.JoinRequest)
            require_named(request)
            response = await join(self.catalog, request, peer)
            del request
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
        """Heartbeat: renew the worker's lease."""
        about(request.model, request.identity.worker, request.identity.sequence)
        model = self.catalog.get(request.model, request.identity.model_uid)
        model.require_current(request.identity)
        model.executor.apply(model.coordinator.on_heartbeat(request.identity, model.clock()))
        known = 0 if model.shard is None else model.shard.map.version
        return pb.HeartbeatResponse(version=model.version, lease_s=model.sessions.lease_s, map_version=known)

    async def leave(self, request: pb.LeaveRequest) -> pb.LeaveResponse:
        """Leave: end the worker's epoch, and close its region."""
        answer = await leave(self.catalog, request)
        self.memory.close_stale()
        return answer

    async def open_region(self, request: pb.OpenRegionRequest) -> pb.OpenRegionResponse:
        """OpenRegion: share memory with a live session."""
        self.catalog.require_open()
        about(request.model, request.identity.worker, request.identity.sequence)
        model = self.catalog.get(request.model, request.identity.model_uid)
        model.require_current(request.identity)
        model.sessions.require(request.identity, model.clock())
        if model.shard is not None:
            raise NoSharedMemory(problem="the model lies in several ranks: frames carry its parts")
        return await self.memory.open(model, request)

    async def upload(self, messages: AsyncIterator[bytes]) -> pb.UploadResponse:
        """Upload: whole tensors."""
        self.catalog.require_open()
        with BulkStream(messages, pb.UploadRequest, self.stall_s, self.budget) as stream:
            upload = Upload(self.catalog, (await stream.header()).header)
            try:
                await upload.admit()
                await stream.feed(upload.place)
                return await upload.commit()
            finally:
                upload.release()

    async def push(self, messages: AsyncIterator[bytes]) -> pb.PushResponse:
        """Push: the receipt of one gradient."""
        return await self.pushes.push(self._stream(messages))

    async def exchange(self, messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Exchange: a push, answered with the parameters and the receipt."""
        published, answer = await self.pushes.exchange(self._stream(messages))
        async for message in published_messages(published, answer):
            yield message

    def _stream(self, messages: AsyncIterator[bytes]) -> BulkStream[pb.PushRequest]:
        return BulkStream(messages, pb.PushRequest, self.stall_s, self.budget)

    async def pull(self, request: pb.PullRequest) -> AsyncGenerator[bytes, None]:
        """Pull: the newest version of the parameters."""
        about(request.model, request.identity.worker, request.identity.sequence)
        model = self.catalog.get(request.model, request.identity.model_uid)
        groups = model.groups.messages()
        if request.HasField("identity"):
            model.require_current(request.identity)
            model.executor.apply(model.coordinator.on_heartbeat(request.identity, model.clock()))
        else:
            model.require_whole()
        if request.map_version:
            require_map(model, request.map_version)
        shared = None
        if model.shard is not None:
            published = await led(model, request.options, request.timeline)
        else:
            shared = shared_answer(model, self.memory, request.options, request.identity)
            published = await newest(model, request.options, request.timeline, shared)
        model.counts.pulls += 1
        if shared is not None:
            self.counts.shared_memory.sent_bytes += shared.nbytes
        answer = await published_header(model, published, request.manifest_hash)
        answer.groups.extend(groups)
        async for message in published_messages(published, answer):
            yield message

    async def pull_rows(self, messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """PullRows: rows of one parameter. The request's message is not parsed yet."""
        asked, budget = await only(messages), self.readers.budget
        async with aclosing(pulled_rows(self.catalog, budget, asked, self.row_turns)) as answers:
            async for answer in answers:
                yield answer

    async def pull_state(self, request: pb.PullStateRequest) -> AsyncGenerator[bytes, None]:
        """PullState: parameters and optimizer state, from a copy of the model."""
        about(request.model)
        model = self.catalog.get(request.model)
        values = model.groups.messages()
        leader = model.executor.leader
        if leader is not None:
            async with self._part_copies:
                leader.publish_state(model.version)  # both are queued in this turn of the event loop
                _, part = await model.copy()
                async for message in self._state_messages(model, part, values):
                    yield message
            return
        async with copy_of(self._copies, model, self.catalog.config.data) as (_, copy):
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
        """PullExtras: the buffers, as a safetensors file."""
        about(request.model)
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

    async def _refuse(self, context: Context, refusal: PushstepError) -> None:
        """End a call with an error. That of a quarantined worker is throttled."""
        if not TRACE_ID.get():
            TRACE_ID.set(trace_of(traceparent_of(context)))
        log.debug("refused: %s", refusal.message, extra={"code": refusal.code})
        self.counts.refused(WORKERS_DOOR, refusal.code)
        async with contextlib.AsyncExitStack() as around:
            if isinstance(refusal, Quarantined):
                await around.enter_async_context(self.throttle.refusing(refusal, context.peer()))
            await abort(
                context, refusal.grpc_status, brief(refusal.message), ((TRAILER, to_trailer(refusal)),)
            )
