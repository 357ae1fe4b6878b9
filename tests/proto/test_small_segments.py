"""int8 and element-sparse segments as the server meets them: their lengths, their rules, and bytes of any kind."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pushstep.client.gradients.body import push_body
from pushstep.client.gradients.compression import Compression
from pushstep.proto.errors import InvalidRequest, MalformedFrame, PushstepError, WrongDtype, WrongLength
from pushstep.proto.training_pb2 import PushRequest
from pushstep.proto.types_pb2 import DType, Manifest, Parameter, ParamGroup, Segment
from pushstep.proto.wire.bodies import check_body
from pushstep.proto.wire.buffers import BufferPool
from pushstep.proto.wire.frames import Assembly, BodyDigest, Piece, pack, unpack
from pushstep.proto.wire.layout import Layout
from pushstep.server.staging.unpack import dense_part, rows_parts

INT8, F32, F64 = DType.DTYPE_INT8, DType.DTYPE_FLOAT32, DType.DTYPE_FLOAT64
LAYOUT = Layout(
    Manifest(
        parameters=[
            Parameter(name="table", shape=[5, 300], dtype=F32),
            Parameter(name="weight", shape=[7], dtype=F32),
            Parameter(name="scale", shape=[], dtype=F32),
        ],
        groups=[ParamGroup(rule="adagrad")],
    )
)
WHOLE = {"start": 0, "stop": 1508}

LENGTHS = [
    # per parameter: elements, and four bytes for each 256 of them or less
    pytest.param(Segment(**WHOLE, dtype=INT8), 1500 + 6 * 4 + 7 + 4 + 1 + 4, id="int8"),
    pytest.param(Segment(start=1500, stop=1507, dtype=INT8), 11, id="int8, one short block"),
    pytest.param(Segment(start=0, stop=1500, dtype=INT8, rows=3), 3 * (8 + 300 + 8), id="int8 rows"),
    pytest.param(Segment(start=0, stop=1500, dtype=INT8, rows=0), 0, id="no int8 rows"),
    pytest.param(Segment(**WHOLE, dtype=F32, elements=5), 5 * 8, id="elements"),
    pytest.param(Segment(**WHOLE, dtype=F64, elements=5), 5 * 12, id="float64 elements"),
    pytest.param(Segment(**WHOLE, dtype=F32, elements=0), 0, id="no elements"),
]


@pytest.mark.parametrize(("segment", "length"), LENGTHS)
def test_lengths(segment: Segment, length: int) -> None:
    assert check_body(LAYOUT, [segment], 1 << 20, of_push=True) == [length]
    with pytest.raises((MalformedFrame, WrongDtype)):
        check_body(LAYOUT, [segment], 1 << 20)


def test_what_a_push_is_unpacked_to_counts() -> None:
    """One element may stand for a whole model, so its few bytes are not what has to be reserved."""
    segment = Segment(**WHOLE, dtype=F32, elements=1)
    assert LAYOUT.unpacked_bytes(segment) == 1508 * 4
    assert check_body(LAYOUT, [segment], 1508 * 4 + 8, of_push=True) == [8]
    with pytest.raises(WrongLength):
        check_body(LAYOUT, [segment], 1508 * 4 + 7, of_push=True)


@pytest.mark.parametrize(
    "segment",
    [
        pytest.param(Segment(**WHOLE, dtype=INT8, elements=1), id="int8 elements"),
        pytest.param(Segment(start=0, stop=1500, dtype=F32, elements=1, rows=1), id="rows and elements"),
        pytest.param(Segment(**WHOLE, dtype=F32, elements=1509), id="more elements than there are"),
        pytest.param(Segment(**WHOLE, dtype=F32, elements=2**64 - 1), id="more than anything"),
        pytest.param(Segment(start=3, stop=1508, dtype=F32, elements=1), id="not on a border"),
        pytest.param(Segment(**WHOLE, dtype=9, elements=1), id="no such dtype"),
        pytest.param(Segment(**WHOLE, dtype=9), id="no such dtype, dense"),
    ],
)
def test_segments_that_are_refused(segment: Segment) -> None:
    with pytest.raises(InvalidRequest):
        check_body(LAYOUT, [segment], 1 << 40, of_push=True)


def unpacked(segment: Segment, payload: bytes) -> Any:
    """What the server makes of a complete segment."""
    body = Assembly(check_body(LAYOUT, [segment], 1 << 30, of_push=True), BodyDigest([segment]))
    for start in range(0, len(payload), 1000):
        message = PushRequest(offset=start, payload=payload[start : start + 1000]).SerializeToString()
        chunk = unpack(message, PushRequest)[1]
        assert chunk is not None
        body.place(chunk)
    body.finish()
    slots, take = LAYOUT.slots_of(segment), BufferPool(0).take
    if segment.HasField("rows"):
        return rows_parts([segment], [slots], body, take)[0], None
    return dense_part(segment, slots, body, 0, take)


@pytest.mark.parametrize("indices", [(3, 3), (4, 3), (0, 1508), (0, 2**32 - 1), (2**31, 5), (2**32 - 1, 0)])
def test_indices_that_are_refused(indices: tuple[int, int]) -> None:
    segment = Segment(**WHOLE, dtype=F32, elements=2)
    with pytest.raises(MalformedFrame, match="indices"):
        unpacked(segment, struct.pack("<2I2f", *indices, 1.0, 2.0))


@pytest.mark.parametrize(("dtype", "code"), [(F32, "f"), (F64, "d"), (DType.DTYPE_FLOAT16, "e")])
def test_elements_lie_where_their_indices_say(dtype: Any, code: str) -> None:
    """Also where the values do not begin on a border for their type."""
    segment = Segment(**WHOLE, dtype=dtype, elements=3)
    part, _ = unpacked(segment, struct.pack(f"<3I3{code}", 0, 1500, 1507, 1.0, -2.0, 0.5))
    assert part.gradient.nonzero().flatten().tolist() == [0, 1500, 1507]
    assert part.gradient[[0, 1500, 1507]].tolist() == [1.0, -2.0, 0.5]


def test_any_code_and_any_scale_mean_their_product() -> None:
    codes = bytes([0, 1, 127, 128, 129, 255, 2])
    for scale in (1.0, -0.5, 1e-45, 3.4e38, float("inf"), float("nan")):
        part, (square,) = unpacked(
            Segment(start=1500, stop=1507, dtype=INT8), struct.pack("<f", scale) + codes
        )
        expected = torch.tensor([0.0, 1, 127, -128, -127, -1, 2]) * torch.tensor(scale)
        assert torch.equal(part.gradient.isnan(), expected.isnan())
        assert torch.equal(part.gradient.nan_to_num(), expected.nan_to_num())
        assert (square == square) == (not expected.isnan().any())


def test_a_chunk_may_end_where_the_next_piece_does_not_fit() -> None:
    """Indices of four bytes before values of eight: what is left of a chunk may be too short for one."""
    indices, values = torch.arange(1000001, dtype=torch.int32), torch.randn(1000001, dtype=torch.float64)
    frames = list(pack([[Piece(indices, torch.int32), Piece(values, torch.float64)]]))
    chunks = [PushRequest.FromString(frame) for frame in frames]
    payload = b"".join(chunk.payload for chunk in chunks)
    assert payload == indices.numpy().tobytes() + values.numpy().tobytes()
    ends = [0]
    for chunk in chunks:
        assert chunk.offset == ends[-1]
        ends.append(ends[-1] + len(chunk.payload))
        assert unpack(chunk.SerializeToString(), PushRequest)[1] is not None


NUMBERS = st.sampled_from([0, 1, 7, 1500, 1507, 1508, 1509, 2**31, 2**32, 2**63, 2**64 - 1])
SEGMENTS = st.builds(
    Segment,
    arena=st.sampled_from([0, 0, 0, 1, 2**32 - 1]),
    start=NUMBERS,
    stop=NUMBERS,
    dtype=st.integers(0, 6),
    rows=st.none() | NUMBERS,
    elements=st.none() | NUMBERS,
)


def check_segments(segments: list[Segment]) -> None:
    try:
        lengths = check_body(LAYOUT, segments, 1 << 20, of_push=True)
    except PushstepError:
        return
    assert all(0 <= length <= 1 << 20 for length in lengths)


def check_payload(segment: Segment, payload: bytes) -> None:
    length = LAYOUT.segment_bytes(segment)
    try:
        part, _ = unpacked(
            segment, (payload * (length // max(1, len(payload)) + 1))[:length].ljust(length, b"\0")
        )
    except PushstepError:
        return
    values = part.rows if segment.HasField("rows") else part.gradient
    assert values.numel() <= 1508


LEGAL = [
    Segment(**WHOLE, dtype=INT8),
    Segment(start=0, stop=1500, dtype=INT8, rows=4),
    Segment(**WHOLE, dtype=F32, elements=3),
    Segment(**WHOLE, dtype=DType.DTYPE_BFLOAT16, elements=3),
]


@settings(max_examples=150, deadline=None)
@given(segments=st.lists(SEGMENTS, min_size=1, max_size=3))
def test_any_segments_are_named_or_counted(segments: list[Segment]) -> None:
    check_segments(segments)


@settings(max_examples=150, deadline=None)
@given(segment=st.sampled_from(LEGAL), payload=st.binary(max_size=64))
def test_any_bytes_are_named_or_gradients(segment: Segment, payload: bytes) -> None:
    check_payload(segment, payload)


@settings(max_examples=300, deadline=None)
@given(message=st.binary(max_size=80))
def test_any_message_is_named_or_a_chunk(message: bytes) -> None:
    with contextlib.suppress(PushstepError):
        unpack(message, PushRequest)


@pytest.mark.soak
@pytest.mark.timeout(900)
@settings(max_examples=20_000, deadline=None)
@given(
    segments=st.lists(SEGMENTS, min_size=1, max_size=3),
    legal=st.sampled_from(LEGAL),
    payload=st.binary(max_size=1024),
)
def test_any_of_it_at_length(segments: list[Segment], legal: Segment, payload: bytes) -> None:
    """Takes at most a quarter of an hour."""
    check_segments(segments)
    check_payload(legal, payload)
    with contextlib.suppress(PushstepError):
        unpack(payload, PushRequest)


def sent(gradient: torch.Tensor, compression: Compression) -> tuple[Segment, bytes]:
    """What a client sends for the gradient of `weight`, as stock protobuf reads its frames."""
    body = push_body(LAYOUT, {LAYOUT.slots[1]: gradient}, compression)
    (segment,) = body.segments
    payload = b""
    for frame in pack(body.pieces):
        message = PushRequest.FromString(frame)
        assert (message.segment, message.offset) == (0, len(payload))
        payload += message.payload
    assert len(payload) == LAYOUT.segment_bytes(segment)
    return segment, payload


def test_our_int8_frames_are_protobufs() -> None:
    """A scale, and a code for each element; what codes lose is not sent, and comes with the next."""
    gradient = torch.tensor([127.0, -127.0, 1.0, 0.25, -64.0, 0.0, 3.5]) / 4
    compression = Compression(torch.int8, None)
    segment, payload = sent(gradient, compression)
    compression.settle(applied=True)
    assert (segment.dtype, segment.start, segment.stop) == (INT8, 1500, 1507)
    assert struct.unpack("<f7b", payload) == (0.25, 127, -127, 1, 0, -64, 0, 4)
    _, payload = sent(torch.full((7,), 0.25) * torch.tensor([127.0, 1, 1, 1, 1, 1, 1]), compression)
    assert struct.unpack("<f7b", payload) == (0.25, 127, 1, 1, 1, 1, 1, 0)


@pytest.mark.parametrize(
    ("dtype", "code"), [(None, "f"), (torch.float64, "d"), (torch.float16, "e")], ids=str
)
def test_our_element_sparse_frames_are_protobufs(dtype: torch.dtype | None, code: str) -> None:
    """Ascending indices of four bytes, then values."""
    gradient = torch.tensor([0.5, -4.0, 1.0, 0.0, 2.0, -0.25, -8.0])
    segment, payload = sent(gradient, Compression(dtype, 3 / 7))
    assert (segment.elements, segment.start, segment.stop) == (3, 1500, 1507)
    assert struct.unpack(f"<3I3{code}", payload) == (1, 4, 6, -4.0, 2.0, -8.0)
