"""TakeSteps: the small pushes of one worker over one call, which stays open between them.

To begin and to end a call of gRPC costs the event loop more than a small push does: two tasks and five batches of gRPC's
core, each with a wake-up of the loop. A push over an open call costs two batches (172 us of both ends' CPU time for 40 KB
each way, where a call for each takes 340 to 470). A call that waits for its next push is ended, without an error, after
IDLE_S and when the server stops. So half a message is kept no longer than the one message of any other call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import Any, Final

from pushstep.proto import training_pb2 as pb
from pushstep.proto.wire.frames import IDLE_S

from ..arenas.publisher import Published
from ..models.catalog import Catalog
from ..process.request_log import about
from ..requests.pull import published_messages, ready_messages
from ..requests.push import PushHandler
from ..streams.bulk import OneMessage
from ..traces.request_spans import Traces

LOOK_S: Final = IDLE_S / 8
_NOTHING: Final = nullcontext()


class StepCalls:
    """Answers the calls of TakeSteps, and ends those that wait for too long. On the event loop only."""

    def __init__(self, catalog: Catalog, pushes: PushHandler, stall_s: float, traces: Traces | None) -> None:
        self._catalog = catalog
        self._stall_s = stall_s
        self._pushes = pushes
        self._traces = traces
        # the calls that wait for their next push, and since when
        self._idle: dict[asyncio.Task[Any], float] = {}
        self._ended: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def take(self, messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """The answers to the pushes of one call."""
        while (message := await self._next(messages)) is not None:
            about()  # all pushes of a call run in one context
            stream = OneMessage(message, pb.PushRequest, self._catalog.staging, messages, self._stall_s)
            published, header = await self._answer(stream)
            if published is None:
                yield pb.PullResponse(header=header).SerializeToString()
            elif ready := await ready_messages(published, header):
                for message in ready:
                    yield message
            else:
                async with aclosing(published_messages(published, header)) as answers:
                    async for answer in answers:
                        yield answer
            if self._catalog.draining:
                return

    async def _answer(self, stream: OneMessage[pb.PushRequest]) -> tuple[Published | None, pb.PullHeader]:
        """What a push is answered with: a version if it asks for one, and a header with its receipt."""
        with stream:  # whose header may have come in parts
            asked = (await stream.header()).header
            pulls = asked.HasField("pull")
            with self._span("exchange" if pulls else "push", asked.traceparent):
                if pulls:
                    return await self._pushes.exchange(stream)
                return None, pb.PullHeader(receipt=(await self._pushes.push(stream)).receipt)

    def _span(self, name: str, traceparent: str) -> AbstractContextManager[None]:
        return _NOTHING if self._traces is None else self._traces.span(name, traceparent)

    async def _next(self, messages: AsyncIterator[bytes]) -> bytes | None:
        """The next push; None when the caller or the server has ended the call."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        if task is None:
            return None
        self._idle[task] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(LOOK_S, self._look)
        try:
            return await anext(messages, None)
        except asyncio.CancelledError:
            if task in self._ended and not task.uncancel():
                return None
            raise
        finally:
            del self._idle[task]
            self._ended.discard(task)

    def _look(self) -> None:
        """End the calls that have waited for too long."""
        self._timer = None
        self._end(asyncio.get_running_loop().time() - IDLE_S)
        if self._idle:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def end(self) -> None:
        """End the calls that wait for a push: the server stops. The others end with their answer."""
        self._end(asyncio.get_running_loop().time())

    def _end(self, since_s: float) -> None:
        for task, idle_s in self._idle.items():
            if idle_s <= since_s and task not in self._ended:
                self._ended.add(task)
                task.cancel()
