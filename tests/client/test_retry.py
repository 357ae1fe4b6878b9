"""Lost replies and cut connections: every push is applied exactly once, or the worker is told."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pushstep.client import Outcome, Receipt, Session, connect
from pushstep.client.transport.retry import TransportFailure
from pushstep.optim import Adagrad
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import (
    Draining,
    FateUnknown,
    Fenced,
    NoAnswer,
    NonfiniteGradient,
    OverBudget,
)
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.servers.proxy import PIECE_BYTES, Proxy
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import adagrad, backward
from tests.support.trainings.twins import Twins
from tests.support.workers.counting import counts, create, grads
from tests.support.workers.wire import Wire


@pytest.fixture
def proxy(server: RunningServer) -> Iterator[Proxy]:
    with Proxy(server.grpc) as made:
        yield made


@pytest.fixture
def through(server: RunningServer, model_name: str, proxy: Proxy) -> Iterator[Session]:
    """A worker behind the proxy, whose model exists."""
    with connect(
        proxy.address, shared_memory=False, model=model_name, worker="w0", timeout_s=10.0, retry_for_s=20.0
    ) as session:
        create(session)
        yield session


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def version_of(server: RunningServer, model: str) -> int:
    answer = server.rest("GET", f"/v1/models/{model}")
    return int(answer.json()["version"]) if answer.status_code == 200 else -1


def lose_the_reply(
    server: RunningServer,
    proxy: Proxy,
    pool: ThreadPoolExecutor,
    model: str,
    call: Callable[[], Any],
    done: Callable[[], bool],
) -> Any:
    """Run `call`, hold its answer back until the server has acted, and cut the connection."""
    proxy.hold("down")
    running: Future[Any] = pool.submit(call)
    wait_until(done)
    assert not running.done()
    proxy.cut()
    proxy.release()
    return running.result(30)


@pytest.mark.parametrize("call", ["push", "exchange"])
def test_a_lost_reply(
    server: RunningServer, through: Session, proxy: Proxy, pool: ThreadPoolExecutor, call: str
) -> None:
    for number in range(3):

        def send(number: int = number) -> Receipt:
            if call == "push":
                return through.push(grads(number))
            receipt, got = through.exchange(grads(number))
            assert got["w"].tolist() == server_values(server, through)
            return receipt

        receipt = lose_the_reply(
            server,
            proxy,
            pool,
            through.model,
            send,
            lambda number=number: version_of(server, through.model) == number + 1,
        )
        assert (receipt.outcome, receipt.version, receipt.sequence) == (
            Outcome.APPLIED,
            number + 1,
            number + 1,
        )
        assert receipt.duplicates >= 1
    assert counts(through, 3) == [1, 1, 1]
    worker = server.rest("GET", f"/v1/models/{through.model}/workers").json()["workers"][0]
    assert worker["outcomes"] == {"applied": 3}
    assert worker["duplicates"] >= 3


def server_values(server: RunningServer, session: Session) -> list[float]:
    values: list[float] = server.connect(session.model, "reader").pull()["w"].tolist()
    return values


def test_a_lost_reply_of_a_step(
    server: RunningServer, model_name: str, proxy: Proxy, pool: ThreadPoolExecutor
) -> None:
    twins = Twins(server.connect(model_name, address=proxy.address), Network(), adagrad)
    for seed in range(2):
        backward(twins.model, [twins.remote], seed)
        backward(twins.local_model, twins.local, seed)
        lose_the_reply(
            server,
            proxy,
            pool,
            model_name,
            twins.remote.step,
            lambda seed=seed: version_of(server, model_name) == seed + 1,
        )
        twins.local[0].step()
        twins.check_state()
    twins.remote._session.close()


def test_a_rejection_whose_reply_was_lost_is_told_again(
    server: RunningServer, through: Session, proxy: Proxy, pool: ThreadPoolExecutor
) -> None:
    def rejected() -> bool:
        workers = server.rest("GET", f"/v1/models/{through.model}/workers").json()["workers"]
        return bool(workers[0]["sequence"] == 1)

    with pytest.raises(NonfiniteGradient) as caught:
        lose_the_reply(
            server,
            proxy,
            pool,
            through.model,
            lambda: through.push({"w": grads(0)["w"] * np.float32(np.nan)}),
            rejected,
        )
    assert caught.value.consumed
    assert through.push(grads(0)).sequence == 2
    assert counts(through, 1) == [1]


def test_a_cut_in_mid_push(server: RunningServer, model_name: str, proxy: Proxy) -> None:
    """Nothing of a broken stream counts; what was set aside for it is given back."""
    size = 1 << 20
    session = server.connect(model_name, address=proxy.address)
    create(session, size)
    for number, count in enumerate([1000, size, 3 * size, 4 * size - 1000]):
        proxy.cut_after("up", count)
        connections = proxy.connections
        assert session.push(grads(number, size)).version == number + 1
        assert proxy.connections > connections, "the connection must have been cut"
    assert counts(session, 4) == [1] * 4
    assert server.rest("GET", "/v1/capacity").status_code == 200
    session.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_bad_line(server: RunningServer, through: Session, proxy: Proxy, seed: int) -> None:
    """Cuts at any byte in either direction, some of them before, some after the server acted."""
    chance = random.Random(seed)
    for number in range(11):
        direction = chance.choice(["up", "down"])
        proxy.cut_after(direction, chance.randrange(1, 600))  # type: ignore[arg-type]
        if chance.random() < 0.5:
            receipt = through.push(grads(number))
        else:
            receipt, _ = through.exchange(grads(number))
        assert receipt.version == receipt.sequence == number + 1
    assert counts(through, 11) == [1] * 11
    assert proxy.connections > 5


def test_a_connection_that_breaks_while_a_session_begins(server: RunningServer, proxy: Proxy) -> None:
    proxy.cut_after("up", 200)  # in the midst of the first request
    with connect(proxy.address, shared_memory=False, model="never-made", timeout_s=20.0):
        assert proxy.connections == 5, "three that only looked who is there"


def test_idle_connections_may_break(through: Session, proxy: Proxy) -> None:
    for number in range(3):
        proxy.cut()
        assert through.push(grads(number)).version == number + 1
    assert counts(through, 3) == [1] * 3


def test_a_lost_reply_of_an_upload(
    server: RunningServer, through: Session, proxy: Proxy, pool: ThreadPoolExecutor
) -> None:
    def applied() -> bool:
        return version_of(server, through.model) == 1

    values = {"w": np.float32([1, 2, 3])}
    assert lose_the_reply(server, proxy, pool, through.model, lambda: through.upload(values), applied) == 1
    assert through.push(grads(0)).version == 2


def test_a_lost_reply_of_an_added_group(
    server: RunningServer, model_name: str, proxy: Proxy, pool: ThreadPoolExecutor
) -> None:
    model = Network()
    remote = server.connect(model_name, address=proxy.address).attach(adagrad(model), module=model)
    extra = torch.nn.Parameter(torch.ones(2))
    path = f"/v1/models/{model_name}/param-groups"
    lose_the_reply(
        server,
        proxy,
        pool,
        model_name,
        lambda: remote.add_param_group({"params": [extra], "lr": 0.25}),
        lambda: len(server.rest("GET", path).json()["param_groups"]) == 2,
    )
    assert len(server.rest("GET", path).json()["param_groups"]) == 2
    extra.grad = torch.ones(2)
    remote.step()
    assert extra.tolist() == [pytest.approx(0.75)] * 2
    remote._session.close()


def test_a_lost_reply_of_a_replaced_state(
    server: RunningServer, model_name: str, proxy: Proxy, pool: ThreadPoolExecutor
) -> None:
    # with values that have changed, which edits="check" knows without asking: the upload is all that is asked
    session = server.connect(model_name, address=proxy.address)
    twins = Twins(session, Network(), adagrad, edits="check")
    twins.step(0)
    state_dict = twins.remote.state_dict()
    state_dict["state"][0]["sum"].fill_(3.0)
    twins.local[0].load_state_dict(state_dict)
    for model in (twins.model, twins.local_model):
        torch.nn.init.constant_(model.out.bias, 0.5)  # type: ignore[union-attr,arg-type]
    lose_the_reply(
        server,
        proxy,
        pool,
        model_name,
        lambda: twins.remote.load_state_dict(state_dict),
        lambda: server.rest("GET", f"/v1/models/{model_name}").json()["timeline"] == 2,
    )
    twins.check_state()
    twins.step(1, 2)
    twins.remote._session.close()


def test_a_lost_reply_of_the_creation(
    server: RunningServer, model_name: str, pool: ThreadPoolExecutor
) -> None:
    """The worker joins the model that it made, as who it became by that."""
    size = 1 << 18
    with Proxy(server.grpc) as proxy:
        session = connect(
            proxy.address,
            shared_memory=False,
            model=model_name,
            worker="w0",
            timeout_s=10.0,
            retry_for_s=20.0,
        )
        weight = torch.nn.Parameter(torch.arange(float(size)))
        # the last bytes of the values wait until answers are held back; the proxy may overshoot by a piece
        proxy.stop_after("up", 4 * size - 2 * PIECE_BYTES)
        attaching = pool.submit(session.attach, Adagrad([weight], lr=0.5), names=["w"])
        wait_until(lambda: proxy.stopped)
        assert version_of(server, model_name) == -1
        proxy.hold("down")
        proxy.release("up")
        wait_until(lambda: version_of(server, model_name) == 0)
        proxy.cut()
        proxy.release()
        remote = attaching.result(30)
        assert torch.equal(weight, torch.arange(float(size)))
        weight.grad = torch.ones(size)
        remote.step()
        assert remote.last_receipt is not None
        assert (remote.last_receipt.version, remote.last_receipt.epoch) == (1, 1)
        session.close()


def test_a_lost_reply_of_a_takeover(
    server: RunningServer, through: Session, proxy: Proxy, pool: ThreadPoolExecutor
) -> None:
    """The join that is sent again is the same one, and so is a copy of it that comes when it is long done."""
    heir = server.connect(through.model, "w0", address=proxy.address, takeover=True)

    def epoch() -> int:
        shown = server.rest("GET", f"/v1/models/{through.model}/workers").json()["workers"]
        return int(shown[0]["epoch"])

    member = lose_the_reply(server, proxy, pool, through.model, heir.member, lambda: epoch() == 2)
    assert member.epoch == epoch() == 2
    assert heir.push(grads(0)).epoch == 2
    with pytest.raises(Fenced):
        through.push(grads(1))
    wire = Wire(server.grpc)
    request = pb.JoinRequest(model=through.model, worker="w0", takeover=True, attempt=7)
    for attempt, expected in ((7, 3), (7, 3), (8, 4), (8, 4)):
        request.attempt = attempt
        (answer,) = wire.answers("Join", [request.SerializeToString()])
        assert pb.JoinResponse.FromString(answer).member.identity.epoch == expected
    request.attempt = 7
    assert "a later join has replaced this one" in wire.refused("Join", [request.SerializeToString()]).message
    assert epoch() == 4
    wire.close()
    heir.close()


# --- an attempt that broke, and a refusal after it


@pytest.mark.parametrize("arrived", [True, False])
@pytest.mark.parametrize("problem", ["over budget", "draining", "interrupted"])
def test_a_refusal_does_not_settle_an_attempt_that_broke(
    server: RunningServer,
    model_name: str,
    monkeypatch: pytest.MonkeyPatch,
    arrived: bool,
    problem: str,
) -> None:
    """Whether the first attempt was applied is found out by joining again, and the step says what is true."""
    session = server.connect(model_name, retry_for_s=0.3)
    create(session)
    send, attempts = session._worker.membership.transport.push, 0

    def push(*arguments: Any) -> Any:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            if arrived:
                send(*arguments)
            if problem != "interrupted":
                raise TransportFailure("the line is cut")
            raise KeyboardInterrupt
        if problem == "draining":
            raise Draining
        raise OverBudget(need=1, free=0, budget=0, setting="staging-bytes", retry_after_s=0.05)

    monkeypatch.setattr(session._worker.membership.transport, "push", push)
    refusal = {"over budget": OverBudget, "draining": Draining}.get(problem, KeyboardInterrupt)
    if arrived and problem != "interrupted":
        assert session.push(grads(0)).outcome is Outcome.APPLIED
    else:
        with pytest.raises(refusal):
            session.push(grads(0))
    monkeypatch.undo()
    session.member()
    assert (session.last_receipt is not None) == arrived
    assert session.push(grads(1)).version == 1 + arrived
    assert counts(session, 2) == [arrived, 1]


def test_the_fate_of_a_push_that_the_server_has_forgotten(data: Path, pool: ThreadPoolExecutor) -> None:
    """It cannot be known, and is not made up; and the worker's next epoch is one that it never had."""
    with (
        running_server(data, "--max-workers", "1", "--lease-s", "0.5") as server,
        Proxy(server.grpc) as proxy,
    ):
        session = connect(
            proxy.address, shared_memory=False, model="m", worker="w0", timeout_s=5.0, retry_for_s=0.7
        )
        create(session)
        proxy.hold("down")
        pushing = pool.submit(session.push, grads(0))
        wait_until(lambda: version_of(server, "m") == 1)
        proxy.refuse()
        proxy.release()
        with pytest.raises(NoAnswer):
            pushing.result(30)

        def names() -> list[tuple[str, str]]:
            shown = server.rest("GET", "/v1/models/m/workers").json()["workers"]
            return [(entry["name"], entry["state"]) for entry in shown]

        wait_until(lambda: names() == [("w0", "expired")])
        with server.connect("m", "w1") as other:  # one that lives leaves no room for the first
            other.member()
            assert [name for name, _ in names()] == ["w1"]
        proxy.accept()
        with pytest.raises(FateUnknown, match="push 1 of worker 'w0'"):
            session.push(grads(1))
        receipt = session.push(grads(1))
        # the epochs of all who are forgotten are behind it, and the other one's was the second
        assert (receipt.version, receipt.epoch, receipt.sequence) == (2, 3, 1)
        assert counts(session, 2) == [1, 1]
        session.close()


# --- no answer


def test_no_answer_in_the_time_allowed(server: RunningServer, model_name: str) -> None:
    with Proxy(server.grpc) as proxy:
        network = Network()
        session = connect(
            proxy.address, shared_memory=False, model=model_name, worker="w0", timeout_s=5.0, retry_for_s=0.7
        )
        remote = session.attach(adagrad(network), module=network)
        backward(network, [remote], 0)
        before = [p.detach().clone() for p in network.parameters()]
        proxy.refuse()
        started_s = time.monotonic()
        with pytest.raises(NoAnswer, match=f"no answer from {proxy.address} for 0.7 s.*join again"):
            remote.step()
        assert 0.2 < time.monotonic() - started_s < 5.0
        assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
        # the line is back: it was not applied, and is taken as a step of the next epoch
        proxy.accept()
        remote.step()
        assert remote.last_receipt is not None
        assert (remote.last_receipt.version, remote.last_receipt.epoch) == (1, 2)
        session.close()


def test_a_push_in_doubt_is_settled_by_joining_again(
    server: RunningServer, model_name: str, pool: ThreadPoolExecutor
) -> None:
    with Proxy(server.grpc) as proxy:
        session = connect(
            proxy.address, shared_memory=False, model=model_name, worker="w0", timeout_s=5.0, retry_for_s=0.7
        )
        create(session)
        proxy.hold("down")
        pushing = pool.submit(session.push, grads(0))
        wait_until(lambda: version_of(server, model_name) == 1)
        proxy.refuse()
        proxy.release()
        with pytest.raises(NoAnswer):
            pushing.result(30)
        proxy.accept()
        assert session.last_receipt is None
        assert session.member().epoch == 2
        receipt = session.last_receipt
        assert receipt is not None
        assert (receipt.outcome, receipt.version, receipt.epoch) == (Outcome.APPLIED, 1, 1)
        assert session.push(grads(1)).version == 2
        assert counts(session, 2) == [1, 1]
        session.close()
