"""Reading a client's bulk stream: a header first, then chunks, then the end; and never waiting for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

from pushstep.proto.errors import MalformedFrame, StreamStalled
from pushstep.proto.frames import BulkMessage, Chunk, unpack
from pushstep.proto.training_pb2 import PushRequest

M = TypeVar("M", bound=BulkMessage)
# How long a stream without a commit message is held, to see whether its end was a cancellation.
CANCEL_S = 0.02


class BulkStream(Generic[M]):
    """One stream of messages of type `kind`, as raw bytes from gRPC."""

    def __init__(self, messages: AsyncIterator[bytes], kind: type[M], stall_s: float) -> None:
        self._messages = messages
        self._kind = kind
        self._stall_s = stall_s
        self._first_chunk: Chunk | None = None

    async def header(self) -> M:
        """The first message, which must carry the header. It may carry a chunk too."""
        fields, self._first_chunk = unpack(await self._next() or b"", self._kind)
        if fields is None or not fields.HasField("header"):
            raise MalformedFrame(problem="the first message of a stream must carry the header")
        return fields

    async def feed(self, place: Callable[[Chunk], Awaitable[None]]) -> M | None:
        """Hand every chunk to `place`; the last message's fields if it had any beside a chunk."""
        last: M | None = None
        if self._first_chunk is not None:
            await place(self._first_chunk)
            self._first_chunk = None
        while (message := await self._next()) is not None:
            if last is not None:
                raise MalformedFrame(problem="a message after the commit")
            fields, chunk = unpack(message, self._kind)
            if fields is not None and fields.HasField("header"):
                raise MalformedFrame(problem="a second header")
            if chunk is not None:
                await place(chunk)
            if isinstance(fields, PushRequest) and fields.HasField("commit"):
                last = fields
            elif chunk is None or not chunk.payload:
                # would be progress without bytes: a stream kept alive, and its staging held, for nothing
                raise MalformedFrame(problem="a message with neither a chunk nor a commit")
        if last is None:
            # gRPC ends the stream of a client that cancelled as if it had closed it, and cancels the call a moment later
            await asyncio.sleep(CANCEL_S)
        return last

    async def _next(self) -> bytes | None:
        try:
            async with asyncio.timeout(self._stall_s):
                return await anext(self._messages, None)
        except TimeoutError as error:
            raise StreamStalled(seconds=self._stall_s) from error
