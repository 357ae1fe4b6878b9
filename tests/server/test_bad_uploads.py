"""Joins and uploads that should not be: no model appears, none changes, and the next caller is served."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pushstep.client import Session
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import PushstepError
from pushstep.proto.types_pb2 import (
    DType,
    GroupValues,
    Hyperparameter,
    Manifest,
    Parameter,
    ParamGroup,
    Segment,
)
from pushstep.proto.wire.frames import Piece, pack
from tests.support.servers.harness import RunningServer, running_server
from tests.support.servers.operators import all_models
from tests.support.workers.wire import GROUPS, PARAMETERS, RawWorker, Wire, created, untouched

MODEL = "bad-uploads"
F32 = DType.DTYPE_FLOAT32
_numbers = itertools.count()


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
    return RawWorker(wire, MODEL, f"raw-{next(_numbers)}")


def small(shape: Sequence[int] = (2, 3), rule: str = "adadelta", name: str = "w", **values: Any) -> Manifest:
    hyperparameters = {
        key: Hyperparameter(flag=v) if isinstance(v, bool) else Hyperparameter(number=v)
        for key, v in values.items()
    }
    return Manifest(
        parameters=[Parameter(name=name, shape=shape, dtype=F32)],
        groups=[ParamGroup(rule=rule, values=hyperparameters)],
    )


def ask(wire: Wire, model: str, worker: str = "w", **fields: Any) -> pb.JoinResponse:
    request = pb.JoinRequest(model=model, worker=worker, **fields)
    (answer,) = wire.answers("Join", [request.SerializeToString()])
    return pb.JoinResponse.FromString(answer)


def refused_join(wire: Wire, model: str, worker: str = "w", **fields: Any) -> PushstepError:
    return wire.refused("Join", [pb.JoinRequest(model=model, worker=worker, **fields).SerializeToString()])


def body(header: pb.UploadHeader, *values: Tensor) -> list[bytes]:
    frames = pack([[Piece(value, value.dtype)] for value in values])
    return [pb.UploadRequest(header=header).SerializeToString(), *frames]


def models(server: RunningServer) -> list[str]:
    return [model["name"] for model in all_models(server)]


NAMES = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "a\\b",
    "-a",
    ".hidden",
    "_x",
    "a b",
    "a\n",
    "ä",
    "x" * 101,
    "a\0",
    "%2e%2e",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_hostile_names(name: str, server: RunningServer, wire: Wire) -> None:
    """They become folders and paths of URLs."""

    def folders() -> set[Path]:
        return {*server.data.glob("*"), *server.data.glob("*/*")}

    before = folders()
    for error in (
        refused_join(wire, name, manifest=small()),
        refused_join(wire, "good", worker=name, manifest=small()),
    ):
        assert error.code in ("invalid_name", "invalid_text", "too_long")
        assert error.code != "invalid_name" or "letters" in error.message
    assert name not in models(server)
    assert "good" not in models(server)
    assert folders() == before


MANIFESTS: dict[str, tuple[Manifest, str]] = {
    "empty": (Manifest(), "unknown_model"),
    "no parameters": (Manifest(groups=[ParamGroup(rule="adadelta")]), "invalid_manifest"),
    "no groups": (Manifest(parameters=[Parameter(name="w", shape=[1], dtype=F32)]), "invalid_manifest"),
    "a group without parameters": (
        Manifest(parameters=small().parameters, groups=[ParamGroup(rule="adadelta")] * 2),
        "invalid_manifest",
    ),
    "an unknown rule": (small(rule="sgd"), "invalid_manifest"),
    "no dtype": (Manifest(parameters=[Parameter(name="w")], groups=small().groups), "wrong_dtype"),
    "a negative lr": (small(lr=-1.0), "invalid_hyperparameter"),
    "an infinite lr": (small(lr=float("inf")), "number_out_of_range"),
    "an lr that float32 cannot hold": (small(lr=1e300), "number_out_of_range"),
    "a NaN rho": (small(rho=float("nan")), "number_out_of_range"),
    "a flag for a number": (small(lr=True), "invalid_hyperparameter"),
    "a number for a flag": (small(maximize=1.0), "invalid_hyperparameter"),
    "an unknown hyperparameter": (small(momentum=0.9), "invalid_hyperparameter"),
    "petabytes": (small([2**47]), "over_capacity"),
    "a shape that overflows": (small([2**63, 2]), "number_out_of_range"),
    "a shape whose product overflows": (small([2**40, 2**40]), "invalid_manifest"),
    "a shape that hides behind a zero": (small([0, 2**40, 2**40]), "invalid_manifest"),
    "a shape of many lengths": (small([1] * 17), "too_long"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_hostile_manifests(case: str, server: RunningServer, wire: Wire) -> None:
    manifest, code = MANIFESTS[case]
    name = f"hostile-{next(_numbers)}"
    error = refused_join(wire, name, manifest=manifest if manifest.ByteSize() else None)
    assert error.code == code, error.message
    assert name not in models(server)
    ask(wire, name, manifest=small())  # nothing is in the way of a good one


def test_join_under_a_live_name(server: RunningServer, raw: RawWorker) -> None:
    worker = raw.member.identity.worker
    with untouched(server, MODEL):
        error = refused_join(raw.wire, MODEL, worker)
        assert error.code == "already_joined"
        assert error.retry_after_s is not None
        assert 0 < error.retry_after_s <= 30
        assert refused_join(raw.wire, MODEL, worker, model_uid=b"another").code == "model_lost"
        assert refused_join(raw.wire, "nobody", worker, model_uid=b"another").code == "model_lost"
        assert refused_join(raw.wire, "nobody", worker).code == "unknown_model"
    assert raw.push(raw.good()).receipt.lead is False  # the one who has the name keeps it


DIFFERENT: dict[str, tuple[Callable[[dict[str, Any], list[dict[str, Any]]], Any], str]] = {
    "shape": (lambda p, g: p.update(bias=np.zeros(5, np.float32)), "'bias' (4,)"),
    "dtype": (lambda p, g: p.update(bias=np.zeros(4, np.float64)), "float64"),
    "one more": (lambda p, g: (p.update(new=np.zeros(1, np.float32)), g[1]["params"].append("new")), "'new'"),
    "one fewer": (lambda p, g: p.pop(g[1]["params"].pop()), "'scale'"),
    "order": (lambda p, g: g[1]["params"].reverse(), "parameter 1"),
    "rule": (lambda p, g: g[0].update(rule="adadelta"), "group 0: the server has adagrad"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_join_with_another_model(case: str, server: RunningServer, owner: Session) -> None:
    change, words = DIFFERENT[case]
    parameters = dict(PARAMETERS)
    groups = [{**group, "params": list(group["params"])} for group in GROUPS]  # type: ignore[call-overload]
    change(parameters, groups)
    session = server.connect(MODEL, f"raw-{next(_numbers)}")
    with untouched(server, MODEL), pytest.raises(PushstepError) as caught:
        session.create(parameters, groups)
    assert caught.value.code == "manifest_mismatch"
    assert words in caught.value.message


def test_a_creation_that_breaks_off_leaves_room_for_the_next(server: RunningServer, wire: Wire) -> None:
    name = f"broken-{next(_numbers)}"
    ticket = ask(wire, name, "first", manifest=small()).create
    assert refused_join(wire, name, "second", manifest=small()).code == "being_created"
    whole = Segment(stop=6, dtype=F32)
    fields = {"model": name, "kind": pb.UPLOAD_KIND_CREATE}
    for header, code in (
        (pb.UploadHeader(**fields, ticket=ticket.ticket + 1, segments=[whole]), "no_creation_ticket"),
        (pb.UploadHeader(**fields, segments=[whole]), "no_creation_ticket"),
        (
            pb.UploadHeader(model="other", kind=pb.UPLOAD_KIND_CREATE, ticket=ticket.ticket),
            "no_creation_ticket",
        ),
        (pb.UploadHeader(model=MODEL + "x", kind=pb.UPLOAD_KIND_PARAMETERS), "unknown_model"),
        (pb.UploadHeader(**{**fields, "kind": 99}), "malformed_frame"),
        (pb.UploadHeader(model=name), "malformed_frame"),
    ):
        assert wire.refused("Upload", body(header, torch.zeros(6))).code == code
    assert refused_join(wire, name, "second", manifest=small()).code == "being_created"
    short = pb.UploadHeader(**fields, ticket=ticket.ticket, segments=[whole])
    assert wire.refused("Upload", body(short, torch.zeros(5))).code == "wrong_length"
    assert name not in models(server)
    second = ask(wire, name, "second", manifest=small()).create
    good = pb.UploadHeader(**fields, ticket=second.ticket, segments=[whole])
    (answer,) = wire.answers("Upload", body(good, torch.arange(6.0)))
    assert pb.UploadResponse.FromString(answer).member.identity.worker == "second"
    assert wire.refused("Upload", body(good, torch.zeros(6))).code == "model_exists"
    assert server.connect(name).pull()["w"].ravel().tolist() == [0, 1, 2, 3, 4, 5]


def segment(start: int, stop: int, arena: int = 1, dtype: int = F32, **more: Any) -> Segment:
    return Segment(arena=arena, start=start, stop=stop, dtype=dtype, **more)


P, S, G, X = (
    pb.UPLOAD_KIND_PARAMETERS,
    pb.UPLOAD_KIND_STATE,
    pb.UPLOAD_KIND_GROUP,
    pb.UPLOAD_KIND_EXTRAS,
)
GROWN = small([2], "adagrad", "new")
# name: (the header's fields, what it carries, the code)
UPLOADS: dict[str, tuple[dict[str, Any], list[Tensor], str]] = {
    "another dtype": (
        {"kind": P, "segments": [segment(8, 12, dtype=2)]},
        [torch.zeros(4).double()],
        "wrong_dtype",
    ),
    "rows": ({"kind": P, "segments": [segment(0, 15, 0, rows=1)]}, [torch.zeros(5)], "malformed_frame"),
    "not on borders": ({"kind": P, "segments": [segment(8, 11)]}, [torch.zeros(3)], "malformed_frame"),
    "twice": ({"kind": P, "segments": [segment(8, 12)] * 2}, [torch.zeros(4)] * 2, "malformed_frame"),
    "too short": ({"kind": P, "segments": [segment(8, 12)]}, [torch.zeros(3)], "wrong_length"),
    "too long": ({"kind": P, "segments": [segment(8, 12)]}, [torch.zeros(5)], "wrong_length"),
    "stale manifest": (
        {"kind": P, "segments": [segment(8, 12)], "manifest_hash": 1},
        [torch.zeros(4)],
        "manifest_changed",
    ),
    "a state of another rule": (
        {"kind": S, "segments": [segment(8, 12, state="sum")]},
        [torch.zeros(4)],
        "malformed_frame",
    ),
    "a state of nobody": (
        {"kind": S, "segments": [segment(8, 12, state="../x")]},
        [torch.zeros(4)],
        "malformed_frame",
    ),
    "state with parameters over live workers": (
        {"kind": S, "segments": [segment(8, 12)]},
        [torch.zeros(4)],
        "other_workers_live",
    ),
    "state over live workers": (
        {"kind": S, "segments": [segment(8, 12, state="acc_delta")]},
        [torch.zeros(4)],
        "other_workers_live",
    ),
    "too few steps": ({"kind": S, "steps": [1, 2], "force": True}, [], "wrong_length"),
    "values of an unknown group": (
        {"kind": S, "groups": [GroupValues(group=2)], "force": True},
        [],
        "unknown_group",
    ),
    "values that the rule refuses": (
        {"kind": S, "groups": [GroupValues(values={"lr": Hyperparameter(number=-1)})], "force": True},
        [],
        "invalid_hyperparameter",
    ),
    "a group with a name that is taken": (
        {"kind": G, "manifest": small(name="bias")},
        [],
        "invalid_manifest",
    ),
    "a group of an unknown rule": (
        {"kind": G, "manifest": small([2], "sgd", "new"), "segments": [segment(0, 2, 2)]},
        [torch.zeros(2)],
        "invalid_manifest",
    ),
    "a group without its values": ({"kind": G, "manifest": GROWN}, [], "invalid_manifest"),
    "a group that overwrites others": (
        {"kind": G, "manifest": GROWN, "segments": [segment(0, 2, 2), segment(8, 12)]},
        [torch.zeros(2), torch.full((4,), 9.0)],
        "invalid_manifest",
    ),
    "a group that overwrites state": (
        {"kind": G, "manifest": GROWN, "segments": [segment(0, 2, 2), segment(8, 12, state="acc_delta")]},
        [torch.zeros(2), torch.full((4,), 9.0)],
        "invalid_manifest",
    ),
    "extras that are no file": ({"kind": X, "extras_bytes": 16}, [torch.zeros(4)], "malformed_frame"),
    "extras of no length": ({"kind": X}, [], "malformed_frame"),
    "extras without end": ({"kind": X, "extras_bytes": 2**47}, [], "over_capacity"),
    "extras with segments": (
        {"kind": X, "extras_bytes": 16, "segments": [segment(8, 12)]},
        [torch.zeros(4)],
        "malformed_frame",
    ),
}


@pytest.mark.parametrize("case", UPLOADS)
def test_bad_upload(case: str, server: RunningServer, raw: RawWorker) -> None:
    fields, values, code = UPLOADS[case]
    header = pb.UploadHeader(
        **{"model": MODEL, "identity": raw.identity(), "manifest_hash": raw.layout.manifest_hash, **fields}
    )
    with untouched(server, MODEL):
        error = raw.wire.refused("Upload", body(header, *values))
        assert error.code == code, error.message
    for change in ({"epoch": 0}, {"timeline": 9}, {"model_uid": b"x"}, {"worker": "nobody"}):
        header.identity.CopyFrom(raw.identity(**change))
        with untouched(server, MODEL):
            assert raw.wire.refused("Upload", body(header, *values)).code in (
                "fenced",
                "superseded",
                "model_lost",
                "unknown_worker",
            )
    assert raw.push(raw.good()).receipt.identity == raw.identity()


@pytest.mark.parametrize("limit", ["models", "bytes"])
def test_limits_hold_for_creations_under_way(limit: str, data: Path) -> None:
    """Two that both fit alone do not fit together: whose values are there first has the place."""
    options = {"models": ("--max-models", "1"), "bytes": ("--max-bytes", "1500")}[limit]
    with running_server(data, *options) as server:
        wire = Wire(server.grpc)
        first, other = (ask(wire, name, manifest=small()).create for name in "ab")
        ask(wire, "a", manifest=small())  # the same worker may ask again
        ticket = ask(wire, "a", manifest=small()).create.ticket
        fields = {"kind": pb.UPLOAD_KIND_CREATE, "segments": [Segment(stop=6, dtype=F32)]}
        stale = pb.UploadHeader(**fields, model="a", ticket=first.ticket)
        assert wire.refused("Upload", body(stale, torch.zeros(6))).code == "no_creation_ticket"
        wire.answers("Upload", body(pb.UploadHeader(**fields, model="a", ticket=ticket), torch.zeros(6)))
        late = pb.UploadHeader(**fields, model="b", ticket=other.ticket)
        assert wire.refused("Upload", body(late, torch.zeros(6))).code == "over_capacity"
        assert refused_join(wire, "b", manifest=small()).code == "over_capacity"
        assert models(server) == ["a"]
        assert server.rest("DELETE", "/v1/models/a").status_code == 204
        assert ask(wire, "b", manifest=small()).create.ticket
        wire.close()
