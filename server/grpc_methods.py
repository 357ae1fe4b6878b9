"""Methods as gRPC is given them: messages parsed, checked and written, and every error answered as the catalogue says."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import Message

from .received import received

Context = grpc.aio.ServicerContext[Any, Any]
Refuse = Callable[[Context, Exception], Awaitable[None]]


def serialize(message: Any) -> bytes:
    """A message as its bytes."""
    return bytes(message.SerializeToString())


def answered(
    method: Callable[[Any], Awaitable[Any]], kind: type[Message]
) -> Callable[[bytes], Awaitable[Any]]:
    """A method that takes messages as bytes: gRPC would answer those that are none with an error of its own."""

    async def call(message: bytes) -> Any:
        return await method(await received(kind, message))

    return call


def streamed(
    method: Callable[[Any], AsyncGenerator[bytes, None]], kind: type[Message]
) -> Callable[[bytes], AsyncGenerator[bytes, None]]:
    """The same of a method that answers with a stream."""

    async def call(message: bytes) -> AsyncGenerator[bytes, None]:
        async with aclosing(method(await received(kind, message))) as answers:
            async for answer in answers:
                yield answer

    return call


def answering(
    method: Callable[[Any], Awaitable[Any]], refuse: Refuse
) -> Callable[[Any, Context], Awaitable[Any]]:
    """A unary answer, or the catalogue's error."""

    async def call(request: Any, context: Context) -> Any:
        try:
            return await method(request)
        except Exception as error:  # noqa: BLE001 - the one place where errors become statuses
            await refuse(context, error)

    return call


def streaming(
    method: Callable[[Any], AsyncGenerator[bytes, None]], refuse: Refuse
) -> Callable[[Any, Context], Awaitable[None]]:
    """A stream of answers, or the catalogue's error."""

    async def call(request: Any, context: Context) -> None:
        try:
            # closed here and now, with what they hold, however their reader ends
            async with aclosing(method(request)) as messages:
                async for message in messages:
                    await context.write(message)
        except grpc.aio.InternalError:
            return  # gRPC's word for a reader that has gone
        except Exception as error:  # noqa: BLE001 - the one place where errors become statuses
            await refuse(context, error)

    return call
