"""Every field of every request, over gRPC and the local socket, beyond and at its limit: named, and nothing changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import grpc
import pytest
import torch

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import CATALOGUE, Broken, MessageTooLarge, PushstepError, TooLong
from pushstep.proto.errors.status import from_status
from pushstep.proto.shared_memory.local_socket import Method, Status
from pushstep.proto.wire.frames import MAX_MESSAGE_BYTES
from tests.support.servers.harness import WATCHED, RunningServer, running_server
from tests.support.servers.watched_server import TOLD
from tests.support.workers.good_requests import push, requests
from tests.support.workers.hostile_fields import cases
from tests.support.workers.wire import RawLocalSocket, RawWorker, Wire, created, named, untouched

MODEL = "fields"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("fields") / "data", command=WATCHED) as running:
        created(running, MODEL)
        yield running
        log = running.log.read_text()
        assert "internal error" not in log
        assert "Traceback" not in log
        assert TOLD not in log


@pytest.fixture
def raw(watched: RunningServer) -> Iterator[RawWorker]:
    wire = Wire(watched.grpc)
    yield RawWorker(wire, MODEL, "raw", takeover=True)
    wire.close()


NAMES = [
    "Describe",
    "Join",
    "Join in parts",
    "Join of a new one",
    "Heartbeat",
    "Leave",
    "OpenRegion",
    "Pull",
    "PullRows",
    "PullState",
    "PullExtras",
    "Push",
    "Exchange",
    "TakeSteps",
    "Upload of a group",
    "Upload of fresh states",
    "Upload of a state",
    "Upload of extras",
]


def test_every_method_is_in_the_table(raw: RawWorker) -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["TrainingService"].methods}
    assert {method for method, _ in requests(raw).values()} == methods
    assert list(requests(raw)) == NAMES


def is_expected(error: PushstepError, expected: type[PushstepError]) -> bool:
    """A chunk that is too long is told of as a message that is."""
    return type(error) is expected or (expected is TooLong and type(error) is MessageTooLarge)


@pytest.mark.parametrize("name", NAMES)
def test_beyond_its_limit_a_field_is_refused_by_name(
    name: str, watched: RunningServer, raw: RawWorker
) -> None:
    method, base = requests(raw)[name]
    with untouched(watched, MODEL):
        for case in cases(type(base)):
            for message, expected in case.refused(base):
                error = raw.wire.refused(method, [message.SerializeToString()])
                assert is_expected(error, expected), (str(case), error)
                assert not error.consumed
        assert raw.wire.refused(method, [bytes(MAX_MESSAGE_BYTES + 1)]).code == "message_too_large"
    assert watched.rest("GET", "/v1/models/new").status_code == 404


@pytest.mark.parametrize("name", NAMES)
def test_at_its_limit_a_field_is_answered_or_refused_by_name(
    name: str, watched: RunningServer, raw: RawWorker, model_name: str
) -> None:
    """On a model of its own: what is asked for may be done."""
    created(watched, model_name)
    own = RawWorker(raw.wire, model_name, "own")
    method, base = requests(own)[name]
    for case in cases(type(base)):
        for message in case.allowed(base):
            try:
                own.wire.answers(method, [message.SerializeToString()])
            except grpc.RpcError as error:
                assert not isinstance(named(error), Broken), str(case)
    assert watched.rest("GET", f"/v1/models/{model_name}").json()["failed"] is None


@pytest.mark.parametrize("method", list(Method))
def test_the_same_over_the_local_socket(method: Method, watched: RunningServer, raw: RawWorker) -> None:
    with contextlib.closing(RawLocalSocket(raw)) as line:
        base = push(raw)
        base.header.region = base.header.pull.region = line.region
        base.ClearField("payload")
        with untouched(watched, MODEL):
            for case in cases(pb.PushRequest):
                for message, expected in case.refused(base):
                    error = line.refused(method, message.SerializeToString())
                    assert is_expected(error, expected), (str(case), error)
        for case in cases(pb.PushRequest):
            for message in case.allowed(base):
                status, answer = line.call(method, message.SerializeToString())
                if status is Status.REFUSED:
                    assert from_status(answer).code in CATALOGUE
                    assert not isinstance(from_status(answer), Broken), str(case)
    assert watched.rest("GET", f"/v1/models/{MODEL}").json()["failed"] is None


HEADS = {"no method": (0, 4), "an unknown method": (9, 4), "a length beyond": (1, MAX_MESSAGE_BYTES + 1)}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_of_the_local_socket(head: str, watched: RunningServer, raw: RawWorker) -> None:
    """What follows it cannot be told any more: it is refused by name, and the line ends."""
    number, length = HEADS[head]
    with contextlib.closing(RawLocalSocket(raw)) as line, untouched(watched, MODEL):
        status, answer = line.send_head(number, length)
        assert status is Status.REFUSED
        assert from_status(answer).code in ("malformed_frame", "message_too_large")
        assert line.is_closed()
    assert raw.push(raw.whole(raw.header([raw.dense("bias")]), [[torch.zeros(4)]])).receipt.version
