"""Reads a client's bulk stream: a header, then chunks, then the commit.

One message may carry all three, and a long header comes in several messages. A push counts only with its commit: gRPC
reports a cancelled stream as a closed one, so the end of a stream proves nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Generic, Self, TypeVar

from pushstep.proto.errors import MalformedFrame
from pushstep.proto.training_pb2 import PushCommit, PushRequest, UploadRequest
from pushstep.proto.wire.frames import Chunk, chunk_of, chunk_of_fields, split

from ..access.caller import require_named
from ..staging.budget import Budget
from .counted_parts import CountedParts
from .received import INLINE_MESSAGE_BYTES, received
from .timed_messages import TimedMessages

M = TypeVar("M", bound=PushRequest | UploadRequest)


class _Nothing(AsyncIterator[bytes]):
    """No message."""

    async def __anext__(self) -> bytes:
        raise StopAsyncIteration


_NOTHING: Final = _Nothing()
# Copies a chunk: at once (None), or in a thread (a future). The next message is read while the thread copies.
Place = Callable[[Chunk], "asyncio.Future[None] | None"]


class BulkStream(Generic[M]):
    """One stream of messages of type `kind`, as raw bytes from gRPC."""

    def __init__(self, messages: AsyncIterator[bytes], kind: type[M], stall_s: float, budget: Budget) -> None:
        """A long header counts in `budget` until the end of the stream's `with` block."""
        self._messages = TimedMessages(messages, stall_s)
        self._kind = kind
        self._budget = budget
        self._parts: CountedParts | None = None
        self._first: tuple[M, Chunk | None] | None = None
        self._commit: PushCommit | None = None
        self._moving: asyncio.Future[None] | None = None

    async def header(self) -> M:
        """The message with the complete header. It may carry a chunk and the commit too. MalformedFrame.

        PermissionDenied if its model, or its worker, is not the caller's.
        """
        if self._first is not None:
            return self._first[0]
        self._messages.begin_window()
        fields, chunk = await self._fields(await self._next() or b"")
        while fields is not None and fields.header_part and not fields.HasField("header"):
            self._parts = self._parts or CountedParts("a header", self._budget)
            self._parts.add(fields.header_part)
            fields, chunk = await self._fields(await self._next() or b"")
        if fields is None or not fields.HasField("header"):
            raise MalformedFrame(problem="the first message of a stream must carry the header")
        if self._parts is not None:
            await self._complete(fields, self._parts)
        require_named(fields.header)
        self._first = fields, chunk
        return fields

    async def _complete(self, fields: M, parts: CountedParts) -> None:
        header: Any = fields.header
        header.CopyFrom(await parts.parsed(type(header), header))
        self._messages.begin_window()

    def __enter__(self) -> Self:
        """The end of the block gives back the budget bytes of a long header."""
        return self

    def __exit__(self, *_: object) -> None:
        if self._parts is not None:
            self._parts.release()

    async def feed(self, place: Place) -> PushCommit | None:
        """Hand every chunk to `place`, one after the other, and return the commit.

        None if the stream ends without a commit: the push then does not count. MalformedFrame for a second header, and
        for a message with neither a chunk nor a commit.
        """
        if self._first is None:
            raise MalformedFrame(problem="no header")
        self._messages.begin_window()  # the client did not cause the wait since the header
        try:
            await self._take(*self._first, place)
            # nothing after the commit is read, not even the end: that would cost one more pass through gRPC
            while self._commit is None and (message := await self._next()) is not None:
                fields, chunk = await self._fields(message)
                if fields is not None and (fields.HasField("header") or fields.header_part):
                    raise MalformedFrame(problem="a second header")
                if not await self._take(fields, chunk, place):
                    # such messages bring no bytes, and would keep the stream alive and its staging held
                    raise MalformedFrame(problem="a message with neither a chunk nor a commit")
            await self._moved()
        finally:
            if self._moving is not None:  # the stream broke off: the result of the last copy does not matter
                self._moving.add_done_callback(lambda moved: moved.cancelled() or moved.exception())
        return self._commit

    async def _take(self, fields: M | None, chunk: Chunk | None, place: Place) -> bool:
        """Take in a message's chunk and commit. False if it brings no bytes and no commit."""
        if chunk is not None:
            await self._moved()
            self._moving = place(chunk)
        if isinstance(fields, PushRequest) and fields.HasField("commit"):
            self._commit = fields.commit
            return True
        return chunk is not None and len(chunk.payload) > 0

    async def _fields(self, message: bytes) -> tuple[M | None, Chunk | None]:
        """A message as (fields, chunk). Either may be None."""
        chunk = chunk_of(message)
        if chunk is not None:
            return None, chunk
        rest, payload = split(message)
        fields = await received(self._kind, rest)
        if len(rest) > INLINE_MESSAGE_BYTES:
            self._messages.begin_window()  # parsing may have waited for a thread, which the client did not cause
        return fields, chunk_of_fields(fields, payload)

    async def _moved(self) -> None:
        if self._moving is not None:
            await self._moving
            self._moving = None

    async def _next(self) -> bytes | None:
        return await self._messages.next()


class OneMessage(BulkStream[M]):
    """A stream whose first message is here already. Without `rest` it is the only one, and nothing waits."""

    def __init__(
        self,
        message: bytes,
        kind: type[M],
        budget: Budget,
        rest: AsyncIterator[bytes] | None = None,
        stall_s: float = 0.0,
    ) -> None:
        super().__init__(_NOTHING if rest is None else rest, kind, stall_s, budget)
        self._message: bytes | None = message
        self._is_only = rest is None

    async def _next(self) -> bytes | None:
        message, self._message = self._message, None
        return message if message is not None or self._is_only else await super()._next()
