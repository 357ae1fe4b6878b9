"""The frame decoder takes any bytes: a chunk, fields, or a named error; nothing is written where no chunk belongs."""

from __future__ import annotations

import os
import random
import struct

import pytest
import torch

from pushstep.proto.errors import MalformedFrame, MessageTooLarge, WrongLength
from pushstep.proto.training_pb2 import PushHeader, PushRequest, UploadRequest
from pushstep.proto.wire.frames import Assembly, Chunk, Piece, chunk_of, pack, split, unpack
from tests.support.servers.harness import memory_bytes

SEED = 20_261
IN_A_TEST, IN_A_SOAK = 20_000, 1_000_000
LENGTHS = [7, 0, 64, 1000]
REFUSALS = (MalformedFrame, MessageTooLarge, WrongLength)
MOST_GROWTH_BYTES = 64 << 20


def good_messages() -> list[bytes]:
    """A body in this codec's form and in protobuf's, and a header."""
    bodies = [[Piece(torch.arange(length, dtype=torch.uint8), torch.uint8)] for length in LENGTHS if length]
    packed = [bytes(frame) for frame in pack(bodies)]
    plain = [
        PushRequest(segment=segment, offset=0, payload=bytes(length)).SerializeToString()
        for segment, length in enumerate(LENGTHS)
    ]
    header = PushRequest(header=PushHeader(model="m" * 30, worker_state=b"x" * 50)).SerializeToString()
    return [*packed, *plain, header, b""]


def changed(chance: random.Random, message: bytes) -> bytes:
    """A message with some of its bytes flipped, cut, repeated, or replaced by hostile numbers."""
    made = bytearray(message)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(made) + 1)
        match chance.randrange(6):
            case 0 if made:
                made[at % len(made)] ^= 1 << chance.randrange(8)
            case 1:
                del made[at:]
            case 2:
                made[at:at] = chance.randbytes(chance.randint(1, 12))
            case 3:
                made += made[:at]
            case 4:
                number = chance.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(message)])
                made[at : at + 8] = struct.pack("<Q", number)
            case _:
                made[at:at] = b"\xff" * chance.randint(1, 11)  # a varint without an end
    return bytes(made)


def taken(body: Assembly, chunk: Chunk, before: bytes) -> None:
    """Place a chunk: refused whole, or written to its own place alone."""
    try:
        body.place(chunk)
    except REFUSALS:
        assert body.buffer.numpy().tobytes() == before


def fuzz(count: int) -> None:
    chance, good = random.Random(SEED), good_messages()
    body = Assembly(LENGTHS)
    before_bytes = 0
    for number in range(count):
        if number == count // 10:
            before_bytes = memory_bytes(os.getpid())
        if number % 50 == 0:
            body = Assembly(LENGTHS)
        message = (
            chance.randbytes(chance.randrange(80))
            if number % 5 == 0
            else changed(chance, chance.choice(good))
        )
        assert message.startswith(split(message)[0])
        try:
            fields, chunk = unpack(message, chance.choice([PushRequest, UploadRequest]))
        except REFUSALS:
            continue
        assert fields is not None or chunk is not None
        if chunk is not None:
            assert len(chunk.payload) <= len(message)
            taken(body, chunk, body.buffer.numpy().tobytes())
    assert memory_bytes(os.getpid()) - before_bytes < MOST_GROWTH_BYTES


def test_any_bytes_are_a_message_or_refused_by_name() -> None:
    fuzz(IN_A_TEST)


@pytest.mark.soak
def test_any_bytes_are_a_message_or_refused_by_name_at_length() -> None:
    """Takes at most an hour."""
    fuzz(IN_A_SOAK)


def test_a_message_over_the_limit_is_refused_unparsed() -> None:
    with pytest.raises(MessageTooLarge):
        chunk_of(b"\xff" * ((4 << 20) + (64 << 10) + 1))
