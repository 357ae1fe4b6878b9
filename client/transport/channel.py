"""The client's gRPC channel to one server: one method per call of the service."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import grpc
import torch
from grpc.experimental import ChannelOptions
from safetensors.torch import load
from torch import Tensor

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import MessageTooLarge
from pushstep.proto.errors.status import from_rpc_error
from pushstep.proto.types_pb2 import Receipt, Segment
from pushstep.proto.wire.buffers import keep_freed_blocks
from pushstep.proto.wire.frames import (
    TRANSPORT_LIMIT_BYTES,
    Assembly,
    Source,
)
from pushstep.proto.wire.layout import Layout
from pushstep.proto.wire.parts import WHOLE_BYTES, Parts, parts_of

from .address import target_of
from .progress import Progress, Watchdog
from .security import Security
from .spans import Spans
from .step_call import Step, StepCalls
from .streams import (
    AnswerBodies,
    Body,
    Exchange,
    Messages,
    Pulled,
    assembled,
    breakable,
    fill,
    first,
    layout_of,
    only,
)
from .waiting import Wait

SERVICE: Final = "/pushstep.v1.TrainingService/"
OPTIONS: Final = (
    ("grpc.max_receive_message_length", TRANSPORT_LIMIT_BYTES),
    ("grpc.max_send_message_length", TRANSPORT_LIMIT_BYTES),
    ("grpc.http2.max_frame_size", 4 << 20),
    ("grpc.http2.lookahead_bytes", 8 << 20),
    # gRPC's own retries stop at 256 KiB and do not know push identities; ours are in retry.py
    ("grpc.enable_retries", 0),
    # the waiting thread itself reads the answers of a stream: 64 MiB in 28 ms instead of 34
    (ChannelOptions.SingleThreadedUnaryStream, 1),
    ("grpc.enable_http_proxy", 0),
    # a connection per session: the server ends that of a quarantined worker, and must not hit another session
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 60_000),
    # intervals of reconnects to a server that went away; gRPC's default goes up to 2 minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
# Limit of the memory that is kept for the bodies of answers.
KEPT_BYTES: Final = 1 << 30


class Transport:
    """One channel to one server.

    `timeout_s` bounds each attempt: its whole time if it is one small message each way, otherwise the time in which
    nothing of it moves. Calls raise grpc.RpcError; a bulk call that stalls raises TransportFailure.
    """

    def __init__(
        self, address: str, timeout_s: float, security: Security | None = None, wait: Wait | None = None
    ) -> None:
        """Make the channel. No request is sent yet. `security` None: as the environment says.

        `wait`: of a session that has several channels.
        """
        self.address = address
        self.timeout_s = timeout_s
        # the server takes chunks that go on into the segments behind their own
        self.joined_chunks = False
        self.spans = Spans()
        self.wait = wait or Wait(address)
        self.watchdog = Watchdog(timeout_s, self.wait.moved)
        self._bodies = AnswerBodies(KEPT_BYTES)
        keep_freed_blocks()
        self.security = security or Security(address)
        self._channel = self._opened()
        self._steps = StepCalls(partial(self._call, "TakeSteps"), self.watchdog)

    def _opened(self) -> grpc.Channel:
        credentials = self.security.credentials()
        target = target_of(self.address)
        if credentials is None:
            return grpc.insecure_channel(target, options=OPTIONS)
        return grpc.secure_channel(target, credentials, options=OPTIONS)

    def _look_at_certificates(self) -> None:
        """Open the channel anew if the files of certificates have changed: gRPC keeps those that it was given."""
        self.wait.in_trouble = False
        if self.security.renew():
            self._steps.close()
            old, self._channel = self._channel, self._opened()
            old.close()

    def describe(self, timeout_s: float, *, wait_for_ready: bool) -> pb.DescribeResponse:
        """Describe."""
        answer: pb.DescribeResponse = self._ask(
            "Describe", pb.DescribeRequest(), pb.DescribeResponse, timeout_s, wait_for_ready=wait_for_ready
        )
        return answer

    def _call(
        self, method: str, request: bytes | Iterator[bytes], timeout_s: float | None = None, **options: Any
    ) -> Any:
        """Start a call, to be iterated for its answers. A request of bytes needs no thread of gRPC's."""
        if self.wait.in_trouble and self.security.is_tls:
            self._look_at_certificates()
        make: Any = self._channel.unary_stream if isinstance(request, bytes) else self._channel.stream_stream
        call = make(SERVICE + method, request_serializer=None, response_deserializer=None)
        return call(
            request, timeout=timeout_s, metadata=self.spans.metadata(self.security.metadata), **options
        )

    def _ask(self, method: str, request: Any, answer: Any, timeout_s: float, **options: Any) -> Any:
        """The single answer to a single message."""
        call = self._call(method, request.SerializeToString(), timeout_s, **options)
        return only(breakable(call), answer)

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """Join; in parts if the request or the answer has a long manifest."""
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

    def push(self, header: pb.PushHeader, body: Body, commit: pb.PushCommit) -> Receipt:
        """Push."""
        if self._steps.takes(body):
            stepped: pb.PullHeader = self._step(header, body, lambda _: commit, None).result()
            return stepped.receipt
        messages = self._messages(header, body, lambda _: commit)
        sent: pb.PushResponse = self._begun("Push", messages, None, _only(pb.PushResponse)).result()
        return sent.receipt

    def _step(
        self,
        header: pb.PushHeader,
        body: Body,
        commit: Callable[[int], pb.PushCommit],
        layout: Layout | None,
    ) -> Step:
        """Start one push of TakeSteps, which asks for parameters unless `layout` is None."""
        header.traceparent = self.spans.traceparent()  # metadata would be the whole call's
        messages = self._messages(header, body, commit)
        read = _header if layout is None else partial(self._received, layout=layout, to_end=False)
        return self._steps.begin(messages.joined, read)

    def exchange(self, header: pb.PushHeader, body: Body, commit: pb.PushCommit, layout: Layout) -> Pulled:
        """Exchange."""
        pulled: Pulled
        if self._steps.takes(body):
            pulled = self._step(header, body, lambda _: commit, layout).result()
            return pulled
        pulled = self._exchange(self._messages(header, body, lambda _: commit), None, layout).result()
        return pulled

    def _messages(
        self, header: pb.PushHeader, body: Body, commit: Callable[[int], pb.PushCommit]
    ) -> Messages:
        messages = Messages(pb.PushRequest(header=header), body.segments, body.pieces, commit)
        messages.joined_chunks = self.joined_chunks
        return messages

    def begin_part(
        self,
        header: pb.PushHeader,
        body: Body,
        commit: Callable[[int], pb.PushCommit],
        layout: Layout | None,
    ) -> Exchange | Step:
        """Start an Exchange, or a Push if `layout` is None. `commit` may be called, and block, in another thread."""
        if self._steps.takes(body):
            return self._step(header, body, commit, layout)
        messages = Messages(pb.PushRequest(header=header), body.segments, body.pieces, commit)
        # gRPC sends a stream's messages from a thread of its own, which takes a third of a small push's time
        joined = messages.joined() if self._steps.in_one(body) else ()
        single = joined[0] if len(joined) == 1 else None
        if layout is not None:
            return self._exchange(messages, single, layout)
        return self._begun("Push", messages, single, _only(pb.PushResponse))

    def begin_exchange(
        self,
        header: pb.PushHeader,
        segments: Sequence[Segment],
        pieces: Iterable[Sequence[Source]],
        commit: Callable[[int], pb.PushCommit | None],
        layout: Layout,
    ) -> Exchange:
        """Start an Exchange. Another thread iterates `pieces` and calls `commit`; both may block there."""
        messages = Messages(pb.PushRequest(header=header), segments, pieces, commit)
        return self._exchange(messages, None, layout)

    def _exchange(self, messages: Messages, single: bytes | None, layout: Layout) -> Exchange:
        return self._begun("Exchange", messages, single, partial(self._received, layout=layout))

    def _begun(
        self,
        method: str,
        messages: Messages | None,
        single: bytes | None,
        received: Callable[[Iterator[bytes], Progress], Any],
    ) -> Exchange:
        progress = self.watchdog.begin()
        request = single if messages is None or single is not None else messages.watched(progress)
        try:
            call = progress.of(self._call(method, request or b""))
        except BaseException:
            self.watchdog.end(progress)
            raise
        return Exchange(call, messages, received, self.watchdog, progress)

    def upload(self, header: pb.UploadHeader, body: Body, layout: Layout | None) -> pb.UploadResponse:
        """Upload. `layout`: that of the segments, if there are any."""
        answer: pb.UploadResponse = self.begin_upload(header, body).result()
        return answer

    def begin_upload(self, header: pb.UploadHeader, body: Body) -> Exchange:
        """Start an Upload."""
        messages = Messages(pb.UploadRequest(header=header), body.segments, body.pieces, None)
        return self._begun("Upload", messages, None, _only(pb.UploadResponse))

    def pull(self, request: pb.PullRequest, layout: Layout | None) -> Pulled:
        """Pull; if `layout` is None the answer brings its manifest."""
        return self._pulled("Pull", request, layout)

    def pull_rows(self, request: pb.PullRowsRequest, layout: Layout) -> Pulled:
        """PullRows."""
        return self._pulled("PullRows", request, layout)

    def begin_rows(self, request: pb.PullRowsRequest, layout: Layout) -> Callable[[], Pulled]:
        """Start a PullRows; a call of the result waits for the rows."""
        result: Callable[[], Pulled] = self.begin_pull("PullRows", request, layout).result
        return result

    def pull_state(self, request: pb.PullStateRequest, layout: Layout | None = None) -> Pulled:
        """PullState."""
        return self._pulled("PullState", request, layout)

    def pull_extras(self, request: pb.PullExtrasRequest) -> tuple[int, dict[str, Tensor]]:
        """PullExtras: the version, and the tensors by name."""
        with self.watchdog.over(self.watchdog.begin()) as progress:
            messages = breakable(progress.of(self._call("PullExtras", request.SerializeToString())))
            header, chunk = first(messages, progress.moved)
            body = Assembly([header.extras_bytes])
            fill(body, chunk, messages, progress.moved)
        content = body.part(0, torch.uint8).numpy().tobytes()
        return int(header.extras_version), load(content) if content else {}

    def _pulled(self, method: str, request: Any, layout: Layout | None) -> Pulled:
        pulled: Pulled = self.begin_pull(method, request, layout).result()
        return pulled

    def begin_pull(self, method: str, request: Any, layout: Layout | None) -> Exchange:
        """Start a Pull, PullRows or PullState."""
        received = partial(self._received, layout=layout)
        return self._begun(method, None, request.SerializeToString(), received)

    def _received(
        self, messages: Iterator[bytes], progress: Progress, layout: Layout | None, *, to_end: bool = True
    ) -> Pulled:
        found = partial(self._layout_of, known=layout)
        return assembled(messages, found, self._bodies, progress.moved, to_end=to_end)

    def _layout_of(self, header: pb.PullHeader, known: Layout | None) -> Layout:
        """The layout of an answer's segments."""
        return layout_of(header, known)

    def hurry(self, timeout_s: float) -> None:
        """Let each attempt from now on take that long at most."""
        self.timeout_s = min(self.timeout_s, timeout_s)

    def close(self) -> None:
        """Close the channel."""
        self.watchdog.close()
        self._steps.close()
        self._channel.close()


def _header(answer: Iterator[bytes], progress: Progress) -> pb.PullHeader:
    """Reads an answer of TakeSteps that brings no parameters: it has the receipt."""
    return first(answer, progress.moved)[0]


def _only(kind: Any) -> Callable[[Iterator[bytes], Progress], Any]:
    """Reads an answer that is a single message."""
    return lambda messages, _: only(messages, kind)
