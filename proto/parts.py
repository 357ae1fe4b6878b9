"""Messages that are too long for one: cut into parts, and put together again.

A model of a million parameters has a manifest of tens of megabytes. Its parts are stretches of the serialized message,
one after the other; only whoever has them all can read it. A stream's header comes so as `header_part`, a join as the
parts of JoinInParts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from .errors import TooLong
from .training_pb2 import PullResponse, PushRequest, UploadRequest

PART_BYTES: Final = 1 << 20
# A message of up to here goes as it is.
WHOLE_BYTES: Final = 2 << 20
# A million parameters with names of 200 bytes.
MAX_WHOLE_BYTES: Final = 256 << 20


def parts_of(whole: bytes) -> Iterator[bytes]:
    """The stretches of a serialized message; one, which may be empty, of a short one."""
    yield whole[:PART_BYTES]
    for start in range(PART_BYTES, len(whole), PART_BYTES):
        yield whole[start : start + PART_BYTES]


def header_messages(first: PushRequest | PullResponse | UploadRequest) -> Iterator[bytes]:
    """A stream's first message, which holds its header and nothing else, as the messages that it goes in."""
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
    """The parts of one message as they come. `limit_bytes`: of all of them together."""

    def __init__(self, what: str, limit_bytes: int = MAX_WHOLE_BYTES) -> None:
        self._what = what
        self._limit_bytes = limit_bytes
        self._parts: list[bytes] = []
        self.size_bytes = 0

    def add(self, part: bytes) -> None:
        """Take in the next one; TooLong if that makes more than there may be."""
        self.size_bytes += len(part)
        if self.size_bytes > self._limit_bytes:
            raise TooLong(what=self._what, got=self.size_bytes, unit="bytes", most=self._limit_bytes)
        self._parts.append(part)

    def take(self) -> bytes:
        """All of them, in one; they are let go of."""
        parts, self._parts = self._parts, []
        return b"".join(parts)
