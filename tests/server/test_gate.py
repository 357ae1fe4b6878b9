"""The gate and the policy as functions: what a push is found to be, and what is decided about it."""

from __future__ import annotations

import asyncio
import gc
import math
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pushstep.proto.errors import (
    MalformedFrame,
    NonfiniteGradient,
    RowOutOfRange,
    SparseNotSupported,
)
from pushstep.proto.training_pb2 import PushCommit, PushHeader, PushRequest
from pushstep.proto.types_pb2 import DType, Identity, Manifest, Parameter, ParamGroup, Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.buffers import BufferPool
from pushstep.proto.wire.frames import Assembly, BodyDigest, Piece, pack, unpack
from pushstep.proto.wire.layout import Layout
from pushstep.server.config import Config
from pushstep.server.coordinator.gate import Gate, Nonfinite, decide
from pushstep.server.coordinator.groups import Group, ParamGroups
from pushstep.server.coordinator.hooks.chain import HookChain
from pushstep.server.models.catalog import Catalog
from pushstep.server.models.model import Model
from pushstep.server.requests.push import answer, hand_in
from pushstep.server.requests.push_call import PushCall
from pushstep.server.requests.push_header import check_header
from pushstep.server.requests.receiving import admit
from pushstep.server.staging.gradient import DensePart, RowsPart, StagedPush
from pushstep.server.staging.inspect import inspect

NAN, INF = float("nan"), float("inf")
LAYOUT = Layout(
    Manifest(
        parameters=[
            Parameter(name="table", shape=[6, 2], dtype=DType.DTYPE_FLOAT32),
            Parameter(name="weight", shape=[3], dtype=DType.DTYPE_FLOAT32),
            Parameter(name="half", shape=[2], dtype=DType.DTYPE_BFLOAT16),
            Parameter(name="wide", shape=[2], dtype=DType.DTYPE_FLOAT64),
        ],
        groups=[ParamGroup(rule="adagrad")],
    )
)


def groups(**values: float) -> ParamGroups:
    group = Group.make(ParamGroup(rule="adagrad"))
    group.values.update(values)
    return ParamGroups([group])


def inspected(*pieces: tuple[str, Tensor] | tuple[str, Tensor, Tensor]) -> StagedPush:
    """What the gate finds in a push of (name, dense gradient) or (name, ids, rows)."""
    segments, bodies = [], []
    for name, *tensors in pieces:
        ((segment, _),) = LAYOUT.dense_segments([LAYOUT.slot(name, "m")])
        segment.dtype = dtypes.to_wire(tensors[-1].dtype, "segment")
        if len(tensors) == 2:
            segment.rows = len(tensors[0])
        segments.append(segment)
        bodies.append([Piece(tensor, tensor.dtype) for tensor in tensors])
    header = PushHeader(manifest_hash=LAYOUT.manifest_hash, segments=segments, identity=Identity(worker="w"))
    body = Assembly(check_header(LAYOUT, header, "m", 1 << 20), BodyDigest(segments))
    for frame in pack(bodies):
        chunk = unpack(frame, PushRequest)[1]
        assert chunk is not None
        body.place(chunk)
    body.finish()
    return inspect(
        header, [LAYOUT.slots_of(segment) for segment in header.segments], body, BufferPool(0).take
    )


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def test_a_good_push_is_found_out_whole() -> None:
    push = inspected(("weight", torch.tensor([1.0, 2.0, 2.0])), ("table", ids(1, 4), torch.full((2, 2), 0.5)))
    dense, sparse = push.parts
    assert isinstance(dense, DensePart)
    assert isinstance(sparse, RowsPart)
    assert dense.gradient.tolist() == [1, 2, 2]
    assert sparse.ids.tolist() == [1, 4]
    assert (push.parameters, push.norm) == (2, math.sqrt(10))
    assert push.nonfinite_parameter is None


def test_duplicate_rows_are_summed_before_anything_is_measured() -> None:
    push = inspected(("table", ids(3, 1, 3), torch.tensor([[1.0, 2.0], [5.0, 5.0], [2.0, 2.0]])))
    (part,) = push.parts
    assert isinstance(part, RowsPart)
    assert part.ids.tolist() == [1, 3]
    assert part.rows.tolist() == [[5, 5], [3, 4]]
    assert push.norm == math.sqrt(75)


def test_no_rows_are_a_gradient_of_nothing() -> None:
    push = inspected(("table", ids(), torch.empty(0, 2)))
    assert push.nonfinite_parameter is None
    assert push.norm == 0


@pytest.mark.parametrize("wrong", [6, -1, 2**63 - 1, -(2**63)])
def test_rows_out_of_range_are_named(wrong: int) -> None:
    with pytest.raises(RowOutOfRange) as caught:
        inspected(("table", ids(0, wrong, 5), torch.zeros(3, 2)))
    assert caught.value.fields == {"row": str(wrong), "parameter": "table", "rows": "6"}


FINITE = [
    ("weight", torch.tensor([0.0, 3.4e38, -3.4e38])),
    ("weight", torch.tensor([1e-45, 0.0, 0.0])),
    ("weight", torch.tensor([1e200, 3.4e38, 0.0], dtype=torch.float64).clamp(max=3e38)),
    ("half", torch.tensor([3.3e38, 1.0], dtype=torch.bfloat16)),
    ("half", torch.tensor([3.3e38, 1.0])),
    ("wide", torch.tensor([1e308, -1e308], dtype=torch.float64)),
]
NONFINITE = [
    ("weight", torch.tensor([0.0, NAN, 0.0])),
    ("weight", torch.tensor([0.0, 0.0, INF])),
    ("weight", torch.tensor([-INF, 0.0, 0.0], dtype=torch.float16)),
    ("weight", torch.tensor([0.0, 0.0, 1e39], dtype=torch.float64)),
    ("half", torch.tensor([0.0, -1e39], dtype=torch.float64)),
    ("wide", torch.tensor([0.0, NAN])),
    ("table", ids(2), torch.tensor([[0.0, NAN]])),
    ("table", ids(2, 2), torch.tensor([[3e38, 0.0], [3e38, 0.0]])),
]


@pytest.mark.parametrize("piece", FINITE)
def test_large_numbers_are_finite(piece: tuple[str, Tensor]) -> None:
    assert decide(inspected(piece), Nonfinite.REJECT)


@pytest.mark.parametrize("piece", NONFINITE)
def test_nonfinite_is_decided_by_the_setting(piece: tuple[str, Tensor]) -> None:
    """Also what only becomes infinite in the dtype that is stepped, or in a sum of duplicates."""
    good = ("wide", torch.zeros(2)) if piece[0] == "weight" else ("weight", torch.zeros(3))
    push = inspected(good, piece)
    assert push.nonfinite_parameter == piece[0]
    with pytest.raises(NonfiniteGradient) as caught:
        decide(push, Nonfinite.REJECT)
    assert caught.value.fields["parameter"] == piece[0]
    assert decide(push, Nonfinite.SKIP) is False
    assert decide(push, Nonfinite.APPLY) is True


@pytest.mark.parametrize(
    ("rule", "held", "planned", "allowed"),
    [
        ("adagrad", 0.0, {}, True),
        ("adagrad", 0.1, {}, False),
        ("adagrad", 0.0, {"weight_decay": 0.1}, False),
        ("adagrad", 0.1, {"weight_decay": 0.0}, True),
        ("adadelta", 0.1, {}, True),  # its rows decay when they are stepped
        ("adadelta", 0.0, {"weight_decay": 0.1}, True),
    ],
)
def test_the_values_that_a_step_is_planned_with_decide(
    rule: str, held: float, planned: dict[str, float], allowed: bool
) -> None:
    """Not those that the group has: a push brings its worker's edits along."""
    group = Group.make(ParamGroup(rule=rule))
    group.values["weight_decay"] = held
    edits = {0: group.changed(planned)} if planned else {}
    rows = inspected(("table", ids(2), torch.full((1, 2), NAN)))
    if allowed:
        ParamGroups([group]).require_steppable(rows, edits)
    else:
        with pytest.raises(SparseNotSupported, match="weight_decay"):
            ParamGroups([group]).require_steppable(rows, edits)
    ParamGroups([group]).require_steppable(inspected(("table", torch.ones(6, 2))), edits)


@pytest.mark.parametrize(
    ("wishes", "setting"),
    [([], "reject"), (["skip"], "skip"), (["skip", "apply"], "apply"), (["apply", "reject"], "reject")],
)
def test_the_last_finite_guard_sets_nonfinite(wishes: Sequence[str], setting: str) -> None:
    chain = HookChain()
    for wish in wishes:
        chain.add("finite_guard", "step_pre", {"action": wish}, groups(), "m")
    assert Gate().nonfinite(chain.nonfinite()) is Nonfinite(setting)
    for hook in list(chain.list):
        chain.remove(hook.hook_id, groups(), "m")
    assert chain.nonfinite() is None


def test_a_header_is_refused_before_its_body() -> None:
    segment = Segment(arena=0, start=0, stop=15, dtype=DType.DTYPE_FLOAT32)
    good = PushHeader(manifest_hash=LAYOUT.manifest_hash, segments=[segment])
    assert check_header(LAYOUT, good, "m", 60) == [60]
    skip = PushHeader(manifest_hash=LAYOUT.manifest_hash, skip=True)
    assert check_header(LAYOUT, skip, "m", 60) == []
    for change in (
        {"segments": []},
        {"skip": True},
        {"segments": [Segment(stop=15, dtype=1, state="sum")]},
    ):
        header = PushHeader(**{"manifest_hash": LAYOUT.manifest_hash, "segments": [segment], **change})
        with pytest.raises(MalformedFrame):
            check_header(LAYOUT, header, "m", 60)


def test_a_gradient_norm_may_overflow_where_its_elements_do_not() -> None:
    push = inspected(("wide", torch.tensor([1e308, 1e308], dtype=torch.float64)))
    assert math.isinf(push.norm)
    assert push.nonfinite_parameter is None


def test_a_stored_verdict_does_not_hold_on_to_the_body(data: Path) -> None:
    """Eight refused pushes per worker are kept; what they carried is not, since no budget counts it any more."""

    async def refused() -> tuple[Model, weakref.ref[Assembly]]:
        model = Catalog(Config(data=data)).new_model("m", LAYOUT)
        worker = model.sessions.join("w", time.monotonic(), takeover=False)
        segment = Segment(arena=0, start=12, stop=15, dtype=DType.DTYPE_FLOAT32)
        identity = Identity(model_uid=model.uid, timeline=1, worker="w", epoch=worker.epoch, sequence=1)
        header = PushHeader(identity=identity, manifest_hash=LAYOUT.manifest_hash, segments=[segment])
        for _ in range(2):  # the retry is answered with the stored verdict
            receiving = await admit(PushCall(model, header))
            (frame,) = pack([[Piece(torch.full((3,), NAN), torch.float32)]])
            chunk = unpack(frame, PushRequest)[1]
            assert chunk is not None
            assert receiving.take(chunk) is None  # small: done at once
            await hand_in(receiving, PushCommit())
            with pytest.raises(NonfiniteGradient):
                await answer(receiving.call)
            receiving.release()
        body = weakref.ref(receiving._body)
        await model.close()
        return model, body

    model, body = asyncio.run(refused())
    gc.collect()
    (decided,) = model.sessions.workers["w"].decided_pushes
    assert isinstance(decided.error, NonfiniteGradient)
    assert decided.receipt.duplicates == 1
    assert body() is None
