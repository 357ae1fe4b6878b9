"""What is refused leaves nothing behind: no cycle of an error, its traceback and the body waits for a collection.

The server runs without garbage collection and says what one would have freed (see uncollected_server.py).
"""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from pushstep.client import Session
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import PushstepError
from pushstep.proto.types_pb2 import DType, Identity, Manifest, Parameter, ParamGroup
from tests.support.servers import harness, operators, uncollected_server
from tests.support.servers.harness import RunningServer, memory_bytes, running_server
from tests.support.workers.wire import RawWorker, Wire

SIZE = 100_000
VALUES = {"w": np.ones(SIZE, np.float32), "table": np.ones((1000, 100), np.float32)}
GROUPS = [{"rule": "adagrad", "params": ["w", "table"], "lr": 0.1}]
UNCOLLECTED = (sys.executable, Path(uncollected_server.__file__))


@dataclass
class Scene:
    """A server, a model of it, and whoever sends it what is refused."""

    server: RunningServer
    wire: Wire
    raw: RawWorker
    session: Session
    shared: Session

    def refused(self, method: str, messages: list[bytes]) -> None:
        error = self.wire.refused(method, messages)
        if error.consumed:
            self.raw.advance()

    def left(self) -> dict[str, Any]:
        """What only a collection would have freed, now that others were answered."""
        for _ in range(3):
            self.wire.answers("Describe", [b""])
        self.server.process.send_signal(signal.SIGUSR1)
        assert self.server.process.stdout is not None
        found: dict[str, Any] = json.loads(self.server.process.stdout.readline())
        return found

    def rest(self, method: str, path: str, **options: Any) -> None:
        answer = self.server.rest(method, f"/v1/models/m{path}", **options)
        assert answer.status_code >= 400, answer.text


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(harness.COMMANDS, "cpu", UNCOLLECTED)
        with running_server(tmp_path_factory.mktemp("refused") / "data", "--stall-s", "2") as server:
            session = server.connect("m", "lead")
            session.create(VALUES, GROUPS)
            operators.set_gate(server, "m", quarantine_after=None)
            shared = server.connect("m", "shared", shared_memory=True)
            shared.push(VALUES)
            wire = Wire(server.grpc)
            yield Scene(server, wire, RawWorker(wire, "m"), session, shared)
            wire.close()


def nan(scene: Scene, **changes: Any) -> list[bytes]:
    return scene.raw.good(float("nan"), "w", **changes)


def upload(scene: Scene, kind: Any, values: torch.Tensor | None = None, **fields: Any) -> list[bytes]:
    """An upload of `w`."""
    raw = scene.raw
    body = torch.ones(SIZE) if values is None else values
    header = pb.UploadHeader(
        model="m",
        kind=kind,
        identity=raw.identity(),
        manifest_hash=raw.member.manifest_hash,
        segments=[raw.dense("w")],
    )
    header.MergeFrom(pb.UploadHeader(**fields))
    first = pb.UploadRequest(header=header)
    return [first.SerializeToString(), pb.UploadRequest(payload=body.numpy().tobytes()).SerializeToString()]


def extras(scene: Scene) -> list[bytes]:
    header = pb.UploadHeader(
        model="m", kind=pb.UPLOAD_KIND_EXTRAS, identity=scene.raw.identity(), extras_bytes=4 * SIZE
    )
    return [pb.UploadRequest(header=header, payload=bytes(4 * SIZE)).SerializeToString()]


def rows(scene: Scene, row: int) -> list[bytes]:
    raw = scene.raw
    segment = raw.rows("table", 500)
    return raw.whole(raw.header([segment]), [[torch.full((500,), row), torch.ones(500, 100)]])


def manifest(name: str) -> Manifest:
    return Manifest(
        parameters=[
            Parameter(name=f"{name}{i}", shape=[1], dtype=DType.DTYPE_FLOAT32) for i in range(20_000)
        ],
        groups=[ParamGroup(rule="adagrad")],
    )


def with_round(scene: Scene) -> None:
    """A round whose finite gradients add up to infinity."""
    operators.set_policy(scene.server, "m", policy="sync", reduce="sum", quorum=1)
    try:
        scene.refused("Push", scene.raw.good(float(np.finfo(np.float32).max), "w", samples=1e6))
    finally:
        operators.set_policy(scene.server, "m", policy="async")


def superseded(scene: Scene) -> None:
    """A push whose body is complete only after a restore."""
    snapshot = operators.take_snapshot(scene.server, "m")["id"]

    def messages() -> Iterator[bytes]:
        header, *frames = scene.raw.good(1.0, "w")
        yield header
        yield frames[0]
        operators.restore(scene.server, "m", snapshot)
        yield from frames[1:]

    assert scene.wire.refused("Push", messages()).code == "superseded"
    scene.raw.member.CopyFrom(RawWorker(scene.wire, "m", takeover=True).member)
    with warnings.catch_warnings(action="ignore"):  # each is told of the restore
        scene.session.push(VALUES)
        scene.shared.push(VALUES)


def stalled(scene: Scene) -> None:
    over = Event()

    def messages() -> Iterator[bytes]:
        yield scene.raw.good(1.0, "w")[0]
        over.wait(60)

    assert scene.wire.refused("Push", messages()).code == "stream_stalled"
    over.set()


def cancelled(scene: Scene) -> None:
    """By its sender, before its commit."""
    came = Event()

    def messages() -> Iterator[bytes]:
        yield from scene.raw.good(1.0, "w")[:-1]
        came.set()

    call = scene.wire.start("Push", messages())
    assert came.wait(60)
    call.cancel()


def shared_nan(scene: Scene) -> None:
    with pytest.raises(PushstepError):
        scene.shared.push({"w": np.full(SIZE, np.nan, np.float32)})


CASES: dict[str, Callable[[Scene], None]] = {
    "a push of NaN": lambda scene: scene.refused("Push", nan(scene)),
    "an exchange of NaN": lambda scene: scene.refused("Exchange", nan(scene)),
    "another digest": lambda scene: scene.refused(
        "Push", scene.raw.whole(scene.raw.header([scene.raw.dense("w")]), [[torch.ones(SIZE)]], digest=1)
    ),
    "rows that are none": lambda scene: scene.refused("Push", rows(scene, 5000)),
    "a short body": lambda scene: scene.refused(
        "Push", [scene.raw.good(1.0, "w")[0], scene.raw.good(1.0, "w")[-1]]
    ),
    "a body without a commit": lambda scene: scene.refused("Push", scene.raw.good(1.0, "w")[:-1]),
    "a body that is too long": lambda scene: scene.refused(
        "Push", [*scene.raw.good(1.0, "w")[:-1], *scene.raw.good(1.0, "w")[1:]]
    ),
    "a version to come": lambda scene: scene.refused("Push", scene.raw.good(1.0, "w", base_version=1 << 40)),
    "edits that are none": lambda scene: scene.refused(
        "Push", scene.raw.good(1.0, "w", edits=[pb.GroupEdit(group=7)])
    ),
    "rubbish": lambda scene: scene.refused("Push", [bytes(range(256)) * 1000]),
    "a stale sequence": lambda scene: scene.refused(
        "Push", scene.raw.good(1.0, "w", identity=scene.raw.identity(5))
    ),
    "a round that adds up to infinity": with_round,
    "a restore in between": superseded,
    "a stream that stalls": stalled,
    "a stream that is cancelled": cancelled,
    "NaN in shared memory": shared_nan,
    "state of a model with others": lambda scene: scene.refused(
        "Upload", upload(scene, pb.UPLOAD_KIND_STATE)
    ),
    "parameters of a stale sequence": lambda scene: scene.refused(
        "Upload", upload(scene, pb.UPLOAD_KIND_PARAMETERS, identity=Identity(sequence=999))
    ),
    "a creation without a ticket": lambda scene: scene.refused(
        "Upload", upload(scene, pb.UPLOAD_KIND_CREATE)
    ),
    "extras that are none": lambda scene: scene.refused("Upload", extras(scene)),
    "a join with another manifest": lambda scene: scene.refused(
        "Join", [pb.JoinRequest(model="m", worker="j", manifest=manifest("x")).SerializeToString()]
    ),
    "a join with a bad manifest": lambda scene: scene.refused(
        "Join",
        [
            pb.JoinRequest(
                model="n", worker="j", manifest=Manifest(parameters=[*manifest("x").parameters])
            ).SerializeToString()
        ],
    ),
    "rows to pull that are none": lambda scene: scene.refused(
        "PullRows",
        [pb.PullRowsRequest(model="m", parameter="table", ids=[9999] * 50_000).SerializeToString()],
    ),
    "a pull in another dtype": lambda scene: scene.refused(
        "Pull",
        [pb.PullRequest(model="m", options=pb.PullOptions(dtype=DType.DTYPE_INT8)).SerializeToString()],
    ),
    "an edit over REST": lambda scene: scene.rest("PATCH", "/param-groups/0", json={"x" * 500_000: 1.0}),
    "a hook over REST": lambda scene: scene.rest(
        "POST",
        "/hooks",
        json={"name": "clip_grad_norm", "point": "step_pre", "settings": {"x": "y" * 500_000}},
    ),
    "a body over REST that is none": lambda scene: scene.rest("PATCH", "/policy", content=b"x" * 500_000),
    "a body over REST that is too large": lambda scene: scene.rest(
        "PATCH", "/policy", content=b"x" * (2 << 20)
    ),
    "a path over REST that is none": lambda scene: scene.rest("GET", f"/{'x' * 60_000}"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused_is_in_no_cycle(scene: Scene, case: str) -> None:
    CASES[case](scene)  # what is made once is made
    scene.left()
    for _ in range(2):
        CASES[case](scene)
    assert scene.left() == {"frames": [], "bytes": 0}


def test_refused_pushes_take_no_memory(scene: Scene) -> None:
    session = scene.server.connect("large")
    values = {"w": np.ones(2_500_000, np.float32)}
    session.create(values)
    operators.set_gate(scene.server, "large", quarantine_after=None)
    nan = {"w": np.full(2_500_000, np.nan, np.float32)}

    def refuse(count: int) -> int:
        for _ in range(count):
            session.push(values)
            with pytest.raises(PushstepError):
                session.push(nan)
        return memory_bytes(scene.server.process.pid)

    before = refuse(5)
    assert refuse(15) - before < 4 * values["w"].nbytes
