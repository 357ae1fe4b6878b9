"""Methods as gRPC is given them: messages parsed, checked and written, and every error answered as the catalogue says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from pushstep.proto.errors import PushstepError, StreamStalled
from pushstep.proto.status import named, untrace

from .readers import Context, Reader, Readers
from .received import received

log = logging.getLogger("pushstep.grpc")
# Within which a call's one message has to be there: 4 MiB at 70 KB/s.
REQUEST_S: Final = 60.0
Refuse = Callable[[Context, PushstepError], Awaitable[None]]


def serialize(message: Any) -> bytes:
    """A message as its bytes."""
    return bytes(message.SerializeToString())


def answered(
    method: Callable[[Any], Awaitable[Any]], kind: type[Message]
) -> Callable[[AsyncIterator[bytes]], Awaitable[Any]]:
    """A method of one message: as bytes, or gRPC would answer those that are none with an error of its own."""

    async def call(messages: AsyncIterator[bytes]) -> Any:
        return await method(await received(kind, await only(messages)))

    return call


def streamed(
    method: Callable[[Any], AsyncGenerator[bytes, None]], kind: type[Message]
) -> Callable[[AsyncIterator[bytes]], AsyncGenerator[bytes, None]]:
    """The same of a method that answers with a stream."""

    async def call(messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        async with aclosing(method(await received(kind, await only(messages)))) as answers:
            async for answer in answers:
                yield answer

    return call


async def only(messages: AsyncIterator[bytes]) -> bytes:
    """The one message of a call, which gRPC would wait for as long as it likes. StreamStalled."""
    try:
        async with asyncio.timeout(REQUEST_S):
            return await anext(messages, b"")
    except TimeoutError as error:
        raise StreamStalled(seconds=REQUEST_S) from error


def answering(
    method: Callable[[Any], Awaitable[Any]], refuse: Refuse, readers: Readers
) -> Callable[[Any, Context], Awaitable[bytes | None]]:
    """A unary answer, or the catalogue's error."""

    async def call(request: Any, context: Context) -> bytes | None:
        try:
            answer = serialize(await method(request))
            await Reader(readers, context).last(answer)
            return answer
        except Exception as error:  # noqa: BLE001 - the one place where errors become statuses
            refusal = named(error, log)
        await refuse(context, refusal)
        return None

    return call


def streaming(
    method: Callable[[Any], AsyncGenerator[bytes, None]], refuse: Refuse, readers: Readers
) -> Callable[[Any, Context], Awaitable[None]]:
    """A stream of answers, or the catalogue's error."""

    async def call(request: Any, context: Context) -> None:
        try:
            reader = Reader(readers, context)
            # closed here and now, with what they hold, however the reader ends
            async with aclosing(method(request)) as messages:
                async for message in messages:
                    await reader.take(message)
            await reader.last()
            return
        except Exception as error:  # noqa: BLE001 - the one place where errors become statuses
            refusal = named(error, log)
        await refuse(context, refusal)

    return call


async def abort(
    context: Context, code: grpc.StatusCode, details: str, trailer: tuple[tuple[str, bytes], ...]
) -> None:
    """`context.abort`, without what it leaves: the call keeps the exception, and that, by its traceback, the call."""
    try:
        await context.abort(code, details, trailer)
    except grpc.aio.AbortError as aborted:
        task = asyncio.current_task()
        if task is not None:
            task.add_done_callback(partial(_forget, aborted))
        raise
    except grpc.aio.InternalError:
        return  # its caller has gone


def _forget(aborted: grpc.aio.AbortError, _: asyncio.Task[Any]) -> None:
    untrace(aborted)
