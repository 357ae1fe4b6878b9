"""How a session ends: closed, fenced, expired, its model deleted, its server gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pushstep.client import Session, connect
from pushstep.client.membership import member as membership
from pushstep.optim import Adadelta, Adagrad
from pushstep.proto.errors import AlreadyJoined, Fenced, ModelLost, SessionClosed
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.servers.operators import all_models
from tests.support.servers.proxy import Proxy
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import adagrad, backward
from tests.support.workers.counting import create, grads


@pytest.fixture
def session(server: RunningServer, model_name: str) -> Session:
    """A worker of a model of one parameter."""
    made = server.connect(model_name)
    create(made)
    return made


def test_a_context_leaves(server: RunningServer, model_name: str) -> None:
    with connect(server.grpc, model=model_name, worker="w0") as made:
        create(made)
    worker = server.rest("GET", f"/v1/models/{model_name}/workers").json()["workers"][0]
    assert worker["state"] == "left"
    with pytest.raises(ValueError, match="from within"), connect(server.grpc, model=model_name) as made:
        raise ValueError("from within")
    with pytest.raises(SessionClosed):
        made.pull()


def test_nothing_works_after_close(session: Session) -> None:
    session.close()
    session.close()
    calls: list[Callable[[], Any]] = [
        session.pull,
        session.pull_state,
        lambda: session.push(grads(0)),
        lambda: session.exchange(grads(0)),
        lambda: session.pull_rows("w", [0]),
        lambda: session.upload({}),
        lambda: create(session),
        lambda: session.attach(Adagrad([torch.nn.Parameter(torch.zeros(1))])),
    ]
    for call in calls:
        with pytest.raises(SessionClosed, match="connect again"):
            call()


def test_a_live_name_is_waited_out_or_taken_over(
    server: RunningServer, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "this_process", lambda: None)  # or nobody else could mean it
    session = server.connect(model_name)
    create(session)
    impatient = server.connect(session.model, "w0", retry_for_s=0.2)
    with pytest.raises(AlreadyJoined, match=r"'w0' is live for another .* takeover=True"):
        impatient.push(grads(0))
    assert session.push(grads(0)).version == 1
    usurper = server.connect(session.model, "w0", takeover=True)
    assert usurper.push(grads(0)).epoch == 2
    for _ in range(2):  # and it never comes back by itself
        with pytest.raises(Fenced, match=r"'w0' epoch 1.*another session joined"):
            session.push(grads(0))
    assert usurper.push(grads(0)).version == 3


def test_evicted_is_fenced_until_a_new_session(session: Session, server: RunningServer) -> None:
    session.push(grads(0))
    assert server.rest("DELETE", f"/v1/models/{session.model}/workers/w0").status_code == 200
    for call in (session.push, session.exchange):
        with pytest.raises(Fenced, match="evicted by an operator"):
            call(grads(0))
    again = server.connect(session.model, "w0")
    assert (again.push(grads(0)).version, again.member().epoch) == (2, 2)


@pytest.mark.parametrize("made_again", [False, True])
def test_a_deleted_model_is_lost(server: RunningServer, model_name: str, made_again: bool) -> None:
    """One of the same name is another, and nobody makes it anew by itself."""
    made = connect(server.grpc, model=model_name, worker="w0", retry_for_s=5.0)
    create(made)
    made.push(grads(0))
    reader = server.connect(model_name, "reader")
    reader.pull()
    assert server.rest("DELETE", f"/v1/models/{model_name}").status_code == 204
    if made_again:  # and as far as the other one was: what is held must not pass for unchanged
        again = server.connect(model_name, "w1")
        create(again)
        again.push(grads(1))
    for call in (
        lambda: made.push(grads(0)),
        lambda: made.exchange(grads(0)),
        lambda: made.upload(grads(0)),
        made.pull,
        made.pull_state,
        reader.pull,
        lambda: reader.pull_rows("w", [0]),
        reader.pull_state,
    ):
        with pytest.raises(ModelLost, match=f"'{model_name}'.*never made anew"):
            call()
    names = [model["name"] for model in all_models(server)]
    assert (model_name in names) is made_again
    made.close()


def test_a_lease_that_ran_out_is_taken_up_again(data: Path, model_name: str) -> None:
    """A worker that was cut off for longer than its lease joins again with its next step."""
    with running_server(data, "--lease-s", "0.5") as server, Proxy(server.grpc) as proxy:
        model = Network()
        session = server.connect(model_name, address=proxy.address)
        remote = session.attach(adagrad(model), module=model)
        numbers = server.connect("n", address=proxy.address)
        create(numbers)
        numbers.push(grads(0))
        proxy.hold("up")
        for name in (model_name, "n"):
            path = f"/v1/models/{name}/workers"
            wait_until(lambda at=path: server.rest("GET", at).json()["workers"][0]["state"] == "expired")
        proxy.release()
        for seed in range(2):
            backward(model, [remote], seed)
            remote.step()
        assert remote.last_receipt is not None
        assert (remote.last_receipt.epoch, remote.last_receipt.version) == (2, 2)
        assert (numbers.push(grads(0)).version, numbers.member().epoch) == (2, 2)
        # heartbeats keep it from then on, without a step
        time_s = time.monotonic() + 1.2
        wait_until(lambda: time.monotonic() > time_s)
        assert server.rest("GET", "/v1/models/n/workers").json()["workers"][0]["state"] == "live"
        session.close()
        numbers.close()


def test_closing_without_a_server_is_quick(data: Path) -> None:
    """Also when the module has buffers that a checkpoint would want."""
    with running_server(data) as server:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        session = connect(server.grpc, model="m", worker="w0", timeout_s=5.0, retry_for_s=60.0)
        session.attach(Adadelta(model.parameters()), module=model)
        server.stop()
        started_s = time.monotonic()
        with pytest.warns(RuntimeWarning, match="could not leave"):
            session.close()
        assert time.monotonic() - started_s < 10.0
        session.close()
