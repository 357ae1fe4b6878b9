"""Messages that are too long to be sent whole: cut into parts, and put together again.

A model of a million parameters has a manifest of tens of megabytes. Its parts are consecutive stretches of the
serialized message, which can be parsed only when all of them have come. A stream's header travels so as `header_part`,
a join as the parts of JoinInParts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ..errors import TooLong
from ..training_pb2 import PullResponse, PushRequest, UploadRequest

PART_BYTES: Final = 1 << 20
# A message of up to this size is sent whole.
WHOLE_BYTES: Final = 2 << 20
# Enough for a million parameters with names of 200 bytes.
MAX_WHOLE_BYTES: Final = 256 << 20


def parts_of(whole: bytes) -> Iterator[bytes]:
    """The parts of a serialized message, in order. A short message gives one part, which may be empty."""
    yield whole[:PART_BYTES]
    for start in range(PART_BYTES, len(whole), PART_BYTES):
        yield whole[start : start + PART_BYTES]


def header_messages(first: PushRequest | PullResponse | UploadRequest) -> Iterator[bytes]:
    """The serialized messages that carry a stream's first message, which holds nothing but its header."""
    whole = first.SerializeToString()
    if len(whole) <= WHOLE_BYTES:
        yield whole
        return
    for part in parts_of(first.header.SerializeToString()):
        yield type(first)(header_part=part).SerializeToString()
    last = type(first)()
    last.header.SetInParent()
    yield last.SerializeToString()


class Parts:
    """Collects the parts of one message. `limit_bytes` is the limit for all of them together."""

    def __init__(self, what: str, limit_bytes: int = MAX_WHOLE_BYTES) -> None:
        self._what = what
        self._limit_bytes = limit_bytes
        self._parts: list[bytes] = []
        self.size_bytes = 0

    def add(self, part: bytes) -> None:
        """Add the next part. TooLong if the parts then exceed the limit."""
        self.size_bytes += len(part)
        if self.size_bytes > self._limit_bytes:
            raise TooLong(what=self._what, got=self.size_bytes, unit="bytes", most=self._limit_bytes)
        self._parts.append(part)

    def take(self) -> bytes:
        """All parts joined; this object then holds none."""
        parts, self._parts = self._parts, []
        return b"".join(parts)
