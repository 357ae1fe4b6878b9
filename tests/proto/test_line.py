"""The heads of calls on a life line: what was framed is read back, and anything else is refused by name."""

from __future__ import annotations

import pytest

from pushstep.proto.errors import MalformedFrame, MessageTooLarge, NoSharedMemory
from pushstep.proto.errors.status import from_status, to_trailer
from pushstep.proto.shared_memory.local_socket import (
    HEAD_BYTES,
    Method,
    Status,
    framed,
    method_of,
    status_of,
)
from pushstep.proto.wire.frames import MAX_MESSAGE_BYTES


@pytest.mark.parametrize("kind", [*Method, *Status])
@pytest.mark.parametrize("message", [b"", b"x", bytes(70_000)])
def test_a_framed_message_is_read_back(kind: Method | Status, message: bytes) -> None:
    sent = framed(kind, message)
    read = method_of if isinstance(kind, Method) else status_of
    assert read(sent[:HEAD_BYTES]) == (kind, len(message))
    assert sent[HEAD_BYTES:] == message


@pytest.mark.parametrize("number", [0, 3, 255])
def test_an_unknown_kind_is_refused(number: int) -> None:
    head = bytes([number, 0, 0, 0, 0])
    with pytest.raises(MalformedFrame):
        method_of(head)
    with pytest.raises(MalformedFrame):
        status_of(head)


def test_a_length_beyond_a_message_is_refused() -> None:
    head = bytes([Method.PUSH]) + (MAX_MESSAGE_BYTES + 1).to_bytes(4, "little")
    with pytest.raises(MessageTooLarge):
        method_of(head)


def test_a_refusal_comes_back_as_the_class_that_was_raised() -> None:
    error = from_status(to_trailer(NoSharedMemory(problem="the region was closed")))
    assert type(error) is NoSharedMemory
    assert error.fields["problem"] == "the region was closed"
