"""Pushes that should not be: each is refused by name over real sockets, and the model is what it was before."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pushstep.client import Session
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import PushstepError
from pushstep.proto.types_pb2 import DType, Segment
from pushstep.proto.wire.frames import CHUNK_BYTES, MAX_MESSAGE_BYTES, TRANSPORT_LIMIT_BYTES
from tests.support.servers.harness import RunningServer
from tests.support.workers.wire import (
    BULK_IN,
    STREAMED_OUT,
    UNARY,
    NotRefused,
    RawWorker,
    Wire,
    created,
    untouched,
)

NAN, INF = float("nan"), float("inf")
MODEL = "bad-input"
_workers = itertools.count()
Push = Callable[[RawWorker], list[bytes]]


@pytest.fixture(scope="module")
def owner(server: RunningServer) -> Session:
    return created(server, MODEL)


@pytest.fixture
def wire(server: RunningServer) -> Iterator[Wire]:
    opened = Wire(server.grpc)
    yield opened
    opened.close()


@pytest.fixture
def raw(owner: Session, wire: Wire) -> RawWorker:
    return RawWorker(wire, MODEL, f"raw-{next(_workers)}")


def segments(*declared: Segment) -> Push:
    """A push that declares these segments and carries 4 KiB for the first."""
    return lambda raw: [
        pb.PushRequest(header=raw.header(declared)).SerializeToString(),
        pb.PushRequest(payload=bytes(4096)).SerializeToString(),
    ]


def identity(**changes: Any) -> Push:
    """A good push under another identity."""
    return lambda raw: raw.good(identity=raw.identity(**changes))


def gradient(name: str, values: Any, dtype: torch.dtype = torch.float32) -> Push:
    """A dense gradient with values of one's own."""

    def push(raw: RawWorker) -> list[bytes]:
        slot = raw.slot(name)
        segment = raw.dense(name)
        segment.dtype = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}[dtype]
        whole = torch.zeros(slot.shape, dtype=dtype)
        whole.view(-1)[-1] = values
        return raw.whole(raw.header([segment]), [[whole]])

    return push


def rows(ids: list[int], value: float = 1.0) -> Push:
    """Rows of the table under ids of one's own; huge ones as their uint64."""

    def push(raw: RawWorker) -> list[bytes]:
        at = torch.from_numpy(np.array(ids, dtype=np.uint64).view(np.int64))
        header = raw.header([raw.rows("table", len(ids))])
        return raw.whole(header, [[at, torch.full((len(ids), 3), value)]])

    return push


def stream(change: Callable[[RawWorker, list[bytes]], Any]) -> Push:
    """A good push of [header, chunk, commit], changed as a list of messages."""

    def push(raw: RawWorker) -> list[bytes]:
        messages = raw.good()
        return change(raw, messages) or messages

    return push


def chunk(segment: int = 0, offset: int = 0, payload: bytes = bytes(16)) -> bytes:
    return pb.PushRequest(segment=segment, offset=offset, payload=payload).SerializeToString()


def dense(start: int, stop: int, arena: int = 1, **more: Any) -> Segment:
    return Segment(arena=arena, start=start, stop=stop, dtype=DType.DTYPE_FLOAT32, **more)


def both_nan(raw: RawWorker) -> list[bytes]:
    values = [torch.zeros(8), torch.full((4,), NAN)]
    return raw.whole(raw.header([raw.dense("weight", "bias")]), [values])


def two_sparse(raw: RawWorker) -> list[bytes]:
    body: list[Tensor] = [torch.tensor([0]), torch.ones(1, 3)]
    return raw.whole(raw.header([raw.rows("table", 1), raw.rows("table", 1)]), [body, body])


# arena 0 is the table's [0, 15); arena 1 holds weight [0, 8), bias [8, 12) and scale [12, 13)
# name: (the push, the catalogue's code, whether it takes the sequence)
BAD: dict[str, tuple[Push, str, bool]] = {
    "a model that is gone": (lambda raw: raw.good(model="nobody"), "model_lost", False),
    "unknown model": (lambda raw: raw.good(model="nobody", identity=None), "unknown_model", False),
    "hostile model name": (lambda raw: raw.good(model="../" * 30, identity=None), "unknown_model", False),
    "wrong uid": (identity(model_uid=b"x" * 16), "model_lost", False),
    "no uid": (identity(model_uid=b""), "model_lost", False),
    "newer timeline": (identity(timeline=2), "superseded", False),
    "no timeline": (identity(timeline=0), "superseded", False),
    "unknown worker": (identity(worker="nobody"), "unknown_worker", False),
    "future epoch": (identity(epoch=2), "unknown_worker", False),
    "past epoch": (identity(epoch=0), "fenced", False),
    "gap": (identity(step=2), "out_of_order", False),
    "huge sequence": (identity(sequence=2**64 - 1), "out_of_order", False),
    "sequence 0": (identity(sequence=0), "out_of_order", False),
    "stale manifest": (lambda raw: raw.good(manifest_hash=1), "manifest_changed", False),
    "future base version": (lambda raw: raw.good(base_version=10**6), "malformed_frame", True),
    "wrong digest": (
        lambda raw: [*raw.good()[:2], *raw.whole(raw.header([]), [], 7)[1:]],
        "digest_mismatch",
        False,
    ),
    "worker state over 64 KiB": (lambda raw: raw.good(worker_state=bytes(65537)), "too_long", False),
    "too many metrics": (
        lambda raw: raw.good(metrics={str(i): 1.0 for i in range(65)}),
        "too_long",
        False,
    ),
    "a metric's long name": (lambda raw: raw.good(metrics={"x" * 201: 1.0}), "too_long", False),
    "samples NaN": (lambda raw: raw.good(samples=NAN), "number_out_of_range", False),
    "samples below 0": (lambda raw: raw.good(samples=-1.0), "number_out_of_range", False),
    "samples that drown the others": (lambda raw: raw.good(samples=1e39), "number_out_of_range", False),
    "samples that are nothing": (lambda raw: raw.good(samples=1e-300), "number_out_of_range", False),
    "no segments": (segments(), "malformed_frame", False),
    "gradients in a skip push": (lambda raw: raw.good(skip=True), "malformed_frame", False),
    "optimizer state": (segments(dense(0, 8, state="square_avg")), "malformed_frame", False),
    "no dtype": (segments(Segment(arena=1, stop=8)), "wrong_dtype", False),
    "unknown dtype": (segments(Segment(arena=1, stop=8, dtype=99)), "wrong_dtype", False),
    "unknown arena": (segments(dense(0, 8, arena=2)), "malformed_frame", False),
    "starts inside": (segments(dense(1, 8)), "malformed_frame", False),
    "stops inside": (segments(dense(0, 11)), "malformed_frame", False),
    "past the end": (segments(dense(0, 14)), "malformed_frame", False),
    "backwards": (segments(dense(8, 0)), "malformed_frame", False),
    "empty": (segments(dense(8, 8)), "malformed_frame", False),
    "huge borders": (segments(dense(0, 2**64 - 1)), "malformed_frame", False),
    "overlapping": (segments(dense(0, 12), dense(8, 13)), "malformed_frame", False),
    "twice": (segments(dense(0, 8), dense(0, 8)), "malformed_frame", False),
    "rows twice": (two_sparse, "malformed_frame", False),
    "rows of a scalar": (segments(dense(12, 13, rows=1)), "malformed_frame", False),
    "rows of two": (segments(dense(0, 12, rows=1)), "malformed_frame", False),
    "more rows than staging": (segments(dense(0, 15, arena=0, rows=2**40)), "wrong_length", False),
    "endlessly many rows": (segments(dense(0, 15, arena=0, rows=2**64 - 1)), "wrong_length", False),
    "nan": (gradient("bias", NAN), "nonfinite_gradient", True),
    "inf": (gradient("table", INF), "nonfinite_gradient", True),
    "-inf in a scalar": (gradient("scale", -INF), "nonfinite_gradient", True),
    "nan in bfloat16": (gradient("weight", NAN, torch.bfloat16), "nonfinite_gradient", True),
    "inf in float16": (gradient("weight", INF, torch.float16), "nonfinite_gradient", True),
    "nan in float64": (gradient("weight", NAN, torch.float64), "nonfinite_gradient", True),
    "float64 that float32 cannot hold": (gradient("bias", 1e39, torch.float64), "nonfinite_gradient", True),
    "nan in the second parameter": (both_nan, "nonfinite_gradient", True),
    "nan in rows": (rows([1, 3], NAN), "nonfinite_gradient", True),
    "duplicate rows whose sum is infinite": (rows([2, 2], 3e38), "nonfinite_gradient", True),
    "row after the last": (rows([0, 5]), "row_out_of_range", True),
    "row -1": (rows([2**64 - 1]), "row_out_of_range", True),
    "lowest row": (rows([2**63]), "row_out_of_range", True),
    "huge row": (rows([0, 2**63 - 1]), "row_out_of_range", True),
    "an empty stream": (lambda raw: [], "malformed_frame", False),
    "no header": (stream(lambda raw, m: m[1:]), "malformed_frame", False),
    "an empty message first": (stream(lambda raw, m: [b"", *m]), "malformed_frame", False),
    "two headers": (stream(lambda raw, m: [m[0], *m]), "malformed_frame", False),
    "a header at the end": (stream(lambda raw, m: [*m[:2], m[0]]), "malformed_frame", False),
    "an empty message": (stream(lambda raw, m: m.insert(1, b"")), "malformed_frame", False),
    "an empty chunk": (stream(lambda raw, m: m.insert(1, chunk(payload=b""))), "malformed_frame", False),
    "ends before the body": (stream(lambda raw, m: m[:1]), "wrong_length", False),
    "ends in the body": (stream(lambda raw, m: [m[0], chunk(payload=bytes(12))]), "wrong_length", False),
    "commits in the body": (
        stream(lambda raw, m: [m[0], chunk(payload=bytes(12)), m[2]]),
        "wrong_length",
        False,
    ),
    "more than declared": (stream(lambda raw, m: [m[0], chunk(payload=bytes(17))]), "wrong_length", False),
    "goes on after the end": (
        stream(lambda raw, m: [*m[:2], chunk(offset=16, payload=b"x")]),
        "wrong_length",
        False,
    ),
    "chunk out of order": (
        stream(lambda raw, m: [m[0], chunk(offset=8, payload=bytes(8))]),
        "malformed_frame",
        False,
    ),
    "chunk again": (
        stream(lambda raw, m: [m[0], chunk(payload=bytes(8)), chunk()]),
        "malformed_frame",
        False,
    ),
    "chunk of another segment": (stream(lambda raw, m: [m[0], chunk(1)]), "malformed_frame", False),
    "a frame cut short": (stream(lambda raw, m: [m[0], m[1][:-4], m[2]]), "malformed_frame", False),
    "a frame with more than it says": (
        stream(lambda raw, m: [m[0], m[1] + b"\xff\xff\xff\xff", m[2]]),
        "malformed_frame",
        False,
    ),
    "just over our limit": (
        stream(lambda raw, m: [m[0], bytes(MAX_MESSAGE_BYTES + 1)]),
        "message_too_large",
        False,
    ),
    "over gRPC's limit": (
        stream(lambda raw, m: [m[0], bytes(TRANSPORT_LIMIT_BYTES + 1)]),
        "message_too_large",
        False,
    ),
    "a header over the limit": (lambda raw: [bytes(MAX_MESSAGE_BYTES + 1)], "message_too_large", False),
}


# a call of TakeSteps without a push is none that is bad
NO_PUSH = ("an empty stream", "TakeSteps")


@pytest.mark.parametrize(
    ("case", "method"),
    [
        (case, method)
        for case in BAD
        for method in ("Push", "Exchange", "TakeSteps")
        if (case, method) != NO_PUSH
    ],
)
def test_bad_push(case: str, method: str, server: RunningServer, raw: RawWorker) -> None:
    make, code, consumes = BAD[case]
    messages = make(raw)
    with untouched(server, MODEL):
        error = raw.wire.refused(method, messages)
        assert (error.code, error.consumed) == (code, consumes), error.message
        assert len(error.message) > 15
        if consumes:  # its retry is answered with the same verdict, and nothing is judged again
            again = raw.wire.refused(method, messages)
            assert (type(again), again.message, again.fields) == (type(error), error.message, error.fields)
    raw.advance(consumes)
    assert raw.push(raw.good(base_version=0)).receipt.identity == raw.identity()


# What can be told before a byte is sent is told there, and says which parameter.
BAD_HERE: dict[str, tuple[dict[str, Any], str]] = {
    "unknown parameter": ({"nothing": np.zeros(4, np.float32)}, "unknown_parameter"),
    "wrong shape": ({"bias": np.zeros(5, np.float32)}, "wrong_shape"),
    "transposed": ({"weight": np.zeros((2, 4), np.float32)}, "wrong_shape"),
    "a scalar for a vector": ({"bias": np.float32(1)}, "wrong_shape"),
    "integers": ({"bias": np.zeros(4, np.int64)}, "wrong_dtype"),
    "booleans": ({"bias": np.zeros(4, bool)}, "wrong_dtype"),
    "complex": ({"bias": np.zeros(4, np.complex64)}, "wrong_dtype"),
    "float row ids": ({"table": (np.zeros(2), np.zeros((2, 3), np.float32))}, "wrong_dtype"),
    "rows of another width": ({"table": (np.array([0]), np.zeros((1, 2), np.float32))}, "wrong_shape"),
    "fewer rows than ids": ({"table": (np.array([0, 1]), np.zeros((1, 3), np.float32))}, "wrong_shape"),
    "rows of a scalar": ({"scale": (np.array([0]), np.zeros((1,), np.float32))}, "wrong_shape"),
    "row out of range": ({"table": (np.array([5]), np.zeros((1, 3), np.float32))}, "row_out_of_range"),
    "negative row": ({"table": (np.array([-1]), np.zeros((1, 3), np.float32))}, "row_out_of_range"),
    "nan": ({"bias": np.full(4, NAN, np.float32)}, "nonfinite_gradient"),
}


@pytest.mark.parametrize("case", BAD_HERE)
def test_bad_gradients_through_the_client(case: str, server: RunningServer, owner: Session) -> None:
    gradients, code = BAD_HERE[case]
    with untouched(server, MODEL), pytest.raises(PushstepError) as caught:
        owner.push(gradients)
    assert caught.value.code == code
    assert repr(next(iter(gradients))) in caught.value.message


def test_a_retry_is_applied_once_and_another_body_is_a_conflict(
    server: RunningServer, raw: RawWorker
) -> None:
    messages = raw.good()
    first = raw.push(messages).receipt
    with untouched(server, MODEL):
        again = raw.push(messages).receipt
        assert (again.version, again.identity, again.outcome) == (
            first.version,
            first.identity,
            first.outcome,
        )
        assert again.duplicates == 1
        header, *answer = raw.wire.answers("Exchange", messages)
        pulled = pb.PullResponse.FromString(header).header
        assert pulled.receipt.version == first.version
        assert pulled.segments
        assert answer
        assert raw.wire.refused("Push", raw.good(fill=2.0)).code == "conflict"
        sparse = rows([1])(raw)
        assert raw.wire.refused("Push", sparse).code == "conflict"
        assert raw.push(messages).receipt.duplicates == 3
    raw.advance()
    assert raw.push(raw.good()).receipt.version == first.version + 1


def test_receipts_are_kept_for_eight_sequences(server: RunningServer, raw: RawWorker) -> None:
    messages = []
    for _ in range(9):
        messages.append(raw.good())
        raw.push(messages[-1])
        raw.advance()
    with untouched(server, MODEL):
        assert raw.wire.refused("Push", messages[0]).code == "too_old"
        assert raw.push(messages[1]).receipt.identity.sequence == 2


def test_an_exchange_whose_answer_cannot_be_made_is_not_stepped(
    server: RunningServer, raw: RawWorker
) -> None:
    with untouched(server, MODEL):
        error = raw.wire.refused("Exchange", raw.good(pull=pb.PullOptions(dtype=77)))
    assert (error.code, error.consumed) == ("wrong_dtype", False)


@pytest.mark.parametrize("method", [*BULK_IN, *UNARY, *STREAMED_OUT])
def test_bytes_that_are_no_message(method: str, server: RunningServer, wire: Wire, owner: Session) -> None:
    draw = random.Random(method)
    samples = [b"\xff" * 40, b"\x0a\x02\xff\xfe", b"\x0a\xff\xff\xff\xff\x0f"]
    samples += [draw.randbytes(draw.randrange(1, 300)) for _ in range(25)]
    samples += [draw.randbytes(CHUNK_BYTES)]
    with untouched(server, MODEL):
        for sample in samples:
            # random bytes may be a message of unknown fields, which then names nothing that exists
            with contextlib.suppress(NotRefused):
                assert wire.refused(method, [sample]).code in (
                    "malformed_frame",
                    "unknown_model",
                    "invalid_name",
                )
        if method in UNARY or method in STREAMED_OUT:
            assert wire.refused(method, [samples[0]]).code == "malformed_frame"
    assert wire.refused("NoSuchMethod", [b""]).code == "malformed_frame"
