"""Streams that stall, break off or want too much, and bytes that are no gRPC at all: the others never notice."""

from __future__ import annotations

import contextlib
import itertools
import queue
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from pushstep.client import Outcome, Session
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import OverBudget, PushstepError
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.workers.wire import RawWorker, Wire, created, named, untouched

MODEL = "streams"
STALL_S = 1.0
STAGING_BYTES = 1000
_workers = itertools.count()


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with little staging and little patience."""
    options = ("--stall-s", str(STALL_S), "--staging-bytes", str(STAGING_BYTES))
    with running_server(tmp_path_factory.mktemp("tight") / "data", *options) as running:
        yield running


@pytest.fixture(scope="module")
def owner(tight: RunningServer) -> Session:
    return created(tight, MODEL)


@pytest.fixture
def wire(tight: RunningServer) -> Iterator[Wire]:
    opened = Wire(tight.grpc)
    yield opened
    opened.close()


@pytest.fixture
def raw(owner: Session, wire: Wire) -> RawWorker:
    return RawWorker(wire, MODEL, f"raw-{next(_workers)}")


class OpenPush:
    """A push that goes on for as long as the test wants: it sends what it is given."""

    def __init__(self, raw: RawWorker, first: bytes, method: str = "Push") -> None:
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._messages.put(first)
        self.call = raw.wire.start(method, iter(self._messages.get, None))

    def send(self, message: bytes) -> None:
        self._messages.put(message)

    def end(self) -> None:
        self._messages.put(None)

    def refusal(self) -> PushstepError:
        with pytest.raises(grpc.RpcError) as caught:
            list(self.call)
        self.end()
        return named(caught.value)


def rows_header(raw: RawWorker, count: int) -> bytes:
    """Declares rows of the table, 20 bytes each."""
    return pb.PushRequest(header=raw.header([raw.rows("table", count)])).SerializeToString()


def takes_work(raw: RawWorker) -> bool:
    """Whether a small push of a worker of its own is taken."""
    try:
        raw.push(raw.good())
    except grpc.RpcError as error:
        assert isinstance(named(error), OverBudget)
        return False
    raw.advance()
    return True


FULL_ROWS = STAGING_BYTES // 20


@pytest.mark.parametrize("method", ["Push", "Exchange", "TakeSteps"])
def test_over_budget_says_when_to_come_back(method: str, tight: RunningServer, raw: RawWorker) -> None:
    """The whole declared size is set aside at the header; what does not fit is told before its body is read."""
    other = RawWorker(raw.wire, MODEL, f"raw-{next(_workers)}")
    with untouched(tight, MODEL):
        held = OpenPush(other, rows_header(other, FULL_ROWS), method)
        wait_until(lambda: not _fits(raw))
        error = raw.wire.refused(method, raw.good())
        assert isinstance(error, OverBudget)
        assert error.retry_after_s is not None
        assert 0 < error.retry_after_s < 10
        assert not error.consumed
        held.call.cancel()
        held.end()
    wait_until(lambda: takes_work(raw))


def _fits(raw: RawWorker) -> bool:
    """Whether a header's bytes are set aside; its body is missing, so nothing is pushed."""
    header = pb.PushRequest(header=raw.header([raw.dense("bias")]), commit=pb.PushCommit())
    return raw.wire.refused("Push", [header.SerializeToString()]).code == "wrong_length"


def test_more_than_all_staging_is_never_told_to_wait(tight: RunningServer, raw: RawWorker) -> None:
    with untouched(tight, MODEL):
        error = raw.wire.refused("Push", [rows_header(raw, STAGING_BYTES // 20 + 1)])
    assert (error.code, error.retry_after_s) == ("wrong_length", None)


def test_a_model_whose_push_can_never_fit_is_refused_at_creation(tight: RunningServer) -> None:
    with pytest.raises(PushstepError) as caught:
        tight.connect("too-large").create({"w": np.zeros(STAGING_BYTES // 4 + 1, np.float32)})
    assert caught.value.code == "over_capacity"
    assert "--staging-bytes" in caught.value.message


def test_a_stream_that_crawls_has_stalled(tight: RunningServer, raw: RawWorker) -> None:
    """A byte now and then is no progress: it would hold what was set aside for it for as long as it likes."""
    other = RawWorker(raw.wire, MODEL, f"raw-{next(_workers)}")
    with untouched(tight, MODEL):
        crawling = OpenPush(other, rows_header(other, FULL_ROWS))
        for byte in range(FULL_ROWS):
            if crawling.call.done():
                break
            crawling.send(pb.PushRequest(offset=byte, payload=b"\0").SerializeToString())
            threading.Event().wait(STALL_S / 4)
        assert byte < FULL_ROWS - 1
        assert crawling.refusal().code == "stream_stalled"
    assert takes_work(raw)


@pytest.mark.parametrize("sent", ["nothing", "the header", "some of the body"])
def test_a_stalled_stream_is_dropped_and_forgotten(sent: str, tight: RunningServer, raw: RawWorker) -> None:
    other = RawWorker(raw.wire, MODEL, f"raw-{next(_workers)}")
    header, body, commit = other.good()
    with untouched(tight, MODEL):
        if sent == "nothing":
            messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            call = raw.wire.start("Push", iter(messages.get, None))
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            messages.put(None)
            error = named(caught.value)
        else:
            stalled = OpenPush(other, header)
            if sent == "some of the body":
                stalled.send(pb.PushRequest(payload=bytes(8)).SerializeToString())
            error = stalled.refusal()
    assert error.code == "stream_stalled"
    assert error.fields["seconds"] == str(STALL_S)
    assert takes_work(raw)
    assert other.push([header, body, commit]).receipt.identity == other.identity()


@pytest.mark.parametrize("sent", [0, 1, 2], ids=["the header", "half the body", "the body"])
def test_a_cancelled_push_leaves_nothing(sent: int, tight: RunningServer, raw: RawWorker) -> None:
    """Everything but the end of the stream has arrived, and still nothing was pushed."""
    other = RawWorker(raw.wire, MODEL, f"raw-{next(_workers)}")
    with untouched(tight, MODEL):
        held = OpenPush(other, rows_header(other, FULL_ROWS))
        for part in range(sent):
            size = 20 * FULL_ROWS // 2
            held.send(pb.PushRequest(offset=part * size, payload=bytes(size)).SerializeToString())
        wait_until(lambda: not _fits(raw))
        held.call.cancel()
        held.end()
        wait_until(lambda: _fits(raw))
    assert takes_work(raw)
    assert other.push(other.good()).receipt.identity == other.identity()


def test_a_stream_that_ends_without_a_commit_is_no_push(tight: RunningServer, raw: RawWorker) -> None:
    """A cancelled stream ends just so, as far as gRPC tells."""
    messages = raw.good()
    with untouched(tight, MODEL):
        for method in ("Push", "Exchange", "TakeSteps"):
            error = raw.wire.refused(method, messages[:-1])
            assert error.code == "malformed_frame"
            assert "commit" in error.message
    assert raw.push(messages).receipt.identity == raw.identity()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (0, 2, 1)], ids=str)
@pytest.mark.parametrize("method", ["Push", "Exchange", "TakeSteps"])
def test_header_chunk_and_commit_may_be_one_message(
    method: str, order: tuple[int, ...], tight: RunningServer, raw: RawWorker
) -> None:
    """Fields that follow each other are one message's, in whatever order."""
    messages = raw.good()
    answers = raw.wire.answers(method, [b"".join(messages[part] for part in order)])
    if method == "Push":
        assert pb.PushResponse.FromString(answers[0]).receipt.identity == raw.identity()
    else:
        (answer,) = (pb.PullResponse.FromString(message) for message in answers[:1])
        assert answer.header.receipt.identity == raw.identity()


def test_what_comes_after_the_commit_is_not_read(tight: RunningServer, raw: RawWorker) -> None:
    """The commit ends a push; waiting for the stream's own end would only cost time."""
    held = OpenPush(raw, b"".join(raw.good()))
    (answer,) = held.call
    assert pb.PushResponse.FromString(answer).receipt.identity == raw.identity()
    held.end()


def test_a_deadline_in_mid_stream_leaves_nothing(tight: RunningServer, raw: RawWorker) -> None:
    messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    messages.put(raw.good()[0])
    with untouched(tight, MODEL), pytest.raises(grpc.RpcError) as caught:
        raw.wire.answers("Push", iter(messages.get, None), timeout_s=0.2)
    messages.put(None)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: takes_work(raw))


def test_a_slow_stream_does_not_stop_the_others(tight: RunningServer, raw: RawWorker, owner: Session) -> None:
    slow = RawWorker(raw.wire, MODEL, f"raw-{next(_workers)}")
    header, body, commit = slow.good()
    held = OpenPush(slow, header)
    held.send(body)
    version = owner.push({"bias": np.ones(4, np.float32)}).version
    assert takes_work(raw)
    held.send(commit)
    held.end()
    (answer,) = held.call
    assert pb.PushResponse.FromString(answer).receipt.version == version + 2


def test_workers_of_one_name_in_two_models_do_not_meet(server: RunningServer) -> None:
    """Their epochs and sequences are equal, and their steps are long enough to be under way together."""
    gradient = {"w": np.ones(1_500_000, np.float32)}
    sessions = [server.connect(f"namesake-{number}", "same") for number in range(2)]
    outcomes: list[Any] = []
    start = threading.Barrier(2, timeout=60)

    def push(session: Session) -> None:
        for _ in range(6):
            start.wait()
            try:
                outcomes.append(session.push(gradient).outcome)
            except PushstepError as error:
                outcomes.append(error)

    for session in sessions:
        session.create(gradient)
    threads = [threading.Thread(target=push, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [Outcome.APPLIED] * 12


def test_a_reader_that_goes_away_leaves_nothing_in_the_log(data: Path) -> None:
    """Whatever it was being sent: a worker that is stopped does that to each of its calls."""
    values = {"w": np.zeros((500_000, 4), np.float32)}
    with running_server(data) as server:
        server.connect("m").create(values)
        pull = pb.PullRequest(model="m")
        rows = pb.PullRowsRequest(model="m", parameter="w", ids=range(400_000))
        for method, request in (
            ("Pull", pull),
            ("PullRows", rows),
            ("PullState", pb.PullStateRequest(model="m")),
        ):
            for _ in range(5):
                wire = Wire(server.grpc)
                call = wire.start(method, [request.SerializeToString()])
                next(call)
                call.cancel()
                wire.close()
        with contextlib.closing(Wire(server.grpc)) as wire:
            raw = RawWorker(wire, "m", "raw")
            for _ in range(5):
                header = raw.header([raw.rows("w", 1)])
                call = wire.start("Exchange", raw.whole(header, [[torch.tensor([1]), torch.ones(1, 4)]]))
                raw.advance()
                next(call)
                call.cancel()
            raw.push(raw.whole(raw.header([raw.rows("w", 1)]), [[torch.tensor([1]), torch.ones(1, 4)]]))
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NOISE = {
    "nothing": [b""],
    "random": [random.Random(7).randbytes(size) for size in (1, 9, 100, 5000, 200_000)],
    "zeros": [bytes(100_000)],
    "http/1": [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"POST /v1/models HTTP/1.1\r\n\r\n"],
    "a broken request": [
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET\r\n\r\n",
    ],
    "endless headers": [b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 30_000],
    "two lengths": [b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabc"],
    "http/2 and noise": [PREFACE + random.Random(8).randbytes(3000), PREFACE + b"\xff\xff\xff" + bytes(64)],
    "tls": [bytes.fromhex("16030100c8010000c40303") + bytes(200)],
}


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("port", ["grpc", "http", "unix"])
def test_noise_on_a_port(noise: str, port: str, tight: RunningServer, raw: RawWorker) -> None:
    with untouched(tight, MODEL):
        for sent in NOISE[noise]:
            with _connection(tight, port) as connection, contextlib.suppress(OSError):
                connection.settimeout(0.2)
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
    assert tight.rest("GET", "/healthz").json() == {"status": "ok"}
    assert takes_work(raw)
    assert tight.process.poll() is None


def _connection(server: RunningServer, port: str) -> socket.socket:
    if port == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(server.unix)
        return connection
    host, _, number = getattr(server, port).rpartition(":")
    return socket.create_connection((host, int(number)))


def test_nothing_was_an_accident(tight: RunningServer, owner: Session) -> None:
    """After all of the above: no error that the catalogue does not name, and the numbers still right."""
    owner.push({"bias": torch.zeros(4)})
    log = Path(tight.log).read_text()
    assert "internal error" not in log
    assert "never retrieved" not in log
