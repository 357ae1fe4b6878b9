"""A request for rows that is cut for ranks: each row is asked for once, in the rank that has it, and all come back as one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pushstep.client.shards.parts import Part
from pushstep.client.shards.rows import MOST_BYTES, JoinedRows, RowsCut
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import UnknownParameter
from pushstep.proto.types_pb2 import Manifest, Parameter, ParamGroup
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import ID_BYTES, Layout
from pushstep.proto.wire.shards import cut

FLOAT32 = dtypes.WIRE[torch.float32]
SHAPES = {
    "table": [3000, 32],
    "flat": [50_001],
    "empty": [0, 3],
    "thin": [9, 0],
    "small": [7, 700],
    "long": [2_000_000, 1],
}
WHOLE = Layout(
    Manifest(
        parameters=[Parameter(name=name, shape=shape, dtype=FLOAT32) for name, shape in SHAPES.items()],
        groups=[ParamGroup(rule="adagrad")],
    )
)


def parts_of(ranks: int) -> list[Part]:
    return [Part(each, WHOLE) for each in cut(WHOLE, ranks) if each is not None]


def asked(wanted: dict[str, Any]) -> pb.PullRowsRequest:
    selections = [
        pb.RowSelection(parameter=name, ids=np.int64(ids).tobytes()) for name, ids in wanted.items()
    ]
    return pb.PullRowsRequest(model="m", selections=selections, joined_chunks=True)


def named(request: pb.PullRowsRequest) -> dict[str, np.ndarray[Any, Any]]:
    found = {each.parameter: np.frombuffer(each.ids, np.int64) for each in request.selections}
    if request.parameter:
        found[request.parameter] = np.array(request.ids, np.int64)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_each_row_is_asked_for_where_it_lies(ranks: int) -> None:
    wanted: dict[str, Any] = {
        "table": np.arange(3000),
        "flat": np.arange(0, 50_001, 17),
        "small": [6],
        "thin": [0, 8],
        "empty": [],
    }
    made = RowsCut(asked(wanted), WHOLE, parts_of(ranks), 9)
    found: dict[str, list[int]] = {name: [] for name in wanted}
    for part, request in zip(made.parts, made.requests, strict=True):
        for name, ids in named(request).items():
            held = part.of[WHOLE.slot(name, "m").index]
            assert 0 <= ids.min() <= ids.max() < held.slot.rows
            found[name] += (ids + held.first_row).tolist()
        assert request.manifest_hash == part.layout.manifest_hash
        assert (request.model, request.map_version, request.joined_chunks) == ("m", 9, True)
    assert found == {name: list(ids) for name, ids in wanted.items()}
    assert len({request.read for request in made.requests}) == 1
    assert [list(request.ranks) for request in made.requests[1:]] == [[]] * (len(made.parts) - 1)


def test_only_ranks_with_rows_are_asked_and_rank_0() -> None:
    parts = parts_of(7)
    last = RowsCut(asked({"long": [1_999_999]}), WHOLE, parts, 9)
    assert [part.rank for part in last.parts] == [0, 6]
    assert list(last.requests[0].ranks) == [6]
    assert not named(last.requests[0])
    none = RowsCut(asked({"long": [], "table": []}), WHOLE, parts, 9)
    assert [part.rank for part in none.parts] == [0]
    assert not none.requests[0].ranks


def test_two_reads_have_two_numbers() -> None:
    cuts = [RowsCut(asked({"table": [0]}), WHOLE, parts_of(2), 9) for _ in range(2)]
    assert cuts[0].requests[0].read != cuts[1].requests[0].read


def test_many_ids_of_one_parameter_go_as_numbers() -> None:
    count = 2 * MOST_BYTES // ID_BYTES
    request = pb.PullRowsRequest(model="m", parameter="long", ids=range(500_000, 500_000 + count))
    found = RowsCut(request, WHOLE, parts_of(2), 9).requests
    assert [bool(each.parameter) for each in found] == [True, False]
    assert sum(len(ids) for each in found for ids in named(each).values()) == count


def test_a_parameter_that_there_is_not() -> None:
    with pytest.raises(UnknownParameter):
        RowsCut(asked({"nothing": [0]}), WHOLE, parts_of(2), 9)


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_no_rows_have_the_shape_and_dtype_of_some(dtype: str) -> None:
    wire = dtypes.BY_NAME[dtype] if dtype else torch.float32
    number = int(dtypes.WIRE[wire]) if dtype else 0
    made = JoinedRows(pb.PullHeader(), WHOLE, None, [], [WHOLE.slot("table", "m")], number)
    ((slot, ids, rows),) = made.rows()
    assert (slot.name, ids.numel(), rows.shape, rows.dtype) == ("table", 0, (0, 32), wire)
