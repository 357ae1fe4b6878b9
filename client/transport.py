"""The wire as the client sees it: one channel, unary calls, and bulk streams in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import quote

import grpc
import torch
from grpc.experimental import ChannelOptions
from safetensors.torch import load
from torch import Tensor

from pushstep.proto import dtypes
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import MalformedFrame, MessageTooLarge
from pushstep.proto.frames import (
    CHUNK_BYTES,
    TRANSPORT_LIMIT_BYTES,
    Assembly,
    BodyDigest,
    Chunk,
    Source,
    pack,
    unpack,
)
from pushstep.proto.layout import ID_BYTES, Layout, Slot, check_body
from pushstep.proto.memory import BufferPool, MessageRing, keep_freed_blocks
from pushstep.proto.parts import WHOLE_BYTES, Parts, header_messages, parts_of
from pushstep.proto.region import SharedBody
from pushstep.proto.status import from_rpc_error
from pushstep.proto.types_pb2 import Segment

from .progress import Progress, Watchdog
from .shield import shield
from .waiting import Wait

SERVICE: Final = "/pushstep.v1.TrainingService/"
OPTIONS: Final = (
    ("grpc.max_receive_message_length", TRANSPORT_LIMIT_BYTES),
    ("grpc.max_send_message_length", TRANSPORT_LIMIT_BYTES),
    ("grpc.http2.max_frame_size", 4 << 20),
    ("grpc.http2.lookahead_bytes", 8 << 20),
    # gRPC's own retries stop at 256 KiB and know nothing of identities: ours are in retry.py
    ("grpc.enable_retries", 0),
    # answers of one stream are read by the thread that waits for them: 64 MiB in 28 ms instead of 34
    (ChannelOptions.SingleThreadedUnaryStream, 1),
    ("grpc.enable_http_proxy", 0),
    # a connection of its own: the server ends that of a quarantined worker, which must not be another session's
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 60_000),
    # a server that went away is asked for again this often; gRPC's own default goes up to 2 minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
# A push of up to here goes out as one message; the server copies and steps it without a thread, too.
SMALL_BYTES: Final = 64 << 10
# Memory that is kept for the bodies of answers.
KEPT_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Body:
    """What an upload or push carries: segments, and for each its pieces."""

    segments: Sequence[Segment]
    pieces: Sequence[Sequence[Source]]

    def single(self, messages: _Messages) -> bytes | None:
        """All messages of a small body as one; None when it is not small.

        gRPC sends a stream's messages from a thread of its own, which took a third of a small push's time.
        """
        small = sum(piece.nbytes for pieces in self.pieces for piece in pieces) <= SMALL_BYTES
        return messages.joined() if small else None


@dataclass(frozen=True, slots=True)
class Pulled:
    """A complete answer: its header, and the segments' bytes."""

    header: pb.PullHeader
    layout: Layout
    body: Assembly | SharedBody

    def dense(self) -> Iterator[tuple[Slot, str, Tensor]]:
        """(slot, state name or "", values in the slot's shape) of every dense segment."""
        for index, segment in enumerate(self.header.segments):
            if not segment.HasField("rows"):
                dtype = dtypes.to_torch(segment.dtype, "segment")
                for slot in self.layout.slots_of(segment):
                    start = (slot.start - segment.start) * dtype.itemsize
                    values = self.body.part(index, dtype, start, slot.stop - slot.start)
                    yield (
                        slot,
                        segment.state,
                        values if len(slot.shape) == 1 else values.view(slot.shape),
                    )

    def rows(self) -> Iterator[tuple[Slot, Tensor, Tensor]]:
        """(slot, ids, rows) of every row-sparse segment."""
        for index, segment in enumerate(self.header.segments):
            if segment.HasField("rows"):
                slot, count = self.layout.slots_of(segment)[0], int(segment.rows)
                ids = self.body.part(index, torch.int64, 0, count)
                rows = self.body.part(index, dtypes.to_torch(segment.dtype, "segment"), count * ID_BYTES)
                yield slot, ids, rows.view(count, *slot.shape[1:])


class Transport:
    """One channel to one server. `timeout_s` bounds each attempt: as a whole if it is one small message each way, and
    otherwise the time in which nothing of it moves.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        """Nothing is asked there yet."""
        self.address = address
        self.timeout_s = timeout_s
        self.wait = Wait(address)
        self.watchdog = Watchdog(timeout_s, self.wait.moved)
        # the body of the last answer serves for the next one
        self._buffers = BufferPool(KEPT_BYTES)
        keep_freed_blocks()
        self._channel = grpc.insecure_channel(_target(address), options=OPTIONS)

    def describe(self, timeout_s: float, *, wait_for_ready: bool) -> pb.DescribeResponse:
        """Describe."""
        answer: pb.DescribeResponse = self._ask(
            "Describe", pb.DescribeRequest(), pb.DescribeResponse, timeout_s, wait_for_ready=wait_for_ready
        )
        return answer

    def _call(
        self, method: str, request: bytes | Iterator[bytes], timeout_s: float | None = None, **options: Any
    ) -> Any:
        """A call under way, with its answers to iterate over. One that streams nothing needs no thread of gRPC's."""
        make: Any = self._channel.unary_stream if isinstance(request, bytes) else self._channel.stream_stream
        call = make(SERVICE + method, request_serializer=None, response_deserializer=None)
        return call(request, timeout=timeout_s, **options)

    def _ask(self, method: str, request: Any, answer: Any, timeout_s: float, **options: Any) -> Any:
        """The one answer to one message."""
        call = self._call(method, request.SerializeToString(), timeout_s, **options)
        return _only(breakable(call), answer)

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Join, in parts where either side's manifest is long."""
        if request.ByteSize() <= WHOLE_BYTES:
            try:
                answer: pb.JoinResponse = self._ask("Join", request, pb.JoinResponse, self.timeout_s)
                return answer
            except grpc.RpcError as error:
                if not isinstance(from_rpc_error(error), MessageTooLarge):
                    raise
        return self._join_in_parts(request)

    def _join_in_parts(self, request: pb.JoinRequest) -> pb.JoinResponse:
        parts = Parts("a join's answer")
        with self.watchdog.over(self.watchdog.begin()) as progress:
            asked = (pb.JoinPart(part=p).SerializeToString() for p in parts_of(request.SerializeToString()))
            for message in breakable(progress.of(self._call("JoinInParts", asked))):
                progress.moved()
                parts.add(pb.JoinPart.FromString(message).part)
        return pb.JoinResponse.FromString(parts.take())

    def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatResponse:
        """Heartbeat."""
        answer: pb.HeartbeatResponse = self._ask("Heartbeat", request, pb.HeartbeatResponse, self.timeout_s)
        return answer

    def leave(self, request: pb.LeaveRequest) -> pb.LeaveResponse:
        """Leave."""
        answer: pb.LeaveResponse = self._ask("Leave", request, pb.LeaveResponse, min(5.0, self.timeout_s))
        return answer

    def open_region(self, request: pb.OpenRegionRequest) -> pb.OpenRegionResponse:
        """OpenRegion."""
        answer: pb.OpenRegionResponse = self._ask(
            "OpenRegion", request, pb.OpenRegionResponse, self.timeout_s
        )
        return answer

    def push(self, header: pb.PushHeader, body: Body, commit: pb.PushCommit) -> pb.PushResponse:
        """Push."""
        messages = _Messages(pb.PushRequest(header=header), body.segments, body.pieces, lambda _: commit)
        single = body.single(messages)
        if single is None:
            sent: pb.PushResponse = self._stream_in("Push", messages, pb.PushResponse)
            return sent
        call = self._call("Push", single, self.timeout_s)
        answer: pb.PushResponse = messages.sent(lambda: _only(breakable(call), pb.PushResponse))
        return answer

    def _stream_in(self, method: str, messages: _Messages, answer: Any) -> Any:
        with self.watchdog.over(self.watchdog.begin()) as progress:
            call = progress.of(self._call(method, messages.watched(progress)))
            return messages.sent(lambda: _only(breakable(call), answer))

    def exchange(self, header: pb.PushHeader, body: Body, commit: pb.PushCommit, layout: Layout) -> Pulled:
        """Exchange."""
        messages = _Messages(pb.PushRequest(header=header), body.segments, body.pieces, lambda _: commit)
        return self._exchange(messages, body.single(messages), layout).result()

    def begin_exchange(
        self,
        header: pb.PushHeader,
        segments: Sequence[Segment],
        pieces: Iterable[Sequence[Source]],
        commit: Callable[[int], pb.PushCommit | None],
        layout: Layout,
    ) -> Exchange:
        """An Exchange under way. `pieces` and `commit` are asked for in another thread, and may wait there."""
        messages = _Messages(pb.PushRequest(header=header), segments, pieces, commit)
        return self._exchange(messages, None, layout)

    def _exchange(self, messages: _Messages, single: bytes | None, layout: Layout) -> Exchange:
        progress = self.watchdog.begin()
        request = messages.watched(progress) if single is None else single
        call = progress.of(self._call("Exchange", request))
        return Exchange(call, messages, partial(self._received, layout=layout), self.watchdog, progress)

    def upload(self, header: pb.UploadHeader, body: Body) -> pb.UploadResponse:
        """Upload."""
        messages = _Messages(pb.UploadRequest(header=header), body.segments, body.pieces, None)
        answer: pb.UploadResponse = self._stream_in("Upload", messages, pb.UploadResponse)
        return answer

    def pull(self, request: pb.PullRequest, layout: Layout | None) -> Pulled:
        """Pull; without a layout the answer brings its own."""
        return self._pulled("Pull", request, layout)

    def pull_rows(self, request: pb.PullRowsRequest, layout: Layout) -> Pulled:
        """PullRows."""
        return self._pulled("PullRows", request, layout)

    def pull_state(self, request: pb.PullStateRequest) -> Pulled:
        """PullState."""
        return self._pulled("PullState", request, None)

    def pull_extras(self, request: pb.PullExtrasRequest) -> tuple[int, dict[str, Tensor]]:
        """PullExtras: the version, and the tensors by name."""
        with self.watchdog.over(self.watchdog.begin()) as progress:
            messages = breakable(progress.of(self._call("PullExtras", request.SerializeToString())))
            header, chunk = _first(messages, progress.moved)
            body = Assembly([header.extras_bytes])
            _fill(body, chunk, messages, progress.moved)
        content = body.part(0, torch.uint8).numpy().tobytes()
        return int(header.extras_version), load(content) if content else {}

    def _pulled(self, method: str, request: Any, layout: Layout | None) -> Pulled:
        with self.watchdog.over(self.watchdog.begin()) as progress:
            call = progress.of(self._call(method, request.SerializeToString()))
            return self._received(call, progress, layout)

    def _received(self, call: Any, progress: Progress, layout: Layout | None) -> Pulled:
        return _assembled(breakable(call), layout, self._buffers, progress.moved)

    def close(self) -> None:
        """Close the channel."""
        self.watchdog.close()
        self._channel.close()


def breakable(call: Any) -> Iterator[bytes]:
    """A call's answers; while they are waited for, a signal may break the call."""
    shield.breaks(call.cancel)
    try:
        yield from call
    finally:
        shield.breaks(None)


def _only(messages: Iterator[bytes], kind: Any) -> Any:
    """The one message of an answer."""
    found = list(messages)
    if len(found) != 1:
        raise MalformedFrame(problem=f"the server's answer is {len(found)} messages, not one")
    return kind.FromString(found[0])


class Exchange:
    """An exchange under way, whose messages leave as they become ready."""

    def __init__(
        self,
        call: Any,
        messages: _Messages,
        received: Callable[[Any, Progress], Pulled],
        watchdog: Watchdog,
        progress: Progress,
    ) -> None:
        self._call = call
        self._messages = messages
        self._received = received
        self._watchdog = watchdog
        self._progress = progress

    def result(self) -> Pulled:
        """Wait for the answer."""
        with self._watchdog.over(self._progress) as progress:
            answer: Pulled = self._messages.sent(lambda: self._received(self._call, progress))
            return answer

    def when_over(self, then: Callable[[], None]) -> None:
        """Have `then` called when the call has ended, however it did; at once if it has."""
        if not self._call.add_callback(then):
            then()

    def cancel(self) -> None:
        """End the call; nothing if it has ended."""
        self._watchdog.end(self._progress)
        self._call.cancel()


class _Messages:
    """The messages of one outgoing stream. gRPC iterates them in a thread of its own, so faults are kept here.

    `commit` makes the last one, to which the body's digest is added; none when the stream has none or is given up.
    """

    def __init__(
        self,
        first: pb.PushRequest | pb.UploadRequest,
        segments: Sequence[Segment],
        pieces: Iterable[Sequence[Source]],
        commit: Callable[[int], pb.PushCommit | None] | None,
    ) -> None:
        self._first = first
        self._segments = segments
        self._pieces = pieces
        self._commit = commit
        self._fault: Exception | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self._made(lambda: CHUNK_BYTES)

    def watched(self, progress: Progress) -> Iterator[bytes]:
        """The messages, in sizes that the link carries; each says when it is asked for and when it is there."""
        messages = self._made(lambda: progress.chunk_bytes)
        while True:
            progress.asked()
            message = next(messages, None)
            progress.handed()
            if message is None:
                return
            yield message

    def _made(self, chunk_bytes: Callable[[], int]) -> Iterator[bytes]:
        try:
            yield from header_messages(self._first)
            digest = BodyDigest(self._segments)
            yield from pack(self._pieces, digest, take=MessageRing().take, chunk_bytes=chunk_bytes)
            commit = self._commit(digest.value) if self._commit is not None else None
            if commit is not None:
                commit.digest = digest.value
                yield pb.PushRequest(commit=commit).SerializeToString()
        except Exception as error:
            self._fault = error
            raise

    def joined(self) -> bytes | None:
        """The whole stream as one message, if it holds one chunk; None otherwise.

        Fields that follow each other are one message's, so the parts only have to be joined; payload last.
        """
        parts = list(self)
        if len(parts) != 3:
            return None
        header, chunk, commit = parts
        return b"".join((header, commit, chunk))

    def sent(self, call: Callable[[], Any]) -> Any:
        """Run the call; if making a message failed, raise that and not gRPC's word for it."""
        try:
            return call()
        except grpc.RpcError as error:
            if self._fault is not None:
                raise self._fault from error
            raise


def _assembled(
    messages: Iterator[bytes], layout: Layout | None, buffers: BufferPool, moved: Callable[[], None]
) -> Pulled:
    header, chunk = _first(messages, moved)
    if layout is None or (header.manifest.parameters and layout.manifest_hash != header.manifest_hash):
        layout = Layout(header.manifest)
    elif layout.manifest_hash != header.manifest_hash:
        raise MalformedFrame(problem="the server's answer is of another manifest")
    # the body's size is the server's to say; what it says has to fit this model
    body = Assembly(check_body(layout, header.segments, 1 << 62), take=buffers.take)
    _fill(body, chunk, messages, moved)
    return Pulled(header, layout, body)


def _first(messages: Iterator[bytes], moved: Callable[[], None]) -> tuple[pb.PullHeader, Chunk | None]:
    """The header with which an answer begins, in parts if it is long, and the chunk that may come with it."""
    parts = Parts("the header of an answer")
    fields, chunk = unpack(next(messages, b""), pb.PullResponse)
    moved()
    while fields is not None and fields.header_part and not fields.HasField("header"):
        parts.add(fields.header_part)
        fields, chunk = unpack(next(messages, b""), pb.PullResponse)
        moved()
    if fields is None or not fields.HasField("header"):
        raise MalformedFrame(problem="the server's answer does not begin with a header")
    return pb.PullHeader.FromString(parts.take()) if parts.size_bytes else fields.header, chunk


def _fill(body: Assembly, chunk: Chunk | None, messages: Iterator[bytes], moved: Callable[[], None]) -> None:
    if chunk is not None:
        body.place(chunk)
    for message in messages:
        moved()
        _, chunk = unpack(message, pb.PullResponse)
        if chunk is not None:
            body.place(chunk)
    body.finish()


def _target(address: str) -> str:
    """An address as gRPC has it: it takes a Unix socket's path for part of a URI, with "%41" for a letter."""
    scheme, colon, path = address.partition(":")
    return f"unix:{quote(path)}" if colon and scheme == "unix" else address
