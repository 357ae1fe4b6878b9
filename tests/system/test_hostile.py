"""A hostile process beside an honest worker: the model becomes, bit for bit, what it becomes without it.

Every kind of rubbish is refused by name and counted, the twentieth in a row is the last that is read, and from then on
headers are refused before their bodies and connections end, until an operator lets the worker out again.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pushstep.client import Outcome, Session
from pushstep.proto import training_pb2 as pb
from tests.support.processes.forked import Forked, workers
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.servers.operators import release, set_gate, show_worker
from tests.support.workers import hostile
from tests.support.workers.wire import PARAMETERS, RawWorker, Wire, created, state_of

# what each is refused with, and whether it counts against the worker whose name it bears
REFUSED = {
    "garbage": ("malformed_frame", False),  # nobody's
    "garbage behind a header": ("malformed_frame", True),
    "no commit": ("malformed_frame", False),  # as a stream that was cut looks
    "a short body": ("wrong_length", True),
    "a long body": ("wrong_length", True),
    "beyond the arena": ("malformed_frame", True),
    "endless rows": ("wrong_length", True),
    "another manifest": ("manifest_changed", False),  # an honest worker's, when a group was added
    "wild samples": ("number_out_of_range", False),  # nobody's, as what is no message
    "a version to come": ("malformed_frame", True),
    "NaN": ("nonfinite_gradient", True),
    "infinity": ("nonfinite_gradient", True),
    "a huge norm": ("norm_outlier", True),
    "another digest": ("digest_mismatch", True),
    "a gap": ("out_of_order", False),
    "an epoch to come": ("unknown_worker", False),
    "another timeline": ("superseded", False),
    "another model's": ("model_lost", False),
    "a stale epoch": ("fenced", False),  # nor against who has the name now
}
CONNECTIONS = 20
IDLE_CONNECTIONS = 300
PUSHES = 20  # between one look and the next


@contextlib.contextmanager
def hostile_process(server: RunningServer, model: str) -> Iterator[Forked]:
    process = workers().piped(hostile.__name__, server.grpc, model, str(CONNECTIONS))
    try:
        yield process
    finally:
        process.end()


def line_of(process: Forked) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def drawn(number: int) -> dict[str, Any]:
    generator = np.random.default_rng(number)
    return {name: np.asarray(generator.normal(size=v.shape), np.float32) for name, v in PARAMETERS.items()}


@pytest.mark.timeout(300)  # for a process at nice 19 on a machine that has other things to do
def test_nothing_comes_of_it(server: RunningServer, model_name: str) -> None:
    beside, alone = f"{model_name}-beside", f"{model_name}-alone"
    honest: dict[str, Session] = {model: created(server, model) for model in (beside, alone)}
    pushed = 0

    def push(count: int) -> None:
        """The same to both models."""
        nonlocal pushed
        for _ in range(count):
            receipts = [session.push(drawn(pushed)) for session in honest.values()]
            assert [receipt.outcome for receipt in receipts] == [Outcome.APPLIED] * 2
            pushed += 1

    gate = {"norm_outlier": 20.0, "norm_warmup": 5}
    for model in honest:
        set_gate(server, model, **gate)
    push(PUSHES)
    with hostile_process(server, beside) as process:
        push(PUSHES)
        assert json.loads(line_of(process)) == {what: code for what, (code, _) in REFUSED.items()}
        assert line_of(process) == "quarantined"
        push(PUSHES)
        while int(line_of(process).split()[1]) < 1:  # it floods, until connections of its have been ended
            push(1)
        idle = [socket.create_connection(address_of(server), timeout=5) for _ in range(IDLE_CONNECTIONS)]
        for connection in idle:
            connection.sendall(hostile.PREFACE + hostile.frame(hostile.HEADERS, 0, 1, b"\x83\x86"))
        push(PUSHES)
        for connection in idle:
            connection.close()
    states = [state_of(server, model) for model in (beside, alone)]
    for state in states:  # what names the model itself
        state["uid"] = None
        for group in state["groups"]["param_groups"]:
            group["etag"] = None
    assert states[0] == states[1]
    assert states[0]["version"] == pushed + 1

    shown = show_worker(server, beside, hostile.NAME)
    counted = [what for what, (_, counts) in REFUSED.items() if counts]
    assert (shown["quarantined"], shown["refused_in_row"]) == (True, 20)
    consumed = 4 + 20 - len(counted)  # those whose bodies were whole, and the NaN after them
    assert shown["outcomes"] == {"rejected": consumed}
    events = server.rest("GET", f"/v1/models/{beside}/events").json()["events"]
    theirs = [event for event in events if event["by"] == hostile.NAME and event["kind"].startswith("push_")]
    assert [event["code"] for event in theirs][: len(counted)] == [REFUSED[what][0] for what in counted]
    assert len(theirs) == 20

    # an operator lets it out: it is a worker again, and is in again for the next twenty
    release(server, beside, hostile.NAME)
    wire = Wire(server.grpc)
    again = RawWorker(wire, beside, hostile.NAME, takeover=True)
    assert again.push(again.good()).receipt.version == pushed + 2
    again.advance()
    hostile.until_quarantined(again)
    assert show_worker(server, beside, hostile.NAME)["outcomes"] == {"rejected": consumed + 20, "applied": 1}
    wire.close()


def address_of(server: RunningServer) -> tuple[str, int]:
    host, _, port = server.grpc.rpartition(":")
    return host, int(port)


@pytest.fixture
def caught(server: RunningServer, model_name: str) -> RawWorker:
    """A worker in quarantine."""
    created(server, model_name)
    raw = RawWorker(Wire(server.grpc), model_name, hostile.NAME)
    hostile.until_quarantined(raw)
    raw.wire.close()  # it has ended, or is about to
    return raw


@contextlib.contextmanager
def connections(server: RunningServer, caught: RawWorker) -> Iterator[list[hostile.Connection]]:
    """Three that send headers of a worker in quarantine."""
    message = pb.PushRequest(header=caught.header([])).SerializeToString()
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(contextlib.closing(hostile.Connection(server.grpc, message)))
            for _ in range(3)
        ]


def test_its_headers_are_refused_before_their_bodies(server: RunningServer, caught: RawWorker) -> None:
    """No body follows, and none is waited for."""
    header = caught.good()[0]
    for method in ("Push", "Exchange", "TakeSteps"):
        wire = Wire(server.grpc)
        assert wire.refused(method, [header]).code == "quarantined"
        wire.close()


def test_its_connections_end_and_nobody_elses_do(
    server: RunningServer, model_name: str, caught: RawWorker
) -> None:
    """It is told why, once, and then the connection ends; what it sends beside that is not answered."""
    with connections(server, caught) as opened:
        told, beside, idle = opened
        told.open(1)
        beside.open(5)
        with server.connect(model_name, "another") as session:
            assert session.push({"bias": np.ones(4, np.float32)}).outcome is Outcome.APPLIED
        wait_until(lambda: not (alive(told) and alive(beside)), 60)
        ended = [connection for connection in (told, beside) if not alive(connection)]
        assert [connection.answered for connection in ended] == [1]
        assert alive(idle)
        assert sum(connection.answered for connection in opened) == 1


def test_little_is_taken_in_of_its_connections(
    server: RunningServer, model_name: str, caught: RawWorker
) -> None:
    """Whatever it sends: calls beyond what a connection has room for cost gRPC a core, though none of them gets through."""
    with connections(server, caught) as (first, narrowed, free):
        first.open(1)
        narrowed.open(1)
        ignored = hostile.frame(0xFA, 0, 0, bytes(16_000))
        sent = {narrowed: 0, free: 0}
        while sent[free] < 64 << 20:
            for connection in sent:
                with contextlib.suppress(BlockingIOError):
                    if not connection.due:
                        connection.due = ignored
                    connection.send()
                    sent[connection] += 0 if connection.due else len(ignored)
        assert sent[narrowed] < sent[free] / 4


def alive(connection: hostile.Connection) -> bool:
    """Whether a connection is open, once what has come on it was read."""
    try:
        connection.hear()
        connection.send()
    except OSError:
        return False
    return True
