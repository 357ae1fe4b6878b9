"""Reads, heartbeats and edits that should not be; and two that are good, but not both at once."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from pushstep.client import Session
from pushstep.proto import training_pb2 as pb
from pushstep.proto.types_pb2 import DType, Hyperparameter, Manifest, Parameter, ParamGroup, Segment
from pushstep.proto.wire.frames import Piece, pack
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.workers.wire import RawWorker, Wire, created, named, untouched

MODEL = "bad-calls"
_workers = itertools.count()


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


def rows(**fields: Any) -> pb.PullRowsRequest:
    return pb.PullRowsRequest(**{"model": MODEL, "parameter": "table", **fields})


READS: dict[str, tuple[str, Any, str]] = {
    "pull an unknown model": ("Pull", pb.PullRequest(model="nobody"), "unknown_model"),
    "pull in an unknown dtype": (
        "Pull",
        pb.PullRequest(model=MODEL, options=pb.PullOptions(dtype=9)),  # type: ignore[arg-type]
        "wrong_dtype",
    ),
    "state of an unknown model": ("PullState", pb.PullStateRequest(model="nobody"), "unknown_model"),
    "rows of an unknown model": ("PullRows", rows(model="nobody"), "unknown_model"),
    "rows of an unknown parameter": ("PullRows", rows(parameter="../table"), "unknown_parameter"),
    "rows of nothing": ("PullRows", rows(parameter="", ids=[0]), "unknown_parameter"),
    "rows that other servers have": ("PullRows", rows(ids=[0], read=5, ranks=[1]), "malformed_frame"),
    "rows by a map": ("PullRows", rows(ids=[0], map_version=5), "map_changed"),
    "rows of a scalar": ("PullRows", rows(parameter="scale"), "wrong_shape"),
    "a row of a scalar": ("PullRows", rows(parameter="scale", ids=[0]), "wrong_shape"),
    "the row after the last": ("PullRows", rows(ids=[0, 5]), "row_out_of_range"),
    "row -1": ("PullRows", rows(ids=[2**64 - 1]), "row_out_of_range"),
    "rows in an unknown dtype": ("PullRows", rows(ids=[0], dtype=9), "wrong_dtype"),
}


@pytest.mark.parametrize("case", READS)
def test_bad_read(case: str, server: RunningServer, wire: Wire, owner: Session) -> None:
    method, request, code = READS[case]
    with untouched(server, MODEL):
        assert wire.refused(method, [request.SerializeToString()]).code == code


def test_rows_as_asked_for(wire: Wire, owner: Session) -> None:
    """However many, also none, and also the same one twice."""
    whole = owner.pull()["table"]
    for ids in ([], [4], [3, 3, 0], list(range(5)) * 7):
        first, *frames = wire.answers("PullRows", [rows(ids=ids).SerializeToString()])
        (segment,) = pb.PullResponse.FromString(first).header.segments
        assert segment.HasField("rows")
        assert segment.rows == len(ids)
        payload = b"".join(pb.PullResponse.FromString(frame).payload for frame in frames)
        assert payload[8 * len(ids) :] == whole[ids].tobytes()


IDENTITIES = [
    ({"model_uid": b"x"}, "model_lost"),
    ({"timeline": 2}, "superseded"),
    ({"worker": "nobody"}, "unknown_worker"),
    ({"epoch": 9}, "unknown_worker"),
    ({"epoch": 0}, "fenced"),
]


@pytest.mark.parametrize(("change", "code"), IDENTITIES, ids=lambda v: v if isinstance(v, str) else None)
def test_another_identity(change: dict[str, Any], code: str, server: RunningServer, raw: RawWorker) -> None:
    identity = raw.identity(**change)
    heartbeat = pb.HeartbeatRequest(model=MODEL, identity=identity)
    pull = pb.PullRequest(model=MODEL, identity=identity)
    leave = pb.LeaveRequest(model=MODEL, identity=identity)
    with untouched(server, MODEL):
        assert raw.wire.refused("Heartbeat", [heartbeat.SerializeToString()]).code == code
        assert raw.wire.refused("Pull", [pull.SerializeToString()]).code == code
        if code != "superseded":  # (an epoch is of one timeline: it ends itself)
            raw.wire.answers("Leave", [leave.SerializeToString()])  # of somebody else: it ends nothing
    assert raw.push(raw.good()).receipt.identity == raw.identity()


EDITS: dict[str, tuple[int, dict[str, Hyperparameter], str]] = {
    "of an unknown group": (2, {"lr": Hyperparameter(number=1)}, "unknown_group"),
    "of an unknown name": (1, {"momentum": Hyperparameter(number=1)}, "invalid_hyperparameter"),
    "negative": (1, {"lr": Hyperparameter(number=-1)}, "invalid_hyperparameter"),
    "NaN": (1, {"lr": Hyperparameter(number=float("nan"))}, "number_out_of_range"),
    "beyond float32": (1, {"lr": Hyperparameter(number=1e300)}, "number_out_of_range"),
    "a flag for a number": (1, {"lr": Hyperparameter(flag=True)}, "invalid_hyperparameter"),
    "a number for a flag": (1, {"maximize": Hyperparameter(number=1)}, "invalid_hyperparameter"),
    "one good, one bad": (
        1,
        {"lr": Hyperparameter(number=0.1), "rho": Hyperparameter(number=7)},
        "invalid_hyperparameter",
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_bad_edit_of_the_lead(case: str, server: RunningServer, wire: Wire, model_name: str) -> None:
    group, values, code = EDITS[case]
    created(server, model_name).close()
    lead = RawWorker(wire, model_name)
    assert lead.member.lead
    edits = [pb.GroupEdit(group=group, values=values)]
    with untouched(server, model_name):
        error = wire.refused("Push", lead.good(edits=edits))
        # what no model could take is refused before the push is anybody's
        consumed = code != "number_out_of_range"
        assert (error.code, error.consumed) == (code, consumed)
    lead.advance(consumed)
    assert lead.push(lead.good()).receipt.groups[1].values["lr"].number == 1.0


def test_edits_of_others_are_ignored_whatever_they_are(server: RunningServer, raw: RawWorker) -> None:
    edits = [pb.GroupEdit(group=1, values=EDITS["negative"][1])]
    receipt = raw.push(raw.good(edits=edits)).receipt
    assert list(receipt.ignored_edits) == ["1.lr"]
    assert receipt.groups[1].values["lr"].number == 1.0


def group_upload(raw: RawWorker, name: str) -> tuple[bytes, list[bytes]]:
    """The header and body of an upload that adds a group of one parameter."""
    added = Manifest(
        parameters=[Parameter(name=name, shape=[2], dtype=DType.DTYPE_FLOAT32)],
        groups=[ParamGroup(rule="adagrad")],
    )
    header = pb.UploadHeader(
        model=raw.model,
        kind=pb.UPLOAD_KIND_GROUP,
        identity=raw.identity(),
        manifest=added,
        segments=[Segment(arena=2, stop=2, dtype=DType.DTYPE_FLOAT32)],
    )
    body = pack([[Piece(torch.full((2,), 7.0), torch.float32)]])
    return pb.UploadRequest(header=header).SerializeToString(), list(body)


def test_a_push_in_doubt_over_an_added_group_is_not_applied_again(
    server: RunningServer, wire: Wire, model_name: str
) -> None:
    """Its answer was lost, and by its retry the manifest is another: the receipt settles it."""
    created(server, model_name)
    session = server.connect(model_name, "joined")  # which takes the model as it is, and as it becomes
    gradient = {"bias": np.ones(4, np.float32)}
    first = session.push(gradient)
    other = RawWorker(wire, model_name, "other")
    header, body = group_upload(other, "new")
    wire.answers("Upload", [header, *body])
    session.member().sequence -= 1  # as if the answer had never come
    assert session.push(gradient).version == first.version
    assert server.rest("GET", f"/v1/models/{model_name}").json()["version"] == first.version
    assert session.push(gradient).version == first.version + 1


def test_of_two_groups_added_at_once_one_must_come_again(
    server: RunningServer, wire: Wire, model_name: str
) -> None:
    """Both were laid out for the same place."""
    created(server, model_name)
    slow = RawWorker(wire, model_name, "slow")
    begun_s = time.monotonic()
    fast = RawWorker(wire, model_name, "fast")
    assert server.rest("GET", "/healthz").status_code == 200
    messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    header, body = group_upload(slow, "mine")
    messages.put(header)
    messages.put(body[0])
    held = wire.start("Upload", iter(messages.get, None))

    def header_is_there() -> bool:  # seen later than the worker's join, by more than is rounded away
        elapsed_s = time.monotonic() - begun_s
        workers = server.rest("GET", f"/v1/models/{model_name}/workers").json()["workers"]
        (seen_s,) = (worker["last_seen_s"] for worker in workers if worker["name"] == "slow")
        return bool(seen_s < elapsed_s - 0.002)

    wait_until(header_is_there)
    header, body = group_upload(fast, "yours")
    wire.answers("Upload", [header, *body])
    messages.put(None)
    with pytest.raises(grpc.RpcError) as caught:
        list(held)
    assert named(caught.value).code == "manifest_changed"
    shown = server.rest("GET", f"/v1/models/{model_name}/parameters").json()["parameters"]
    assert [parameter["name"] for parameter in shown] == ["table", "weight", "bias", "scale", "yours"]
    pulled = server.connect(model_name, "reader").pull()
    assert pulled["yours"].tolist() == [7, 7]
    assert pulled["scale"].shape == ()
