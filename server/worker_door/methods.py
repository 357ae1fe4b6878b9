"""Makes gRPC handlers of methods: parses and writes messages, and answers every error by the catalogue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from pushstep.proto.errors import PushstepError, StreamStalled
from pushstep.proto.errors.status import named, untrace

from ..access.caller import require_named, was_cut
from ..process.request_log import RequestLog
from ..streams.readers import Context, Reader, Readers
from ..streams.received import received
from ..traces.request_spans import TRACEPARENT, Traces

log = RequestLog("pushstep.grpc")
# A call's one message must arrive within this time: 4 MiB at 70 KB/s.
REQUEST_S: Final = 60.0
Refuse = Callable[[Context, PushstepError], Awaitable[None]]


def serialize(message: Any) -> bytes:
    """The bytes of a message."""
    return bytes(message.SerializeToString())


def answered(
    method: Callable[[Any], Awaitable[Any]], kind: type[Message]
) -> Callable[[AsyncIterator[bytes]], Awaitable[Any]]:
    """A method of one message of type `kind`, as a method of raw bytes.

    If gRPC parsed the bytes, it would answer malformed ones with an error of its own.
    """

    async def call(messages: AsyncIterator[bytes]) -> Any:
        return await method(await asked(kind, messages))

    return call


def streamed(
    method: Callable[[Any], AsyncGenerator[bytes, None]], kind: type[Message]
) -> Callable[[AsyncIterator[bytes]], AsyncGenerator[bytes, None]]:
    """The same for a method that answers with a stream."""

    async def call(messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        async with aclosing(method(await asked(kind, messages))) as answers:
            async for answer in answers:
                yield answer

    return call


async def asked(kind: type[Message], messages: AsyncIterator[bytes]) -> Any:
    """The one message of a call, parsed. PermissionDenied if it names a model, or a worker, that is not the caller's."""
    request: Any = await received(kind, await only(messages))
    if "model" in kind.DESCRIPTOR.fields_by_name:
        require_named(request)
    return request


async def only(messages: AsyncIterator[bytes]) -> bytes:
    """The one message of a call. Raises StreamStalled after REQUEST_S; gRPC itself has no limit."""
    try:
        async with asyncio.timeout(REQUEST_S):
            return await anext(messages, b"")
    except TimeoutError as error:
        raise StreamStalled(seconds=REQUEST_S) from error


def answering(
    method: Callable[[Any], Awaitable[Any]], refuse: Refuse, readers: Readers
) -> Callable[[Any, Context], Awaitable[bytes | None]]:
    """A gRPC handler with a unary answer. Errors go to `refuse` as errors of the catalogue."""

    async def call(request: Any, context: Context) -> bytes | None:
        try:
            reader = Reader(readers, context)
            answer = serialize(await method(reader.counted(request)))
            await reader.last(answer)
            return answer
        except asyncio.CancelledError:
            cut = was_cut()
            if cut is None:
                raise
            refusal: PushstepError = cut
        except Exception as error:  # noqa: BLE001 - the one place where errors become statuses
            refusal = named(error, log)
        await refuse(context, refusal)
        return None

    return call


def streaming(
    method: Callable[[Any], AsyncGenerator[bytes, None]], refuse: Refuse, readers: Readers
) -> Callable[[Any, Context], Awaitable[None]]:
    """A gRPC handler with a stream of answers. Errors go to `refuse` as errors of the catalogue."""

    async def call(request: Any, context: Context) -> None:
        try:
            reader = Reader(readers, context)
            # close the generator at once, and release what it holds, however the reader ends
            async with aclosing(method(reader.counted(request))) as messages:
                async for message in messages:
                    await reader.take(message)
            await reader.last()
            return
        except asyncio.CancelledError:
            cut = was_cut()
            if cut is None:
                raise
            refusal: PushstepError = cut
        except Exception as error:  # noqa: BLE001 - the one place where errors become statuses
            refusal = named(error, log)
        await refuse(context, refusal)

    return call


def traced(
    name: str, call: Callable[[Any, Context], Awaitable[Any]], traces: Traces | None
) -> Callable[[Any, Context], Awaitable[Any]]:
    """A gRPC handler with a span around each call, whose parent is the caller's. The handler itself without `traces`."""
    if traces is None:
        return call

    async def with_span(request: Any, context: Context) -> Any:
        with traces.span(name, traceparent_of(context)):
            return await call(request, context)

    return with_span


def traceparent_of(context: Context) -> str:
    """What the caller says of its span, in its metadata; empty if nothing."""
    for key, value in context.invocation_metadata() or ():
        if key == TRACEPARENT and isinstance(value, str):
            return value
    return ""


async def abort(
    context: Context, code: grpc.StatusCode, details: str, trailer: tuple[tuple[str, bytes], ...]
) -> None:
    """`context.abort` without its leak: the call keeps the exception, whose traceback keeps the call."""
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
