"""Readers that stop, whatever they were asking for: what is kept for them is bounded and soon let go of, and others go on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pushstep.client import Outcome, Session
from pushstep.proto import training_pb2 as pb
from tests.support.servers import operators
from tests.support.servers.harness import RunningServer, forget_peak, memory_bytes, running_server, wait_until
from tests.support.workers.unread import UnreadCall
from tests.support.workers.wire import RawWorker, Wire

MIB = 1 << 20
STALL_S = 1.5
READ_BYTES = 96 * MIB
# 8 MiB each, and as much state
VALUES = {"w": np.zeros((2048, 1024), np.float32), "table": np.zeros((2048, 1024), np.float32)}
GROUPS = [{"rule": "adagrad", "params": ["w", "table"], "lr": 0.1}]
DENSE = {"w": np.ones((2048, 1024), np.float32)}
ROWS = {"table": (np.arange(1024), np.ones((1024, 1024), np.float32))}
UNREAD = 24
# One connection of gRPC's takes up to 2 MiB; a copy of the model for PullState, and one for exports, 32 MiB each.
SLACK_BYTES = 2 * UNREAD * MIB + 2 * 32 * MIB + 64 * MIB


@dataclass
class Scene:
    """A server, a worker that goes on with its work, and those who do not read."""

    server: RunningServer
    honest: Session
    wire: Wire
    version: int = 0

    def work(self) -> None:
        """Push, exchange and pull, each soon."""
        begun_s = time.monotonic()
        assert self.honest.push({**DENSE, **ROWS}).outcome is Outcome.APPLIED
        receipt, _ = self.honest.exchange(DENSE)
        self.version = receipt.version
        self.honest.pull()
        assert time.monotonic() - begun_s < 15.0

    def held_bytes(self) -> int:
        return int(self.server.rest("GET", "/v1/capacity").json()["read_bytes"]["held"])

    def unread(self, method: str, *messages: bytes) -> UnreadCall:
        return UnreadCall(self.server.grpc, method, messages, window=65535)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    options = ("--stall-s", str(STALL_S), "--read-bytes", str(READ_BYTES), "--staging-bytes", str(128 * MIB))
    with running_server(tmp_path_factory.mktemp("unread") / "data", *options) as server:
        honest = server.connect("m", "honest")
        honest.create(VALUES, GROUPS)
        operators.take_snapshot(server, "m")
        wire = Wire(server.grpc)
        made = Scene(server, honest, wire)
        made.work()
        yield made
        wire.close()


def pull(scene: Scene, number: int) -> UnreadCall:
    return scene.unread("Pull", pb.PullRequest(model="m").SerializeToString())


def pull_what_changed(scene: Scene, number: int) -> UnreadCall:
    """Of every reader another version, so that no two are sent the same rows."""
    options = pb.PullOptions(have_version=max(1, scene.version - 2 - number))
    identity = scene.honest.member().identity()
    request = pb.PullRequest(model="m", options=options, timeline=identity.timeline)
    return scene.unread("Pull", request.SerializeToString())


def pull_in_another_dtype(scene: Scene, number: int) -> UnreadCall:
    request = pb.PullRequest(model="m", options=pb.PullOptions(dtype=2 + number % 3))
    return scene.unread("Pull", request.SerializeToString())


def pull_rows(scene: Scene, number: int) -> UnreadCall:
    request = pb.PullRowsRequest(model="m", parameter="table", ids=[7] * 2000)
    return scene.unread("PullRows", request.SerializeToString())


def pull_state(scene: Scene, number: int) -> UnreadCall:
    return scene.unread("PullState", pb.PullStateRequest(model="m").SerializeToString())


def exchange(scene: Scene, number: int) -> UnreadCall:
    raw = RawWorker(scene.wire, "m", f"unread{number}", takeover=True)
    segment = raw.rows("table", 1)
    messages = raw.whole(raw.header([segment]), [[torch.tensor([number]), torch.ones(1, 1024)]])
    return scene.unread("Exchange", *messages)


CALLS: list[Callable[[Scene, int], UnreadCall]] = [
    pull,
    pull_what_changed,
    pull_in_another_dtype,
    pull_rows,
    pull_state,
    exchange,
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_calls_that_nobody_reads(scene: Scene, call: Callable[[Scene, int], UnreadCall]) -> None:
    """Of as many versions as there are calls."""
    pid = scene.server.process.pid
    with ExitStack() as stack:
        scene.work()
        before = memory_bytes(pid)
        forget_peak(pid)
        begun_s = time.monotonic()
        unread = []
        for number in range(UNREAD):
            unread.append(stack.enter_context(contextlib.closing(call(scene, number))))
            if number % 4 == 0:
                scene.work()
        scene.work()
        wait_until(lambda: all(map(UnreadCall.is_over, unread)), timeout_s=10 * STALL_S)
        assert time.monotonic() - begun_s > STALL_S
        assert memory_bytes(pid, "VmHWM") - before < READ_BYTES + SLACK_BYTES
        assert all(call.came_bytes <= 65535 for call in unread)
        scene.work()
        wait_until(lambda: not scene.held_bytes())


def test_readers_that_have_stopped_hold_up_nobody(scene: Scene) -> None:
    """Three versions are what may be live; these are of five, and none has been dropped yet."""
    with ExitStack() as stack:
        calls = []
        for number in range(5):
            calls.append(stack.enter_context(contextlib.closing(pull(scene, number))))
            wait_until(lambda call=calls[-1]: call.hear() or call.came_bytes)
            scene.honest.push(DENSE)
        scene.work()


@pytest.mark.parametrize("step_s", [0.3, 0.9])
def test_a_reader_that_is_slow_and_moves_is_kept(scene: Scene, step_s: float) -> None:
    """64 KiB in `stall_s` are enough, of a message of which gRPC tells nothing before all of it has gone."""
    with contextlib.closing(
        UnreadCall(scene.server.grpc, "Pull", [pb.PullRequest(model="m").SerializeToString()])
    ) as call:
        until_s = time.monotonic() + 4 * STALL_S
        while time.monotonic() < until_s:
            call.open(96 << 10)
            time.sleep(step_s)
            call.hear()
            assert not call.has_ended
        assert call.came_bytes > 4 * STALL_S / step_s * (64 << 10)
        call.open(64 * MIB)
        wait_until(call.is_over)
        assert call.came_bytes > 2 * VALUES["w"].nbytes


def test_a_reader_that_crawls_is_not(scene: Scene) -> None:
    with contextlib.closing(pull(scene, 0)) as call:
        until_s = time.monotonic() + 10 * STALL_S
        while not call.is_over():
            call.open(4 << 10)
            time.sleep(STALL_S / 5)
            assert time.monotonic() < until_s
        assert call.came_bytes < MIB


def test_a_reader_on_a_unix_socket(scene: Scene) -> None:
    """Its call ends for the server, which cannot tell its connection; what it held is let go of."""
    address = f"unix:{scene.server.unix}"
    with ExitStack() as stack:
        for method, request in (
            ("Pull", pb.PullRequest(model="m")),
            ("PullState", pb.PullStateRequest(model="m")),
        ):
            call = UnreadCall(address, method, [request.SerializeToString()], window=65535)
            stack.enter_context(contextlib.closing(call))
        scene.work()
        wait_until(lambda: scene.held_bytes() > 0)
        wait_until(lambda: not scene.held_bytes(), timeout_s=5 * STALL_S)
        call.open(64 * MIB)  # who reads on after all is told
        wait_until(call.is_over)


DOWNLOADS = {
    "an export": "/export",
    "a torch export": "/export?format=torch",
    "a snapshot's content": "/snapshots/{snapshot}/content",
}


@pytest.mark.parametrize("what", DOWNLOADS)
def test_downloads_that_nobody_reads(scene: Scene, what: str) -> None:
    """One file for all of them, which goes with them; of more versions than there may be files others are told to wait."""
    snapshot = scene.server.rest("GET", "/v1/models/m/snapshots").json()["snapshots"][0]["id"]
    path = "m" + DOWNLOADS[what].format(snapshot=snapshot)
    pid = scene.server.process.pid
    with ExitStack() as stack:
        before = memory_bytes(pid)
        forget_peak(pid)
        answers = []
        for number in range(UNREAD):
            answers.append(operators.begin_download(scene.server, path, stack))
            if number % 4 == 0:
                scene.work()
        assert {answer.status for answer in answers} <= {200, 503}
        assert answers[0].status == 200
        assert operators.checkpoints_held(scene.server) <= 4
        assert memory_bytes(pid, "VmHWM") - before < READ_BYTES + SLACK_BYTES
        wait_until(lambda: not operators.checkpoints_held(scene.server), timeout_s=10 * STALL_S)
    assert operators.download(scene.server, path, "torch" if "torch" in path else "safetensors")


def test_large_answers_over_rest_that_nobody_reads(scene: Scene) -> None:
    many = {f"p{number:05}" + "x" * 700: np.zeros(1, np.float32) for number in range(4000)}
    scene.server.connect("many").create(many)
    path = "many/parameters?limit=10000"
    pid = scene.server.process.pid
    with ExitStack() as stack:
        before = memory_bytes(pid)
        answers = [operators.begin_download(scene.server, path, stack) for _ in range(UNREAD)]
        assert {answer.status for answer in answers} == {200}
        assert memory_bytes(pid) - before < READ_BYTES
        scene.work()
        wait_until(lambda: not scene.held_bytes(), timeout_s=10 * STALL_S)
    assert len(scene.server.rest("GET", f"/v1/models/{path}").json()["parameters"]) == 4000


def test_a_download_that_is_slow_and_moves_is_kept(scene: Scene) -> None:
    with ExitStack() as stack:
        answer = operators.begin_download(scene.server, "m/export", stack, receive_bytes=128 << 10)
        size, came = int(answer.getheader("content-length") or 0), 0
        until_s = time.monotonic() + 3 * STALL_S
        while time.monotonic() < until_s:
            came += len(answer.read(200 << 10))
            time.sleep(STALL_S / 3)
        assert came + len(answer.read()) == size


def test_a_local_socket_s_call_that_never_ends(scene: Scene) -> None:
    """Half a call on a region's own connection: the region ends, and its worker goes on with frames."""
    session = scene.server.connect("m", "local", shared_memory=True)
    assert session.push(DENSE).outcome is Outcome.APPLIED
    region = session.memory.region
    assert region is not None
    line = region.local_socket
    line._connection.sendall(b"\x01\xff")
    wait_until(lambda: not line.is_open(), timeout_s=5 * STALL_S)
    assert session.push(DENSE).outcome is Outcome.APPLIED
    session.close()


def test_nobody_was_told_of_an_accident(scene: Scene) -> None:
    log = scene.server.log.read_text()
    assert "Traceback" not in log
    assert "internal error" not in log
