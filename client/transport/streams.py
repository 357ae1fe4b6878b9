"""The messages of bulk calls: bodies that go out, answers that come in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
import torch
from torch import Tensor

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import MalformedFrame
from pushstep.proto.shared_memory.slots import SharedBody
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.bodies import check_body
from pushstep.proto.wire.buffers import BufferPool, MessageRing
from pushstep.proto.wire.frames import (
    CHUNK_BYTES,
    Assembly,
    BodyDigest,
    Chunk,
    Source,
    pack,
    unpack,
)
from pushstep.proto.wire.layout import ID_BYTES, Layout, Slot
from pushstep.proto.wire.parts import Parts, header_messages

from .progress import Progress, Watchdog
from .shield import shield

# A push of up to this size goes over the open call of TakeSteps, in one message: what the server's window for a stream holds,
# and what its event loop steps without a thread. An exchange of 64,000 float32 takes 2.0 ms so, and 7.5 by a call of its own.
SMALL_BYTES: Final = 512 << 10


@dataclass(frozen=True, slots=True)
class Body:
    """What an upload or push carries: segments, and the pieces of each."""

    segments: Sequence[Segment]
    pieces: Sequence[Sequence[Source]]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return sum(piece.nbytes for pieces in self.pieces for piece in pieces)


@dataclass(frozen=True, slots=True)
class Pulled:
    """A complete answer: its header, its layout and the segments' bytes."""

    header: pb.PullHeader
    layout: Layout
    body: Assembly | SharedBody

    def dense(self) -> list[tuple[Slot, str, Tensor]]:
        """(slot, state name or "", values in the slot's shape) of every slot in a dense segment."""
        return [
            (slot, state, part)
            for slots, state, values in self._dense()
            for slot, part in zip(slots, self.parts(slots, values), strict=True)
        ]

    def stretches(self) -> Iterator[tuple[list[Slot], Tensor]]:
        """(slots, their values one behind the other) of every dense segment of parameters."""
        return ((slots, values) for slots, _, values in self._dense())

    def pieces(self) -> Iterator[tuple[Slot, int, Tensor]]:
        """(slot, first row, rows) of what came of parameters that lie in several ranks."""
        return iter(())

    @staticmethod
    def parts(slots: Sequence[Slot], values: Tensor) -> list[Tensor]:
        """Each slot's values, in its shape."""
        parts = values.split_with_sizes([slot.stop - slot.start for slot in slots])
        return [
            part if len(slot.shape) == 1 else part.view(slot.shape)
            for slot, part in zip(slots, parts, strict=True)
        ]

    def _dense(self) -> Iterator[tuple[list[Slot], str, Tensor]]:
        for index, segment in enumerate(self.header.segments):
            if not segment.HasField("rows"):
                dtype = dtypes.to_torch(segment.dtype, "segment")
                yield self.layout.slots_of(segment), segment.state, self.body.part(index, dtype)

    def rows(self) -> Iterator[tuple[Slot, Tensor, Tensor]]:
        """(slot, ids, rows) of every row-sparse segment."""
        for index, segment in enumerate(self.header.segments):
            if segment.HasField("rows"):
                slot, count = self.layout.slots_of(segment)[0], int(segment.rows)
                ids = self.body.part(index, torch.int64, 0, count)
                rows = self.body.part(index, dtypes.to_torch(segment.dtype, "segment"), count * ID_BYTES)
                yield slot, ids, rows.view(count, *slot.shape[1:])


def breakable(call: Any) -> Iterator[bytes]:
    """The answers of a call. While the caller waits for them, a signal may cancel the call."""
    shield.breaks(call.cancel)
    try:
        yield from call
    finally:
        shield.breaks(None)


def only(messages: Iterator[bytes], kind: Any) -> Any:
    """The single message of an answer, parsed. MalformedFrame if there are more or none."""
    found = list(messages)
    if len(found) != 1:
        raise MalformedFrame(problem=f"the server's answer is {len(found)} messages, not one")
    return kind.FromString(found[0])


class Exchange:
    """A bulk call under way. What it sends leaves as it becomes ready."""

    def __init__(
        self,
        call: Any,
        messages: Messages | None,
        received: Callable[[Iterator[bytes], Progress], Any],
        watchdog: Watchdog,
        progress: Progress,
    ) -> None:
        self._call = call
        self._messages = messages
        self._received = received
        self._watchdog = watchdog
        self._progress = progress

    def result(self) -> Any:
        """Wait for the answer and return it: what was pulled, or the message that answers."""
        with self._watchdog.over(self._progress) as progress:
            if self._messages is None:
                return self._received(breakable(self._call), progress)
            return self._messages.sent(lambda: self._received(breakable(self._call), progress))

    def when_over(self, then: Callable[[], None]) -> None:
        """Call `then` when the call has ended, for whatever reason; at once if it has ended."""
        if not self._call.add_callback(then):
            then()

    def cancel(self) -> None:
        """End the call; does nothing if it has ended."""
        self._watchdog.end(self._progress)
        self._call.cancel()


class Messages:
    """The messages of one outgoing stream. gRPC's own thread iterates them, so errors are kept here.

    `commit` makes the last message from the body's digest, which is also added to it. There is no such message if
    `commit` is None or returns None.
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
        # the server takes chunks that go on into the segments behind their own
        self.joined_chunks = False
        self._fault: Exception | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self._made(lambda: CHUNK_BYTES)

    def watched(self, progress: Progress) -> Iterator[bytes]:
        """The messages, in sizes that the link carries. `progress` notes when each is asked for and made."""
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
            yield from pack(
                self._pieces,
                digest,
                take=MessageRing().take,
                chunk_bytes=chunk_bytes,
                joined=self.joined_chunks,
            )
            commit = self._commit(digest.value) if self._commit is not None else None
            if commit is not None:
                commit.digest = digest.value
                yield pb.PushRequest(commit=commit).SerializeToString()
        except Exception as error:
            self._fault = error
            raise

    def joined(self) -> list[bytes]:
        """The whole stream in as few messages as it has chunks, or one.

        Concatenated protobuf messages parse as one, so the parts are only joined; a payload goes last.
        """
        header, *chunks, commit = self
        if len(chunks) < 2:
            return [b"".join((header, commit, *chunks))]
        return [header + chunks[0], *chunks[1:-1], commit + chunks[-1]]

    def sent(self, call: Callable[[], Any]) -> Any:
        """Run the call. If making a message failed, raise that error instead of gRPC's."""
        try:
            return call()
        except grpc.RpcError as error:
            if self._fault is not None:
                raise self._fault from error
            raise


class AnswerBodies:
    """Makes what answers are received into. What follows from their segments is kept while these stay the same."""

    def __init__(self, keep_bytes: int) -> None:
        """`keep_bytes`: how much memory of an answer's body is kept for the next answer's."""
        self._buffers = BufferPool(keep_bytes)
        self._last: tuple[Layout | None, Sequence[Segment], Sequence[int]] = None, (), ()

    def body(self, layout: Layout, segments: Sequence[Segment]) -> Assembly:
        """Memory for a body. MalformedFrame if the segments do not fit the model."""
        known, same, lengths = self._last
        if known is not layout or same != segments:
            # the server sets the body's size, without a limit here; the segments have to fit this model
            lengths = check_body(layout, segments, 1 << 62)
            self._last = layout, segments, lengths
        return Assembly(lengths, take=self._buffers.take)


def assembled(
    messages: Iterator[bytes],
    layout_of: Callable[[pb.PullHeader], Layout],
    bodies: AnswerBodies,
    moved: Callable[[], None],
    *,
    to_end: bool = True,
) -> Pulled:
    """A complete answer; calls `moved` when some of it has come. MalformedFrame if it does not fit.

    `to_end`: nothing comes behind it.
    """
    header, chunk = first(messages, moved)
    layout = layout_of(header)
    body = bodies.body(layout, header.segments)
    fill(body, chunk, messages, moved, to_end=to_end)
    return Pulled(header, layout, body)


def layout_of(header: pb.PullHeader, known: Layout | None) -> Layout:
    """The layout of an answer's segments: `known`, or that of its manifest. MalformedFrame if it is neither."""
    if known is None or (header.manifest.parameters and known.manifest_hash != header.manifest_hash):
        return Layout(header.manifest)
    if known.manifest_hash != header.manifest_hash:
        raise MalformedFrame(problem="the server's answer is of another manifest")
    return known


def first(messages: Iterator[bytes], moved: Callable[[], None]) -> tuple[pb.PullHeader, Chunk | None]:
    """The header that begins an answer, in parts if it is long, and the chunk that may follow it."""
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


def fill(
    body: Assembly,
    chunk: Chunk | None,
    messages: Iterator[bytes],
    moved: Callable[[], None],
    *,
    to_end: bool = True,
) -> None:
    """Place `chunk` and the chunks that follow into `body`, all or until it is complete, and finish it."""
    if chunk is not None:
        _place(body, chunk)
    while (to_end or not body.is_complete) and (message := next(messages, None)) is not None:
        moved()
        _, chunk = unpack(message, pb.PullResponse)
        if chunk is not None:
            _place(body, chunk)
    body.finish()


def _place(body: Assembly, chunk: Chunk) -> None:
    for part in body.parts_of(chunk):
        body.place(part)
