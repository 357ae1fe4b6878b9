"""TakeSteps: pushes over one call that stays open, each answered before the next one is read."""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from typing import Any, cast

import grpc
import numpy as np
import pytest
import torch

from pushstep.client import connect
from pushstep.client.membership.receipt import Outcome
from pushstep.proto import training_pb2 as pb
from pushstep.proto.wire.frames import unpack
from pushstep.server.worker_door import steps
from pushstep.server.worker_door.steps import StepCalls
from tests.support.servers.harness import (
    RunningServer,
    kill_and_restart,
    running_server,
    start_server,
    wait_until,
)
from tests.support.workers.wire import RawWorker, Wire, created, named, untouched

MODEL = "m"
GRADIENT = {"bias": np.ones(4, np.float32)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("steps") / "data") as running:
        created(running, MODEL)
        yield running


@pytest.fixture
def raw(server: RunningServer) -> Iterator[RawWorker]:
    wire = Wire(server.grpc)
    yield RawWorker(wire, MODEL, "raw", takeover=True)
    wire.close()


class OpenCall:
    """A call of TakeSteps by hand."""

    def __init__(self, wire: Wire) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.answers = wire.start("TakeSteps", iter(self._requests.get, None), timeout_s=60.0)

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self._requests.put(message)

    def next(self) -> pb.PullHeader:
        """The header of the next answer."""
        fields, _ = unpack(next(self.answers), pb.PullResponse)
        assert fields is not None
        return fields.header

    def close(self) -> None:
        self._requests.put(None)


def test_pushes_and_exchanges_over_one_call(raw: RawWorker) -> None:
    """In one message or in several; the receipt alone unless the push asks for more."""
    with closing(OpenCall(raw.wire)) as call:
        versions = []
        for number in range(6):
            options = {"pull": pb.PullOptions()} if number % 2 else {}
            messages = raw.good(**options)
            call.send(*([b"".join(messages)] if number < 4 else messages))
            header = call.next()
            assert header.receipt.identity == raw.identity()
            versions.append(header.receipt.version)
            assert bool(header.segments) == bool(options)
            for _ in header.segments[1:]:  # the first one's chunk came with the header
                assert unpack(next(call.answers), pb.PullResponse)[1] is not None
            raw.advance()
        assert versions == list(range(versions[0], versions[0] + 6))


def test_a_refusal_ends_the_call_and_what_was_sent_behind_it_is_no_push(
    server: RunningServer, raw: RawWorker
) -> None:
    call = OpenCall(raw.wire)
    with untouched(server, MODEL), closing(call):
        call.send(b"".join(raw.good(base_version=2**40)), b"".join(raw.good()))
        with pytest.raises(grpc.RpcError) as caught:
            call.next()
        assert named(caught.value).code == "malformed_frame"


def test_what_is_cut_before_its_commit_is_no_push(server: RunningServer, raw: RawWorker) -> None:
    header, chunk, commit = raw.good()
    with closing(OpenCall(raw.wire)) as call:
        with untouched(server, MODEL):
            call.send(header, chunk)
            call.answers.cancel()
        with pytest.raises(grpc.RpcError):
            call.next()
    assert raw.push([header, chunk, commit]).receipt.identity == raw.identity()


def test_a_session_keeps_its_call(server: RunningServer) -> None:
    """Whatever is refused, or not small, is beside it."""
    session = server.connect(MODEL, "kept")
    session.push(GRADIENT)
    transport: Any = session._transport
    first = transport._steps._call
    for _ in range(3):
        session.push(GRADIENT)
        session.exchange(GRADIENT)
    assert transport._steps._call is first
    session.close()
    assert transport._steps._call is None


def test_a_message_has_to_fit_the_link(server: RunningServer) -> None:
    """What the link does not carry in one message has a call of its own; an open call that ends unanswered tells."""
    gradient = {"w": np.ones(100_000, np.float32)}
    session = server.connect("larger", "slow")
    session.create({"w": np.zeros(100_000, np.float32)})
    transport: Any = session._transport
    pace = transport.watchdog.pace
    assert session.push(gradient).version == 1
    first = transport._steps._call
    assert first is not None
    first._requests.put(None)  # ends, as a server ends one whose message does not come
    assert session.push(gradient).version == 2
    assert transport._steps._call is None
    assert pace.chunk_bytes > 2 * gradient["w"].nbytes  # grown again: the messages left at once
    assert session.push(gradient).version == 3
    assert transport._steps._call is not None


def test_a_session_that_is_dropped_ends_its_call(server: RunningServer) -> None:
    """Or else a thread of gRPC's would wait for its next push for ever."""

    def waiting() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if not thread.name.startswith("pushstep-")}

    before = waiting()
    session = connect(server.grpc, model=MODEL, worker="dropped", shared_memory=False)
    session.push(GRADIENT)
    own = waiting() - before
    assert own
    del session
    gc.collect()
    wait_until(lambda: not waiting() & own)


def test_a_call_that_its_server_has_forgotten_is_opened_again(server: RunningServer) -> None:
    session = server.connect(MODEL, "idle")
    session.push(GRADIENT)
    transport: Any = session._transport
    first = transport._steps._call
    first._used_s -= 40.0  # half of IDLE_S is over
    assert session.push(GRADIENT).outcome is Outcome.APPLIED
    assert transport._steps._call is not first
    transport._steps._call._requests.put(None)  # ends, as the server ends it
    assert session.push(GRADIENT).outcome is Outcome.APPLIED


def test_a_session_goes_on_at_a_server_that_has_restarted(tmp_path: Any) -> None:
    server = start_server(tmp_path / "data")
    session = created(server, MODEL)
    assert server.rest("POST", f"/v1/models/{MODEL}/snapshots").status_code < 300
    server = kill_and_restart(server)
    with pytest.warns(RuntimeWarning, match="was restored"):
        assert session.push(GRADIENT).outcome is Outcome.SUPERSEDED
    assert session.push(GRADIENT).outcome is Outcome.APPLIED
    session.close()
    assert server.stop() == 0


def test_a_server_stops_while_calls_wait_for_their_next_push(tmp_path: Any) -> None:
    """Not at the end of its grace: the call ends, without an error."""
    server = start_server(tmp_path / "data", "--drain-s", "300")
    created(server, MODEL).close()
    with closing(Wire(server.grpc)) as wire, closing(OpenCall(wire)) as call:
        call.send(b"".join(RawWorker(wire, MODEL).good()))
        assert call.next().receipt.version
        assert server.stop() == 0
        assert list(call.answers) == []


def test_an_older_server_gets_a_call_for_each_push(server: RunningServer) -> None:
    session = server.connect(MODEL, "newer")
    transport: Any = session._transport
    start = transport._steps._start

    def unknown(requests: Iterator[bytes]) -> Any:
        return transport._call("TakeNothing", requests)

    transport._steps._start = unknown
    assert session.push(GRADIENT).outcome is Outcome.APPLIED
    transport._steps._start = start
    assert session.exchange(GRADIENT)[0].outcome is Outcome.APPLIED
    assert transport._steps._call is None


@pytest.mark.parametrize("stops", [False, True], ids=["it waits too long", "the server stops"])
def test_a_call_that_waits_is_ended(stops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "LOOK_S", 0.0)
    monkeypatch.setattr(steps, "IDLE_S", 60.0 if stops else 0.0)

    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def taken() -> list[bytes]:
        calls = StepCalls(cast(Any, None), cast(Any, None), 10.0, None)
        if stops:
            asyncio.get_running_loop().call_soon(calls.end)
        return [answer async for answer in calls.take(never())]

    assert asyncio.run(taken()) == []


def test_a_push_in_two_segments_goes_over_the_call(server: RunningServer) -> None:
    session = server.connect(MODEL, "two")
    gradients = {name: np.ones(shape, np.float32) for name, shape in (("table", (5, 3)), ("bias", (4,)))}
    receipt, values = session.exchange(gradients)
    assert receipt.outcome is Outcome.APPLIED
    transport: Any = session._transport
    assert transport._steps._call is not None
    assert {name: torch.from_numpy(value).isfinite().all() for name, value in values.items()}
