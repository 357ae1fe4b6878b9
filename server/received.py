"""A request's message as it is taken in: parsed and checked against its limits, and off the event loop if it is large.

What is refused here has touched nothing. A large message is mostly many small parts, each of which takes Python a
microsecond or more.
"""

from __future__ import annotations

from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from pushstep.proto import limits
from pushstep.proto.errors import MalformedFrame, MessageTooLarge
from pushstep.proto.frames import MAX_MESSAGE_BYTES

from .threads import REQUESTS

M = TypeVar("M", bound=Message)
# The smallest part of a message takes two bytes, and its check up to 2 us: 30 ms at most.
INLINE_MESSAGE_BYTES: Final = 32 << 10


async def received(kind: type[M], message: bytes, payload_bytes: int = 0) -> M:
    """The message's fields. MessageTooLarge, MalformedFrame, NumberOutOfRange, TooLong or InvalidText.

    `payload_bytes`: how much of it takes no time to parse.
    """
    if len(message) > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(got=len(message), limit=MAX_MESSAGE_BYTES)
    if len(message) - payload_bytes <= INLINE_MESSAGE_BYTES:
        return parse(kind, message)
    return await REQUESTS.run(parse, kind, message)


def parse(kind: type[M], message: bytes) -> M:
    """The same, here and now."""
    try:
        request = kind.FromString(message)
    except DecodeError as error:
        raise MalformedFrame(problem=f"not a {kind.__name__}") from error
    request.DiscardUnknownFields()  # what nobody knows has no limit, and would be kept with the rest
    limits.check(request)
    return request
