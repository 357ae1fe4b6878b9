"""A wait of any kind says what for and how long, in the log; one for other workers does not end by itself."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pushstep.client import Session, connect
from pushstep.client.attachment.manifest import of_arrays
from pushstep.client.membership import uploads
from pushstep.client.membership.member import Member
from pushstep.client.transport import waiting
from pushstep.client.transport.channel import Transport
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import ServerUnavailable
from pushstep.proto.wire.layout import Layout
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.servers.operators import show_worker
from tests.support.servers.proxy import Proxy

VALUES = {"a": np.zeros(4, np.float32)}
ONES = {"a": np.ones(4, np.float32)}
SYNC = {"policy": "sync", "min_workers": 1, "timeout_s": None}


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What is said of waits, which are long here after a fifth of a second."""
    monkeypatch.setattr(waiting, "SAY_AFTER_S", 0.2)
    monkeypatch.setattr(waiting, "_LOOK_S", 0.05)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("pushstep.client")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


@contextmanager
def meanwhile(call: Callable[[], Any]) -> Iterator[threading.Thread]:
    """The call in a thread, which has to end well with the block."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    yield thread
    thread.join(30)
    assert not thread.is_alive()
    assert failed == []


class Case:
    """Owns what a case has started."""

    def __init__(self, server: RunningServer, model: str, stack: ExitStack) -> None:
        self.server = server
        self.model = model
        self.stack = stack

    def session(self, worker: str, **options: Any) -> Session:
        session = self.server.connect(
            self.model, worker, **{"timeout_s": 0.45, "retry_for_s": 1.5, **options}
        )
        self.stack.callback(session.close)
        return session

    def created(self, worker: str, policy: Any = None, **options: Any) -> Session:
        session = self.session(worker, **options)
        session.create(VALUES, policy=policy)
        return session


Waiting = tuple[Callable[[], Any], Callable[[], Any], str]


def a_round(case: Case, **options: Any) -> Waiting:
    one, other = case.created("w0", SYNC, **options), case.created("w1")
    return lambda: one.push(ONES), lambda: other.push(ONES), "under policy sync: w1 has not pushed"


def a_round_through_shared_memory(case: Case) -> Waiting:
    return a_round(case, shared_memory=True)


def a_round_that_lacks_workers(case: Case) -> Waiting:
    one = case.created("w0", {**SYNC, "min_workers": 2})

    def come() -> None:
        case.created("w1").push(ONES)

    return lambda: one.push(ONES), come, "under policy sync: 1 of 2 workers are there"


def a_slower_worker(case: Case) -> Waiting:
    one, other = case.created("w0", {"policy": "bounded", "bound": 0}), case.created("w1")
    one.push(ONES)
    return (
        lambda: one.push(ONES),
        lambda: other.push(ONES),
        "under policy bounded: it is 0 clocks ahead of w1",
    )


def prefetched(case: Case) -> Waiting:
    model = torch.nn.Linear(2, 2)
    session = case.session("w0")
    remote = session.attach(torch.optim.Adagrad(model.parameters()), policy=SYNC, prefetch=True)
    other = case.session("w1")
    other_model = torch.nn.Linear(2, 2)
    second = other.attach(torch.optim.Adagrad(other_model.parameters()))

    def step(model: torch.nn.Module, remote: Any) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        remote.step()

    step(model, remote)
    return remote.synchronize, lambda: step(other_model, second), "under policy sync: w1 has not pushed"


def a_taken_name(case: Case) -> Waiting:
    holder = case.stack.enter_context(held_by_another_process(case))
    late = case.session("w0", retry_for_s=20)
    return lambda: late.push(ONES), holder, "'w0' is live for another"


def a_model_that_another_creates(case: Case) -> Waiting:
    first = case.session("w0", retry_for_s=20)
    manifest = pb.JoinRequest(model=case.model, worker="w9")
    made, values = of_arrays(VALUES, None)
    manifest.manifest.CopyFrom(made)
    creator = Transport(case.server.grpc, 5.0)
    case.stack.callback(creator.close)
    ticket = creator.join(manifest).create

    def create() -> None:
        layout = Layout(ticket.manifest)
        tensors = {(slot, ""): values[slot.name] for slot in layout.slots}
        creator.upload(*uploads.creation(case.model, ticket, layout, tensors, ()))

    return lambda: first.create(VALUES), create, "is being created by worker 'w9'"


def a_silent_server(case: Case) -> Waiting:
    proxy = case.stack.enter_context(Proxy(case.server.grpc))
    one = case.created("w0", address=proxy.address, timeout_s=20.0)
    proxy.hold("down")
    return lambda: one.push(ONES), proxy.release, "it does not answer"


def a_silent_server_of_regions(case: Case) -> Waiting:
    proxy = case.stack.enter_context(Proxy(case.server.grpc))
    one = case.created("w0", address=proxy.address, timeout_s=20.0, shared_memory=True)
    proxy.hold("down")
    return lambda: one.push(ONES), proxy.release, "it does not answer"


def a_server_that_is_away(case: Case) -> Waiting:
    proxy = case.stack.enter_context(Proxy(case.server.grpc))
    one = case.created("w0", address=proxy.address, retry_for_s=20.0)
    proxy.refuse()
    return lambda: one.push(ONES), proxy.accept, "UNAVAILABLE"


def no_room(case: Case) -> Waiting:
    """Another push holds the server's memory; what waits is told so when the server will not have it wait longer."""
    proxy = case.stack.enter_context(Proxy(case.server.grpc))
    size = 240_000  # large enough that its header comes first
    values = {"a": np.zeros(size, np.float32)}
    holder = case.session("w1", address=proxy.address, timeout_s=20.0, retry_for_s=20.0)
    holder.create(values)
    late = case.session("w0", timeout_s=20.0, retry_for_s=20.0)
    late.create(values)
    proxy.stop_after("up", 100_000)
    case.stack.enter_context(meanwhile(lambda: holder.push({"a": np.ones(size, np.float32)})))
    wait_until(lambda: proxy.stopped)
    return lambda: late.push({"a": np.ones(size, np.float32)}), proxy.release, "of --staging-bytes are free"


@contextmanager
def held_by_another_process(case: Case) -> Iterator[Callable[[], None]]:
    """A worker that is live, of which nobody here knows the process; it leaves when what this gives is called."""
    case.created("w7").close()
    transport = Transport(case.server.grpc, 5.0)
    try:
        member = Member(transport.join(pb.JoinRequest(model=case.model, worker="w0")).member)
        yield lambda: transport.leave(pb.LeaveRequest(model=case.model, identity=member.identity()))
    finally:
        transport.close()


CASES: list[Callable[[Case], Waiting]] = [
    a_round,
    a_round_through_shared_memory,
    a_round_that_lacks_workers,
    a_slower_worker,
    prefetched,
    a_taken_name,
    a_model_that_another_creates,
    a_silent_server,
    a_silent_server_of_regions,
    a_server_that_is_away,
]


def check(case: Case, make: Callable[[Case], Waiting], lines: list[str]) -> None:
    call, release, reason = make(case)
    with meanwhile(call):
        wait_until(lambda: [line for line in lines if reason in line])
        until_s = time.monotonic() + 1.7  # past what retry_for_s gives to a silent server
        wait_until(lambda: time.monotonic() > until_s)
        release()
    said = next(line for line in lines if reason in line)
    assert " has waited for " in said and f"of model {case.model!r}" in said
    assert any("goes on after" in line for line in lines)
    assert len([line for line in lines if reason in line]) <= 3, "and not again and again"


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_a_wait_says_what_for(
    server: RunningServer, model_name: str, lines: list[str], make: Callable[[Case], Waiting]
) -> None:
    with ExitStack() as stack:
        check(Case(server, model_name, stack), make, lines)


def test_a_wait_for_room_says_so(data: Path, lines: list[str]) -> None:
    with running_server(data, "--staging-bytes", "2400000", "--stall-s", "2") as server, ExitStack() as stack:
        check(Case(server, "m", stack), no_room, lines)


def test_a_wait_for_a_server_that_starts_says_so(lines: list[str]) -> None:
    """Nothing listens yet."""
    with Proxy("127.0.0.1:1") as proxy:
        address = proxy.address
    with pytest.raises(ServerUnavailable, match="no pushstep server"):
        connect(address, model="m", wait_s=1.0)
    assert any("has waited for" in line for line in lines)


def test_steps_that_each_wait_a_little_are_not_a_line_each(
    server: RunningServer, model_name: str, lines: list[str]
) -> None:
    with ExitStack() as stack:
        case = Case(server, model_name, stack)
        one, other = case.created("w0", SYNC), case.created("w1")
        for _ in range(4):
            with meanwhile(lambda: one.push(ONES)):
                wait_until(lambda: show_worker(server, model_name, "w0")["round"] == "present")
                until_s = time.monotonic() + 0.4
                wait_until(lambda until_s=until_s: time.monotonic() > until_s)
                other.push(ONES)
        # of the policy's reason: on a slow machine the server's word may come after a line of its own
        assert len([line for line in lines if "w1 has not pushed yet" in line]) == 1
