"""A repeated field read by a kernel is what protobuf reads, in every form that a message may take."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pushstep.optim.ops.varints import Varints
from pushstep.proto.training_pb2 import PullRowsRequest

FIELD = PullRowsRequest.IDS_FIELD_NUMBER
LARGEST = 2**64 - 1
IDS = [[], [0], [7], [127, 128], [LARGEST], [2**63, 1, 2**35], list(range(1000)), [300] * 70_000]


def read(message: bytes) -> tuple[list[int], PullRowsRequest]:
    found = Varints(message, FIELD)
    numbers = [int(number) for number in found.numbers()]
    assert len(numbers) == found.count
    return numbers, PullRowsRequest.FromString(found.rest)


def varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


@pytest.mark.parametrize("ids", IDS, ids=len)
def test_what_protobuf_writes(ids: list[int]) -> None:
    request = PullRowsRequest(model="m", parameter="table", ids=ids, dtype=3)  # type: ignore[arg-type]
    numbers, rest = read(request.SerializeToString())
    assert numbers == ids
    assert rest == PullRowsRequest(model="m", parameter="table", dtype=3)  # type: ignore[arg-type]


def test_every_other_form_of_the_same() -> None:
    """One by one, in several packs, between other fields, and with longer varints than needed."""
    packed = b"\x1a" + varint(3) + b"\x01\x80\x02"
    parts = [b"\x18\x05", packed, b"\x0a\x01m", b"\x18\xff\x7f", b"\x1a\x00", b"\x18\x81\x80\x00", packed]
    numbers, rest = read(b"".join(parts))
    assert numbers == list(PullRowsRequest.FromString(b"".join(parts)).ids) == [5, 1, 256, 16383, 1, 1, 256]
    assert rest == PullRowsRequest(model="m")


@settings(max_examples=500, deadline=None)
@given(message=st.binary(max_size=60))
@example(b"\x1a\x05\x01")
@example(b"\x1a\x02\x80\x80")
@example(b"\x18")
@example(b"\x19\x00\x00")
@example(b"\x1b\x1c")
@example(b"\x1a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
def test_any_bytes_are_what_protobuf_finds_or_no_message(message: bytes) -> None:
    """What the kernel takes protobuf takes, with the same numbers; the rest is left for protobuf to judge."""
    try:
        numbers, rest = read(message)
    except (ValueError, DecodeError):
        return
    try:
        expected = PullRowsRequest.FromString(message)
    except DecodeError:
        return
    assert numbers == list(expected.ids)
    assert (rest.model, rest.parameter) == (expected.model, expected.parameter)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, LARGEST), max_size=30), cut=st.integers(1, 40))
def test_a_message_that_is_cut_is_refused_or_shorter(ids: list[int], cut: int) -> None:
    whole = PullRowsRequest(model="m", ids=ids).SerializeToString()
    try:
        numbers, _ = read(whole[: max(0, len(whole) - cut)])
    except (ValueError, DecodeError):
        return
    assert numbers == ids[: len(numbers)]
