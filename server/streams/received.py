"""Parses a request's message and checks its limits; off the event loop if the message is large.

A message that is refused here has changed nothing. A large message consists mostly of many small parts, and each takes
Python a microsecond or more.
"""

from __future__ import annotations

from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from pushstep.proto.errors import MalformedFrame, MessageTooLarge
from pushstep.proto.wire import limits
from pushstep.proto.wire.frames import MAX_MESSAGE_BYTES

from ..process.threads import REQUESTS

M = TypeVar("M", bound=Message)
# The smallest part of a message has two bytes, and its check takes up to 2 us: 30 ms at most for so many bytes.
INLINE_MESSAGE_BYTES: Final = 32 << 10


async def received(kind: type[M], message: bytes) -> M:
    """The message, parsed and checked.

    Raises MessageTooLarge, MalformedFrame, NumberOutOfRange, TooLong or InvalidText.
    """
    if len(message) > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(got=len(message), limit=MAX_MESSAGE_BYTES)
    if len(message) <= INLINE_MESSAGE_BYTES:
        return parse(kind, message)
    return await REQUESTS.run(parse, kind, message)


def parse(kind: type[M], message: bytes) -> M:
    """The same, in the calling thread."""
    try:
        request = kind.FromString(message)
    except DecodeError as error:
        raise MalformedFrame(problem=f"not a {kind.__name__}") from error
    request.DiscardUnknownFields()  # unknown fields have no limit, and would be kept with the rest
    limits.check(request)
    return request
