"""The frame codec: what is packed comes back, any protobuf library reads it, and nothing else gets through."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import MalformedFrame, MessageTooLarge, PushstepError, WrongLength
from pushstep.proto.types_pb2 import DType, Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.frames import (
    CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    Assembly,
    BodyDigest,
    Chunk,
    Piece,
    pack,
    split,
    unpack,
)

KINDS = (pb.PushRequest, pb.PullResponse, pb.UploadRequest)
PREFIX_BYTES = 24
DTYPES = list(dtypes.WIRE)
# sources whose elements do not lie one after the other, or do in ways that trip up a copy
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t(),
    "every second": lambda t: t[:, ::2],
    "a column": lambda t: t[:, 3],
    "expanded": lambda t: t[:1].expand(5, t.shape[1]),
    "empty": lambda t: t[:0],
    "scalar": lambda t: t[0, 0],
    "one element": lambda t: t[2:3, 1:2],
}


def table(dtype: torch.dtype, rows: int = 6, columns: int = 7) -> Tensor:
    return torch.arange(rows * columns, dtype=torch.float32).view(rows, columns).sub(20).to(dtype)


def received(frames: Sequence[bytes], lengths: Sequence[int], kind: type = pb.PushRequest) -> Assembly:
    body = Assembly(lengths)
    for frame in frames:
        fields, chunk = unpack(frame, kind)
        assert fields is None
        assert chunk is not None
        body.place(chunk)
    body.finish()
    return body


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(dtype: torch.dtype, layout: str) -> None:
    source = LAYOUTS[layout](table(dtype))
    piece = Piece(source, dtype)
    body = received(list(pack([[piece]])), [piece.nbytes])
    assert torch.equal(body.part(0, dtype), source.reshape(-1))


@pytest.mark.parametrize(("source", "wire"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_cast_on_the_way_is_torchs(source: torch.dtype, wire: torch.dtype) -> None:
    values = torch.tensor([0.1, -1.0, 3.0e-5, 65504.0, 1 / 3], dtype=torch.float64).to(source)
    body = received(list(pack([[Piece(values, wire)]])), [values.numel() * wire.itemsize])
    assert bits(body.part(0, wire)) == bits(values.to(wire))


@pytest.mark.parametrize("elements", [CHUNK_BYTES // 4 - 1, CHUNK_BYTES // 4, CHUNK_BYTES // 4 + 1, 700_001])
def test_longer_than_a_chunk(elements: int) -> None:
    source = torch.arange(elements, dtype=torch.float32)
    frames = list(pack([[Piece(source, torch.float32)]]))
    assert len(frames) == -(-elements * 4 // CHUNK_BYTES)
    assert max(map(len, frames)) <= CHUNK_BYTES + PREFIX_BYTES
    assert torch.equal(received(frames, [elements * 4]).part(0, torch.float32), source)


def test_chunks_are_as_large_as_they_may_be_when_they_are_made() -> None:
    """A link that turns out slow gets smaller ones; the body, and its digest, are the same."""
    values = torch.arange(3_000_000, dtype=torch.float32)
    sizes = itertools.cycle([1 << 20, 64 << 10, 2 << 20])
    asked: list[int] = []

    def chunk_bytes() -> int:
        asked.append(next(sizes))
        return asked[-1]

    segments = [Segment(stop=values.numel(), dtype=DType.DTYPE_FLOAT32)]
    digest, plain = BodyDigest(segments), BodyDigest(segments)
    assembly = Assembly([values.nbytes])
    for frame in pack([[Piece(values, torch.float32)]], digest, chunk_bytes=chunk_bytes):
        _, chunk = unpack(frame, pb.PushRequest)
        assert chunk is not None
        assert len(chunk.payload) <= asked[-1]
        assembly.place(chunk)
    assembly.finish()
    assert torch.equal(assembly.part(0, torch.float32), values)
    list(pack([[Piece(values, torch.float32)]], plain))
    assert digest.value == plain.value


def test_many_tiny_pieces_fill_chunks_together() -> None:
    sizes = [1, 0, 3, 2, 0, 0, 5] * 3000
    pieces = [Piece(torch.full((size,), float(i)), torch.float32) for i, size in enumerate(sizes)]
    frames = list(pack([pieces]))
    assert len(frames) == 1
    expected = np.repeat(np.arange(len(sizes), dtype=np.float32), sizes)
    assert bits(received(frames, [expected.nbytes]).part(0, torch.float32)) == expected.tobytes()


def test_pieces_of_several_dtypes_in_one_segment() -> None:
    ids, rows = torch.tensor([3, 1, 2]), torch.randn(3, 5)
    pieces = [Piece(ids, torch.int64), Piece(rows, torch.bfloat16)]
    body = received(list(pack([pieces])), [sum(piece.nbytes for piece in pieces)])
    assert torch.equal(body.part(0, torch.int64, 0, 3), ids)
    assert torch.equal(body.part(0, torch.bfloat16, 24), rows.bfloat16().view(-1))


def test_a_piece_without_elements_sends_nothing_whatever_its_stride() -> None:
    """What `nonzero` finds nowhere has a stride of 0."""
    nothing = torch.nonzero(torch.zeros(5)).flatten()
    assert list(pack([[Piece(nothing, torch.int64), Piece(torch.empty(0, 16), torch.float32)]])) == []


def test_segments_are_numbered_and_empty_ones_send_nothing() -> None:
    pieces = [[Piece(torch.ones(n), torch.float32)] for n in (2, 0, 3)]
    frames = list(pack(pieces, first=4))
    assert [unpack(frame, pb.PullResponse)[1].segment for frame in frames] == [4, 6]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("size", [1, 3, 127, 128, 16_383, 16_384, CHUNK_BYTES])
def test_protobuf_reads_our_frames(kind: type, size: int) -> None:
    source = torch.arange(size, dtype=torch.int64).to(torch.float16)
    for number, frame in enumerate(pack([[Piece(source, torch.float16)]], first=2**20)):
        message = kind.FromString(frame)
        begin = number * CHUNK_BYTES
        assert (message.segment, message.offset) == (2**20, begin)
        assert message.payload == bits(source)[begin : begin + CHUNK_BYTES]
        assert message == kind(segment=2**20, offset=begin, payload=message.payload)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("size", [1, 127, 128, 5000, 300_000])
@pytest.mark.parametrize("segment", [0, 1, 2**40])
def test_we_read_protobufs_frames(kind: type, size: int, segment: int) -> None:
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    fields, chunk = unpack(
        kind(segment=segment, offset=7 * segment, payload=payload).SerializeToString(), kind
    )
    assert fields is None  # not even protobuf's own form of a chunk is parsed, and so copied, by it
    assert chunk is not None
    assert (chunk.segment, chunk.offset, bytes(chunk.payload)) == (segment, 7 * segment, payload)


def test_a_frame_with_more_than_a_chunk_keeps_its_fields() -> None:
    header = pb.PushHeader(model="m", segments=[Segment(stop=1, dtype=1)])
    commit = pb.PushCommit(digest=5)
    message = pb.PushRequest(header=header, segment=0, payload=b"abcd", commit=commit)
    fields, chunk = unpack(message.SerializeToString(), pb.PushRequest)
    assert fields is not None
    assert (fields.header.model, fields.commit.digest) == ("m", 5)
    assert chunk is not None
    assert bytes(chunk.payload) == b"abcd"


def test_fields_after_the_payload_are_not_taken_for_payload() -> None:
    (frame,) = pack([[Piece(torch.ones(4), torch.float32)]])
    trailing = frame + pb.PushRequest(commit=pb.PushCommit(digest=9)).SerializeToString()
    fields, chunk = unpack(trailing, pb.PushRequest)
    assert fields is not None
    assert fields.commit.digest == 9
    assert chunk is not None
    assert bytes(chunk.payload) == bits(torch.ones(4))


@pytest.mark.parametrize("more", [1, 1 << 20])
def test_too_large(more: int) -> None:
    with pytest.raises(MessageTooLarge) as caught:
        unpack(bytes(MAX_MESSAGE_BYTES + more), pb.PushRequest)
    assert caught.value.fields["limit"] == str(MAX_MESSAGE_BYTES)


@pytest.mark.parametrize("behind", [b"", pb.PushRequest(commit=pb.PushCommit()).SerializeToString()])
def test_a_payload_over_the_limit(behind: bytes) -> None:
    """Whichever way the message is read."""
    payload = bytes(MAX_CHUNK_BYTES)
    _, chunk = unpack(pb.PushRequest(segment=1, payload=payload).SerializeToString() + behind, pb.PushRequest)
    assert chunk is not None
    with pytest.raises(MessageTooLarge) as caught:
        unpack(pb.PushRequest(segment=1, payload=payload + b"x").SerializeToString() + behind, pb.PushRequest)
    assert caught.value.fields == {"got": str(MAX_CHUNK_BYTES + 1), "limit": str(MAX_CHUNK_BYTES)}


@pytest.mark.parametrize("claimed", [0, 15, 17, 2**31, 2**34, 2**35 - 1])
def test_a_frame_that_lies_about_its_length(claimed: int) -> None:
    """Shorter than said is no message; longer than said leaves bytes that are no field."""
    (frame,) = pack([[Piece(torch.full((4,), -1.0), torch.float32)]])
    varint = bytes(claimed >> s & 0x7F | (0x80 if s < 28 else 0) for s in range(0, 35, 7))
    with pytest.raises(MalformedFrame):
        unpack(frame[:19] + varint + frame[24:], pb.PushRequest)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_truncation_is_refused_or_shorter(kind: type) -> None:
    (frame,) = pack([[Piece(torch.full((8,), -1.0), torch.float32)]])
    for cut in range(1, len(frame)):
        try:
            _, chunk = unpack(frame[:cut], kind)
        except MalformedFrame:
            continue
        assert chunk is None


@settings(max_examples=400, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_any_bytes_are_a_message_or_a_named_error(data: st.DataObject, kind: type) -> None:
    """Random bytes, and our own frames with bytes changed, cut or added."""
    whole = b"".join(pack([[Piece(torch.arange(6.0), torch.float32)]]))
    message = bytearray(data.draw(st.one_of(st.binary(max_size=200), st.just(whole))))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(message)))
        message[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        fields, chunk = unpack(bytes(message), kind)
    except PushstepError as error:
        assert error.code in ("malformed_frame", "message_too_large")
        return
    if fields is None:
        assert chunk is not None
    body = filled(24)
    if chunk is not None:
        try:
            body.place(chunk)
        except PushstepError as error:
            assert error.code in ("malformed_frame", "wrong_length")
            assert bool((body.buffer == 0xEE).all())


def filled(*lengths: int) -> Assembly:
    body = Assembly(lengths)
    body.buffer.fill_(0xEE)
    return body


def chunk_of(segment: int, offset: int, payload: bytes) -> Chunk:
    return Chunk(segment, offset, memoryview(payload))


# what came before, the chunk that is refused, and with what
REFUSED = [
    pytest.param([], (0, 1, b"ab"), MalformedFrame, id="gap"),
    pytest.param([(0, 0, b"abc")], (0, 2, b"cd"), MalformedFrame, id="overlap"),
    pytest.param([(0, 0, b"abc")], (0, 0, b"abc"), MalformedFrame, id="again"),
    pytest.param([(0, 0, b"abc")], (1, 0, b"ab"), MalformedFrame, id="next segment too early"),
    pytest.param([], (1, 0, b"ab"), MalformedFrame, id="segments out of order"),
    pytest.param([], (9, 0, b"ab"), MalformedFrame, id="no such segment"),
    pytest.param([], (2**64 - 1, 2**64 - 1, b"a"), MalformedFrame, id="huge numbers"),
    pytest.param([], (0, 0, b"abcdefghi"), WrongLength, id="longer than its segment"),
    pytest.param([(0, 0, b"abcd")], (0, 4, b"efghi"), WrongLength, id="longer than what is left"),
    pytest.param([(0, 0, b"abcdefgh"), (1, 0, b"abcd")], (1, 4, b"e"), WrongLength, id="after the end"),
    pytest.param([(0, 0, b"abcdefgh"), (1, 0, b"abcd")], (2, 0, b""), WrongLength, id="empty after the end"),
]


@pytest.mark.parametrize(("before", "chunk", "error"), REFUSED)
def test_assembly_refuses_before_it_writes(
    before: list[tuple[int, int, bytes]], chunk: tuple[int, int, bytes], error: type[PushstepError]
) -> None:
    body = filled(8, 4)
    for good in before:
        body.place(chunk_of(*good))
    held = body.buffer.clone()
    with pytest.raises(error):
        body.place(chunk_of(*chunk))
    assert torch.equal(body.buffer, held)


@pytest.mark.parametrize(
    ("lengths", "given_bytes"), [((8,), 0), ((8,), 7), ((8, 4), 8), ((0, 4), 0), ((8, 0, 4), 11)]
)
def test_assembly_that_ends_early(lengths: tuple[int, ...], given_bytes: int) -> None:
    body = Assembly(lengths)
    left = given_bytes
    for segment, length in enumerate(lengths):
        if take := min(left, length):
            body.place(chunk_of(segment, 0, bytes(take)))
            left -= take
    with pytest.raises(WrongLength) as caught:
        body.finish()
    assert caught.value.fields["got"] == str(given_bytes)
    assert caught.value.fields["expected"] == str(sum(lengths))


def test_assembly_skips_empty_segments() -> None:
    body = Assembly([0, 4, 0, 0, 2, 0])
    body.place(chunk_of(1, 0, b"abcd"))
    body.place(chunk_of(4, 0, b"ef"))
    body.finish()
    assert bytes(body.part(4, torch.uint8).numpy()) == b"ef"
    Assembly([]).finish()
    Assembly([0, 0]).finish()


def test_parts_lie_on_borders_for_their_dtype() -> None:
    body = Assembly([3, 8, 5, 8])
    for segment, payload in enumerate((b"abc", bytes(8), b"defgh", np.float64(2.5).tobytes())):
        body.place(chunk_of(segment, 0, payload))
    assert body.part(3, torch.float64).tolist() == [2.5]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_digest_does_not_depend_on_the_chunks(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    payload = data.draw(st.binary(min_size=sum(lengths), max_size=sum(lengths)))
    segments = [Segment(arena=i, stop=length) for i, length in enumerate(lengths)]
    whole = BodyDigest(segments)
    whole.update(payload)
    split = BodyDigest(segments)
    body = Assembly(lengths, split)
    at = 0
    for segment, length in enumerate(lengths):
        offset = 0
        while offset < length:
            size = data.draw(st.integers(1, length - offset))
            body.place(chunk_of(segment, offset, payload[at : at + size]))
            at, offset = at + size, offset + size
    body.finish()
    assert split.value == whole.value


def test_digest_knows_where_the_bytes_go() -> None:
    """The same bytes for other elements, as rows, in another dtype or of a state, are another body."""
    tables = [
        [Segment(stop=4)],
        *([Segment(stop=4, dtype=dtype)] for dtype in DType.values()[1:]),
        [Segment(stop=4, state="sum")],
        [Segment(stop=4, state="sun")],
        [Segment(stop=4, elements=2)],
        [Segment(stop=4, parameter=2)],
        [Segment(arena=1, stop=4)],
        [Segment(start=1, stop=5)],
        [Segment(stop=4, rows=0)],
        [Segment(stop=4, rows=2)],
        [Segment(stop=2), Segment(start=2, stop=4)],
    ]
    values = set()
    for segments in tables:
        digest = BodyDigest(segments)
        digest.update(b"0123456789abcdef")
        values.add(digest.value)
    assert len(values) == len(tables)
    assert 0 not in values


def test_pack_takes_the_digest_that_assembly_takes() -> None:
    source = torch.randn(700_000)
    segments = [Segment(stop=300_000, dtype=1), Segment(start=300_000, stop=700_000, dtype=1)]
    sent, taken = BodyDigest(segments), BodyDigest(segments)
    bodies = [[Piece(source[:300_000], torch.float32)], [Piece(source[300_000:], torch.float32)]]
    body = Assembly([1_200_000, 1_600_000], taken)
    for frame in pack(bodies, sent):
        chunk = unpack(frame, pb.PushRequest)[1]
        assert chunk is not None
        body.place(chunk)
    assert sent.value == taken.value


def fields_of(*parts: bytes) -> int:
    return len(split(b"".join(parts))[0])


def test_only_what_is_before_a_payload_is_to_be_parsed() -> None:
    """Wherever else a payload lies, or what is none, all of the message is."""
    head = pb.PushRequest(header=pb.PushHeader(model="m" * 300), segment=1, offset=2).SerializeToString()
    for size in (1, 127, 128, 70_000):
        payload = pb.PushRequest(payload=bytes(size)).SerializeToString()
        assert fields_of(head, payload) == len(head)
        assert fields_of(payload) == 0
        assert fields_of(payload, head) == len(payload) + len(head)
        assert fields_of(head, payload[:-1]) == len(head) + len(payload) - 1
    for odd in (
        b"",
        head,
        b"\xff" * 9,
        b"\x80\x01\x00",
        b"\x7a\xff\xff\xff\xff\xff\xff",
        b"\x0a\xff",
    ):
        assert fields_of(odd) == len(odd)
    (frame,) = pack([[Piece(torch.ones(4), torch.float32)]])
    assert fields_of(frame) < len(frame) - 16


def test_what_has_no_bytes_has_no_frame() -> None:
    nothing = torch.empty(0, 3)
    for pieces in ([], [Piece(nothing, torch.float32)], [Piece(nothing, torch.bfloat16)]):
        assert not list(pack([pieces]))
    assert len(list(pack([[Piece(nothing, torch.float32), Piece(torch.ones(3), torch.float32)]]))) == 1
