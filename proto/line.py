"""Calls over a region's life line: what gRPC would carry of a shared push is some hundred bytes, and its own cost more.

The Unix connection over which a region was handed stays open for as long as its worker lives. On it the worker makes,
one at a time, the calls whose bytes lie in the region: a push or an exchange of a single message. Client to server:
method u8, length u32 (little-endian), a PushRequest with its header and commit. Back: status u8, length u32, and a
PushResponse or PullResponse, or the google.rpc.Status that gRPC would have had in its trailer. A round trip over gRPC
takes about 1.5 ms here, and one over the line 0.3.
"""

from __future__ import annotations

import os
import struct
import sys
from enum import IntEnum
from typing import Final

from .errors import MalformedFrame, MessageTooLarge
from .frames import MAX_MESSAGE_BYTES

_HEAD: Final = struct.Struct("<BI")
HEAD_BYTES: Final = _HEAD.size
# What either end reads at once: a whole message, unless it carries many groups or a worker's state.
READ_BYTES: Final = 64 << 10
# Where another core is there for the other end, either watches the line for a moment before it goes to sleep. There are
# life lines on Linux alone.
WATCHES: Final = sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1


class Method(IntEnum):
    """What is called."""

    PUSH = 1
    EXCHANGE = 2


class Status(IntEnum):
    """How it ended."""

    ANSWERED = 1
    REFUSED = 2


def framed(kind: Method | Status, message: bytes) -> bytes:
    """A message with its head."""
    return _HEAD.pack(kind, len(message)) + message


def method_of(head: bytes) -> tuple[Method, int]:
    """What is called, and the bytes that follow. MalformedFrame or MessageTooLarge."""
    number, length = _HEAD.unpack(head)
    if number not in Method._value2member_map_:
        raise MalformedFrame(problem=f"the line has no method {number}")
    return Method(number), _checked(length)


def status_of(head: bytes) -> tuple[Status, int]:
    """How a call ended, and the bytes that follow. MalformedFrame or MessageTooLarge."""
    number, length = _HEAD.unpack(head)
    if number not in Status._value2member_map_:
        raise MalformedFrame(problem=f"the line has no status {number}")
    return Status(number), _checked(length)


def _checked(length: int) -> int:
    if length > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(got=length, limit=MAX_MESSAGE_BYTES)
    return length
