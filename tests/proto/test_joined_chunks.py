"""Chunks that go on into the segments behind their own: the same body, in fewer messages."""

from __future__ import annotations

import pytest
import torch

from pushstep.proto.errors import InvalidRequest
from pushstep.proto.training_pb2 import PushRequest
from pushstep.proto.wire.frames import Assembly, BodyDigest, Chunk, Piece, pack, unpack

LENGTHS = (40, 0, 4, 0, 1200, 8, 0)


@pytest.mark.parametrize("chunk_bytes", [1, 8, 44, 48, 1000, 1 << 20])
def test_a_body_comes_as_it_was_sent(chunk_bytes: int) -> None:
    bodies = [
        [Piece(torch.randn(n // 8), torch.float32), Piece(torch.randn(n // 8), torch.float32)]
        for n in LENGTHS
    ]
    lengths = [sum(piece.nbytes for piece in pieces) for pieces in bodies]
    digests = [BodyDigest(b""), BodyDigest(b""), BodyDigest(b"")]
    frames = list(pack(bodies, digests[0], chunk_bytes=lambda: chunk_bytes, joined=True))
    apart = list(pack(bodies, digests[1], chunk_bytes=lambda: chunk_bytes))
    if chunk_bytes == 1 << 20:
        assert (len(frames), len(apart)) == (1, 3)
    assembly = Assembly(lengths, digests[2])
    for frame in frames:
        chunk = unpack(frame, PushRequest)[1]
        assert chunk is not None
        for part in assembly.parts_of(chunk):
            assembly.place(part)
    assembly.finish()
    assert len({digest.value for digest in digests}) == 1
    for index, pieces in enumerate(bodies):
        assert torch.equal(assembly.part(index, torch.float32), torch.cat([piece.source for piece in pieces]))


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(0, 0, memoryview(bytes(29))),
        Chunk(0, 0, memoryview(bytes(1 << 20))),
        Chunk(0, 4, memoryview(bytes(8))),
        Chunk(0, 1 << 63, memoryview(bytes(8))),
        Chunk(1, 0, memoryview(bytes(8))),
        Chunk(7, 0, memoryview(bytes(8))),
        Chunk(2**64 - 1, 0, memoryview(bytes(8))),
    ],
)
def test_what_does_not_fit_is_refused(chunk: Chunk) -> None:
    assembly = Assembly([12, 0, 16])
    with pytest.raises(InvalidRequest):
        for part in assembly.parts_of(chunk):
            assembly.place(part)
        assembly.finish()
