"""Methods as gRPC is given them: messages parsed and written, and every error answered as the catalogue says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from pushstep.proto.errors import MalformedFrame

Context = grpc.aio.ServicerContext[Any, Any]
Refuse = Callable[[Context, Exception], Awaitable[None]]
T = TypeVar("T")


def serialize(message: Any) -> bytes:
    """A message as its bytes."""
    return bytes(message.SerializeToString())


def parsed(method: Callable[[Any], T], kind: Any) -> Callable[[bytes], T]:
    """A method that takes messages as bytes: gRPC would answer those that are none with an error of its own."""

    def call(message: bytes) -> T:
        try:
            request = kind.FromString(message)
        except DecodeError as error:
            raise MalformedFrame(problem=f"not a {kind.__name__}") from error
        return method(request)

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
    method: Callable[[Any], AsyncIterator[bytes]], refuse: Refuse
) -> Callable[[Any, Context], AsyncIterator[bytes]]:
    """A stream of answers, or the catalogue's error."""

    async def call(request: Any, context: Context) -> AsyncIterator[bytes]:
        try:
            async for message in method(request):
                yield message
        except Exception as error:  # noqa: BLE001 - the one place where errors become statuses
            await refuse(context, error)

    return call
