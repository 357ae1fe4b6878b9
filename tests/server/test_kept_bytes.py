"""What a server keeps of its callers is small and bounded, however large what they send: names, edits, fields unknown to it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import numpy as np
import pytest

from pushstep.client import Outcome, Session
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import OverCapacity
from pushstep.proto.types_pb2 import DType, Hyperparameter, Identity, Manifest, Parameter, ParamGroup
from tests.support.servers import operators
from tests.support.servers.harness import RunningServer, memory_bytes, running_server
from tests.support.workers.wire import RawWorker, Wire, named

LARGE_BYTES = 4_000_000
STAGING_BYTES = 64 << 20
WORKER_BYTES = 2 << 20
MIB = 1 << 20
MANIFEST = Manifest(
    parameters=[Parameter(name="w", shape=[4], dtype=DType.DTYPE_FLOAT32)],
    groups=[ParamGroup(rule="adagrad")],
)
_numbers = itertools.count()


def field(number: int, value: bytes) -> bytes:
    """A field of a message, as protobuf writes it."""

    def varint(rest: int) -> bytes:
        return bytes([rest & 127 | 128]) + varint(rest >> 7) if rest > 127 else bytes([rest])

    return varint(number << 3 | 2) + varint(len(value)) + value


UNKNOWN = field(99, b"x" * LARGE_BYTES)
LONG = "x" * LARGE_BYTES


@dataclass
class Scene:
    server: RunningServer
    wire: Wire
    lead: Session
    last: RawWorker | None = None

    def raw(self) -> RawWorker:
        """A new worker, which does not lead; the one before goes."""
        self.leave()
        self.last = RawWorker(self.wire, "m", f"n{next(_numbers)}")
        return self.last

    def leave(self) -> None:
        if self.last is not None:
            self.send("Leave", pb.LeaveRequest(model="m", identity=self.last.identity(0)).SerializeToString())
            self.last = None

    def send(self, method: str, *messages: bytes) -> None:
        """Whether it is taken or refused by name is all the same here."""
        try:
            self.wire.answers(method, messages)
        except grpc.RpcError as error:
            named(error)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    options = ("--staging-bytes", str(STAGING_BYTES), "--worker-bytes", str(WORKER_BYTES))
    with running_server(tmp_path_factory.mktemp("kept") / "data", *options) as server:
        lead = server.connect("m", "lead")
        lead.create({"w": np.zeros(4, np.float32)})
        operators.set_gate(server, "m", quarantine_after=None)
        wire = Wire(server.grpc)
        yield Scene(server, wire, lead)
        wire.close()


def push(raw: RawWorker, header: pb.PushHeader, beside: bytes = b"") -> bytes:
    """A whole push in one message; `beside`: further fields of its header."""
    first = field(1, header.SerializeToString() + beside)
    return (
        first
        + pb.PushRequest(payload=np.ones(4, np.float32).tobytes(), commit=pb.PushCommit()).SerializeToString()
    )


def unknown_in_the_identity(scene: Scene) -> None:
    raw = scene.raw()
    for _ in range(2):
        raw.advance()
        header = raw.header([], skip=True)
        header.ClearField("identity")
        identity = field(2, raw.identity(0).SerializeToString() + UNKNOWN)
        scene.send("Push", field(1, header.SerializeToString() + identity) + field(4, b""))


def unknown_in_the_header(scene: Scene) -> None:
    raw = scene.raw()
    scene.send("Push", push(raw, raw.header([raw.dense("w")]), UNKNOWN))


def unknown_in_an_upload(scene: Scene) -> None:
    raw = scene.raw()
    header = pb.UploadHeader(
        model="m", kind=pb.UPLOAD_KIND_STATE, manifest_hash=raw.member.manifest_hash, force=True, steps=[1]
    )
    identity = field(4, raw.identity().SerializeToString() + UNKNOWN)
    scene.send("Upload", field(1, header.SerializeToString() + identity))


def long_edits(scene: Scene) -> None:
    raw = scene.raw()
    header = raw.header([raw.dense("w")])
    header.edits.add(group=0).values[LONG].number = 1.0
    scene.send("Push", push(raw, header))


def many_edits(scene: Scene) -> None:
    """What does not count is named in the receipt, so it has to be a name that the rule knows."""
    raw = scene.raw()
    for _ in range(8):
        raw.advance()
        header = raw.header([raw.dense("w")], identity=raw.identity(0))
        edit = header.edits.add(group=0)
        for name in range(100):
            edit.values[f"{name}-{'x' * 90}"].number = 1.0
        scene.send("Push", push(raw, header))


def long_metrics(scene: Scene) -> None:
    raw = scene.raw()
    scene.send("Push", push(raw, raw.header([raw.dense("w")], metrics={LONG: 1.0})))


def a_long_worker_leaves(scene: Scene) -> None:
    identity = Identity(model_uid=scene.raw().member.identity.model_uid, worker=LONG)
    scene.send("Leave", pb.LeaveRequest(model="m", identity=identity).SerializeToString())


def a_long_worker_uploads(scene: Scene) -> None:
    name = f"x{next(_numbers)}"
    request = pb.JoinRequest(model=name, worker="w", manifest=MANIFEST)
    (answer,) = scene.wire.answers("Join", [request.SerializeToString()])
    header = pb.UploadHeader(
        model=name,
        kind=pb.UPLOAD_KIND_CREATE,
        ticket=pb.JoinResponse.FromString(answer).create.ticket,
        segments=[scene.raw().dense("w")],
        identity=Identity(worker=f"{name}{LONG}"),
    )
    scene.send("Upload", pb.UploadRequest(header=header).SerializeToString())


def unknown_in_a_ticket(scene: Scene) -> None:
    request = pb.JoinRequest(model=f"x{next(_numbers)}", worker="w").SerializeToString()
    scene.send("Join", request + field(4, MANIFEST.SerializeToString() + UNKNOWN))


def unknown_in_a_region(scene: Scene) -> None:
    raw = scene.raw()
    request = pb.OpenRegionRequest(model="m", manifest_hash=raw.member.manifest_hash).SerializeToString()
    scene.send("OpenRegion", request + field(2, raw.identity(0).SerializeToString() + UNKNOWN))


def large_states(scene: Scene) -> None:
    """64 KiB each, which is allowed: there is room for eight workers' in the table, and then for no other worker."""
    stay = []
    for _ in range(10):
        try:
            stay.append(RawWorker(scene.wire, "m", f"n{next(_numbers)}"))
        except grpc.RpcError as error:
            assert isinstance(named(error), OverCapacity)
        else:
            header = stay[-1].header([stay[-1].dense("w")], worker_state=bytes(64 << 10))
            scene.send("Push", push(stay[-1], header))
    for scene.last in stay:
        scene.leave()


def large_policies(scene: Scene) -> None:
    bounds = dict.fromkeys(map(str, range(4096)), 99)
    for _ in range(3):
        operators.set_policy(scene.server, "m", policy="async", max_staleness_by_group=bounds)
    operators.set_policy(scene.server, "m", policy="async", max_staleness_by_group={})


def large_hooks(scene: Scene) -> None:
    """Of a size that is refused, and of the largest that is not."""
    for milestones in (range(10_000), range(1000)):
        settings = {"scheduler": "MultiStepLR", "arguments": {"milestones": list(milestones)}}
        body = {"name": "lr_scheduler", "point": "step_post", "settings": settings}
        answer = scene.server.rest("POST", "/v1/models/m/hooks", json=body)
        assert answer.status_code == (201 if len(milestones) == 1000 else 422)
    operators.remove_hook(scene.server, "m", answer.json()["id"])


CASES: list[Callable[[Scene], None]] = [
    unknown_in_the_identity,
    unknown_in_the_header,
    unknown_in_an_upload,
    long_edits,
    many_edits,
    long_metrics,
    a_long_worker_leaves,
    a_long_worker_uploads,
    unknown_in_a_ticket,
    unknown_in_a_region,
    large_states,
    large_policies,
    large_hooks,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_little_is_kept_of_what_is_large(scene: Scene, case: Callable[[Scene], None]) -> None:
    pid = scene.server.process.pid
    slow = case in (large_policies, large_hooks, large_states)
    for _ in range(4 if slow else 40):  # malloc keeps the memory through which such messages go
        case(scene)
    before = memory_bytes(pid)
    for _ in range(12 if slow else 60):
        case(scene)
    assert memory_bytes(pid) - before < 60 * LARGE_BYTES // 2
    with warnings.catch_warnings(action="ignore"):  # one of them replaces the state
        assert scene.lead.push({"w": np.ones(4, np.float32)}).outcome in (Outcome.APPLIED, Outcome.SUPERSEDED)
    snapshot = operators.take_snapshot(scene.server, "m")["id"]
    newest = max(scene.server.data.rglob("manifest.json"), key=lambda path: path.stat().st_mtime)
    written = newest.stat().st_size
    operators.delete_snapshot(scene.server, "m", snapshot)
    assert written < WORKER_BYTES
    assert len(scene.server.rest("GET", "/v1/models/m/events").content) < 4 * MIB


def test_headers_that_wait_are_small(scene: Scene) -> None:
    """Under a policy that has pushes wait before their bodies are read, and behind a claim: as large as the model at most."""
    raw = scene.raw()
    many = [raw.dense("w")] * 150_000
    edits = [pb.GroupEdit(group=n) for n in range(9000)]
    values = {f"v{n}": Hyperparameter(number=1.0) for n in range(101)}
    headers = {
        "segments": raw.header(many),
        "edits": raw.header([raw.dense("w")], edits=edits),
        "values": raw.header([raw.dense("w")], edits=[pb.GroupEdit(group=0, values=values)]),
    }
    operators.set_policy(scene.server, "m", policy="sync", min_workers=50, timeout_s=60)
    try:
        for what, header in headers.items():
            error = scene.wire.refused("Push", [pb.PushRequest(header=header).SerializeToString()])
            assert error.code in ("malformed_frame", "too_long"), what
        commit = pb.PushCommit(edits=[pb.GroupEdit(group=0)] * 3)
        messages = [pb.PushRequest(header=raw.header([raw.dense("w")])).SerializeToString()]
        messages.append(pb.PushRequest(payload=bytes(16), commit=commit).SerializeToString())
        assert scene.wire.refused("Push", messages).code == "malformed_frame"
        upload = pb.UploadHeader(
            model="m",
            kind=pb.UPLOAD_KIND_PARAMETERS,
            identity=raw.identity(),
            manifest_hash=raw.member.manifest_hash,
            segments=many,
        )
        error = scene.wire.refused("Upload", [pb.UploadRequest(header=upload).SerializeToString()])
        assert error.code == "malformed_frame"
    finally:
        operators.set_policy(scene.server, "m", policy="async")
