"""The event loop turns whatever one caller asks for: nothing that grows with a request is done on it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

import pytest
import torch

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import PushstepError
from pushstep.proto.types_pb2 import DType, Manifest, Segment
from pushstep.proto.wire.layout import MAX_DIMENSIONS, MAX_GROUPS
from pushstep.server.operator_door.app import MAX_BODY_BYTES
from tests.support.servers.harness import WATCHED, RunningServer, running_server
from tests.support.servers.operators import add_hook, patch_group, remove_hook, set_policy
from tests.support.servers.watched_server import TOLD
from tests.support.workers.wire import RawWorker, Wire, created

F32 = DType.DTYPE_FLOAT32
MODEL = "honest"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that has no kernel compiled but those that it warms up."""
    folder = tmp_path_factory.mktemp("watched")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "kernels")}
    with running_server(folder / "data", command=WATCHED, environment=environment) as running:
        created(running, MODEL)
        yield running


@pytest.fixture
def wire(watched: RunningServer) -> Iterator[Wire]:
    opened = Wire(watched.grpc)
    yield opened
    opened.close()


def kept(server: RunningServer) -> list[str]:
    """What kept the loop so far."""
    return re.findall(rf"{TOLD}.*", server.log.read_text())


def require_free(server: RunningServer, work: Callable[[str], None], model_name: str) -> None:
    """Fail if `work` keeps the loop however often it is done: a busy machine makes any callback slow now and then."""
    for attempt in range(3):
        before = kept(server)
        work(f"{model_name}-{attempt}")
        told = kept(server)[len(before) :]
        if not told:
            return
    pytest.fail("\n".join(told))


def manifest(
    parameters: int, groups: int = 1, shape: tuple[int, ...] = (1,), rule: str = "adagrad"
) -> Manifest:
    made = Manifest()
    for index in range(parameters):
        made.parameters.add(name=f"p{index:x}", shape=shape, dtype=F32, group=index % groups)
    for _ in range(groups):
        made.groups.add(rule=rule)
    return made


def joined(wire: Wire, model: str, worker: str = "w", **fields: object) -> pb.JoinResponse:
    request = pb.JoinRequest(model=model, worker=worker, **fields)  # type: ignore[arg-type]
    (answer,) = wire.answers("Join", [request.SerializeToString()], timeout_s=60)
    return pb.JoinResponse.FromString(answer)


def refused_join(wire: Wire, **fields: object) -> PushstepError:
    request = pb.JoinRequest(worker="w", **fields)  # type: ignore[arg-type]
    return wire.refused("Join", [request.SerializeToString()])


def many_parameters(wire: Wire, model: str) -> None:
    assert joined(wire, model, manifest=manifest(100_000)).HasField("create")


def many_groups(wire: Wire, model: str) -> None:
    made = manifest(MAX_GROUPS, MAX_GROUPS)
    assert len(joined(wire, model, manifest=made).create.manifest.arenas) == MAX_GROUPS
    made.parameters.add(name="more", dtype=F32, group=MAX_GROUPS)
    made.groups.add(rule="adagrad")
    assert refused_join(wire, model=f"{model}-more", manifest=made).code == "too_long"


def many_names(wire: Wire, model: str) -> None:
    made = manifest(1)
    for index in range(3000):
        made.parameters.add(name=f"q{index}", dtype=F32, aliases=[f"q{index}-{n}" for n in range(30)])
    assert joined(wire, model, manifest=made).HasField("create")


def many_dimensions(wire: Wire, model: str) -> None:
    """They are counted before they are multiplied: a product of so many numbers takes seconds."""
    made = manifest(1, shape=(1 << 40,) * 200_000)
    assert refused_join(wire, model=model, manifest=made).code == "too_long"
    most = manifest(1, shape=(1 << 40,) * MAX_DIMENSIONS)
    assert refused_join(wire, model=model, manifest=most).code == "invalid_manifest"


def another_model(wire: Wire, model: str) -> None:
    """Every parameter differs, and the first differences are told."""
    error = refused_join(wire, model=MODEL, manifest=manifest(100_000))
    assert error.code == "manifest_mismatch"
    assert "parameter 0" in error.message


def nothing_but_parts(wire: Wire, model: str) -> None:
    """Messages of two bytes a part, as small as parts can be."""
    groups = pb.JoinRequest(model=model, worker="w").SerializeToString()
    parts = b"\x12\x00" * 1_000_000
    groups += b"\x22" + _varint(len(parts)) + parts
    assert wire.refused("Join", [groups]).code == "too_long"


def many_segments(wire: Wire, model: str) -> None:
    """In a header, of a model that has as many parameters."""
    size = 20_000
    ticket = joined(wire, model, manifest=manifest(size)).create
    segments = [Segment(start=index, stop=index + 1, dtype=F32) for index in range(size)]
    upload = {"model": model, "kind": pb.UPLOAD_KIND_CREATE, "ticket": ticket.ticket}
    header = pb.UploadHeader(**upload, segments=segments)
    assert (
        wire.refused("Upload", [pb.UploadRequest(header=header).SerializeToString()]).code == "wrong_length"
    )
    upload["ticket"] = joined(wire, model, manifest=manifest(size)).create.ticket
    whole = pb.UploadHeader(**upload, segments=[Segment(stop=size, dtype=F32)])
    body = pb.UploadRequest(header=whole, payload=bytes(4 * size))
    wire.answers("Upload", [body.SerializeToString()], timeout_s=60)
    raw = RawWorker(wire, model, "raw")
    commit = pb.PushCommit()
    for declared, code in ((segments, "wrong_length"), ([*segments, segments[0]], "malformed_frame")):
        message = pb.PushRequest(header=raw.header(declared), commit=commit)
        assert wire.refused("Push", [message.SerializeToString()]).code == code
    pushed = raw.whole(raw.header([Segment(stop=size, dtype=F32)]), [[torch.ones(size)]])
    assert raw.push(pushed).receipt.version == 1


def many_rows(wire: Wire, model: str) -> None:
    """Four million ids: of a row that is there, of one that is not, and one by one in the message."""
    size = 4_000_000
    request = pb.PullRowsRequest(model=MODEL, parameter="bias", ids=[3] * size)
    first, *frames = wire.answers("PullRows", [request.SerializeToString()], timeout_s=60)
    (segment,) = pb.PullResponse.FromString(first).header.segments
    assert segment.rows == size
    assert sum(map(len, frames)) > 12 * size
    request.ids.append(4)
    assert wire.refused("PullRows", [request.SerializeToString()]).code == "row_out_of_range"
    named = pb.PullRowsRequest(model=MODEL, parameter="bias").SerializeToString()
    one_by_one = named + b"\x18\x09" * (size // 2)
    assert wire.refused("PullRows", [one_by_one]).code == "row_out_of_range"


def _varint(number: int) -> bytes:
    return bytes(number >> shift & 0x7F | (0x80 if shift < 28 else 0) for shift in range(0, 35, 7))


REQUESTS: list[Callable[[Wire, str], None]] = [
    many_parameters,
    many_groups,
    many_names,
    many_dimensions,
    another_model,
    nothing_but_parts,
    many_segments,
    many_rows,
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.__name__)
def test_a_request_of_any_size_leaves_the_loop_free(
    request_: Callable[[Wire, str], None], watched: RunningServer, wire: Wire, model_name: str
) -> None:
    def work(name: str) -> None:
        request_(wire, name)
        assert watched.rest("GET", "/healthz").status_code == 200

    require_free(watched, work, model_name)


def pushed(raw: RawWorker, segment: Segment, *pieces: torch.Tensor, **changes: object) -> None:
    raw.push(raw.whole(raw.header([segment], **changes), [pieces]))
    raw.advance()


WIRE = {F32: torch.float32, DType.DTYPE_FLOAT64: torch.float64}


def test_no_kernel_is_compiled_on_the_loop(watched: RunningServer, wire: Wire, model_name: str) -> None:
    """However small the push, and whatever makes it the first of its kind: its dtype, what its rows are, what was set."""
    before = kept(watched)
    for dtype, kind in WIRE.items():
        model = f"{model_name}-{dtype}"
        values = {"table": torch.zeros(4, 3, dtype=kind), "weight": torch.zeros(5, dtype=kind)}
        watched.connect(model, "owner").create(values, [{"rule": "adadelta", "params": list(values)}])
        raw = RawWorker(wire, model, "raw")
        dense, rows = raw.dense("weight"), raw.rows("table", 0)
        for sent, of in WIRE.items():
            dense.dtype = rows.dtype = sent
            for ids in ([], [2], [1, 1]):  # a kernel adds up those that come twice
                rows.rows = len(ids)
                pushed(raw, rows, torch.tensor(ids, dtype=torch.int64), torch.ones(len(ids), 3, dtype=of))
            pushed(raw, dense, torch.ones(5, dtype=of))
            few = raw.dense("weight")
            few.dtype, few.elements = sent, 1
            pushed(raw, few, torch.tensor([2], dtype=torch.int32), torch.ones(1, dtype=of))
        codes = raw.dense("weight")
        codes.dtype = DType.DTYPE_INT8
        pushed(raw, codes, torch.tensor([1.0]).view(torch.uint8), torch.ones(5, dtype=torch.uint8))
        for name, value in (("weight_decay", 0.5), ("maximize", True), ("weight_decay", 0.0)):
            patch_group(watched, model, 0, **{name: value})
            pushed(raw, raw.dense("weight"), torch.ones(5, dtype=kind))
        add_hook(watched, model, "clip_grad_norm", "step_pre", {"max_norm": 0.1})
        pushed(raw, raw.dense("weight"), torch.ones(5, dtype=kind))
        session = watched.connect(model, "beside", shared_memory=True)
        for _ in range(2):
            session.exchange({name: torch.ones_like(value) for name, value in values.items()})
        session.close()
    assert kept(watched) == before


def test_the_first_scheduler_imports_nothing_on_the_loop(watched: RunningServer, model_name: str) -> None:
    session = created(watched, model_name)
    before = kept(watched)
    settings = {"scheduler": "OneCycleLR", "arguments": {"max_lr": 1.0, "total_steps": 10}}
    add_hook(watched, model_name, "lr_scheduler", "step_post", settings)
    session.push({"bias": torch.ones(4)})
    assert kept(watched) == before


def many_workers(server: RunningServer, wire: Wire, model: str) -> None:
    """Under the policy that looks at all of them."""
    created(server, model)
    set_policy(server, model, policy="bounded", bound=3)
    for number in range(1500):
        joined(wire, model, f"w{number}")
    shown = server.rest("GET", f"/v1/models/{model}/workers").json()
    assert (len(shown["workers"]), shown["total"]) == (1501, 1501)
    assert all("clock" in worker for worker in shown["workers"])
    query = {"limit": "1500"}
    first = server.rest("GET", f"/v1/models/{model}/workers", params=query).json()
    query["cursor"] = first["next"]
    page = server.rest("GET", f"/v1/models/{model}/workers", params=query).json()["workers"]
    assert [worker["name"] for worker in page] == ["w999"]


def many_shown_groups(server: RunningServer, wire: Wire, model: str) -> None:
    uploaded(wire, model, manifest(MAX_GROUPS, MAX_GROUPS))
    groups = server.rest("GET", f"/v1/models/{model}/param-groups").json()["param_groups"]
    assert [(group["params"], group["params_total"]) for group in groups[:2]] == [(["p0"], 1), (["p1"], 1)]
    raw = RawWorker(wire, model, "raw")
    header = raw.header(raw.layout.dense_segments(raw.layout.slots[:1])[0][:1])
    assert len(raw.push(raw.whole(header, [[torch.ones(1)]])).receipt.groups) == MAX_GROUPS


def many_shown_parameters(server: RunningServer, wire: Wire, model: str) -> None:
    uploaded(wire, model, manifest(20_000))
    shown = server.rest("GET", f"/v1/models/{model}/parameters?limit=10000").json()
    assert (len(shown["parameters"]), shown["total"]) == (10_000, 20_000)
    (group,) = server.rest("GET", f"/v1/models/{model}/param-groups").json()["param_groups"]
    assert (len(group["params"]), group["params_total"]) == (1000, 20_000)
    patch_group(server, model, 0, lr=0.5)
    assert server.rest("GET", "/v1/models").status_code == 200
    assert server.rest("GET", f"/v1/models/{model}/state-dict").status_code == 200


def large_bodies(server: RunningServer, wire: Wire, model: str) -> None:
    created(server, model)
    names = "{" + ",".join(f'"{number:x}":1' for number in range(15_000)) + "}"
    nested = '{"a": [' + "[]," * (MAX_BODY_BYTES // 3 - 10) + "1]}"
    assert MAX_BODY_BYTES > len(names) > 0.9 * MAX_BODY_BYTES
    for path in ("policy", "gate", "param-groups/0", "hooks"):
        for body in (names, nested):
            answer = server.rest(
                "POST" if path == "hooks" else "PATCH",
                f"/v1/models/{model}/{path}",
                content=body.encode(),
                headers={"content-type": "application/json"},
            )
            assert answer.status_code == 422, answer.text[:200]


def many_schedulers(server: RunningServer, wire: Wire, model: str) -> None:
    """As many as there may be, each with as much as it may have: and one too many of each."""
    session = created(server, model)

    def chained(count: int, milestones: int) -> dict[str, object]:
        one = {"milestones": list(range(1, milestones + 1)), "gamma": 0.99}
        schedulers = [{"scheduler": "MultiStepLR", "arguments": one}] * count
        return {"scheduler": "ChainedScheduler", "arguments": {"schedulers": schedulers}}

    for settings in (chained(32, 100), chained(1, 1000)):
        hook = add_hook(server, model, "lr_scheduler", "step_post", settings)["id"]
        session.push({"bias": torch.ones(4)})
        remove_hook(server, model, hook)
    body = {"name": "lr_scheduler", "point": "step_post"}
    for settings in (chained(33, 1), chained(1, 1001)):
        answer = server.rest("POST", f"/v1/models/{model}/hooks", json={**body, "settings": settings})
        assert answer.json()["code"] == "invalid_hook"


def uploaded(wire: Wire, model: str, made: Manifest) -> None:
    """Create a model of zeros."""
    ticket = joined(wire, model, manifest=made).create
    segments = [
        Segment(arena=n, stop=arena.elements, dtype=F32) for n, arena in enumerate(ticket.manifest.arenas)
    ]
    header = pb.UploadHeader(model=model, kind=pb.UPLOAD_KIND_CREATE, ticket=ticket.ticket, segments=segments)
    chunks = [
        pb.UploadRequest(segment=n, payload=bytes(4 * segment.stop)).SerializeToString()
        for n, segment in enumerate(segments)
    ]
    wire.answers("Upload", [pb.UploadRequest(header=header).SerializeToString(), *chunks], timeout_s=60)


OPERATORS: list[Callable[[RunningServer, Wire, str], None]] = [
    many_workers,
    many_shown_groups,
    many_shown_parameters,
    large_bodies,
    many_schedulers,
]


@pytest.mark.parametrize("request_", OPERATORS, ids=lambda request: request.__name__)
def test_what_an_operator_asks_for_leaves_the_loop_free(
    request_: Callable[[RunningServer, Wire, str], None],
    watched: RunningServer,
    wire: Wire,
    model_name: str,
) -> None:
    require_free(watched, lambda name: request_(watched, wire, name), model_name)
