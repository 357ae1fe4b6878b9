"""Servers that stop, are killed, and come back on the same folder and port: what their workers notice of it."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pushstep.client import Outcome, connect
from pushstep.optim import Adagrad
from pushstep.proto.errors import Superseded
from tests.support.servers.harness import RunningServer, start_server
from tests.support.servers.operators import restore, take_snapshot
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import adagrad
from tests.support.trainings.twins import Twins
from tests.support.workers.counting import counts, create, grads


def restart(server: RunningServer) -> RunningServer:
    """The same folder, the same port."""
    return start_server(server.data, "--grpc", server.grpc)


def test_a_server_stopped_and_started_between_steps(data: Path, model_name: str) -> None:
    server = start_server(data)
    twins = Twins(connect(server.grpc, model=model_name, worker="w0", retry_for_s=30.0), Network(), adagrad)
    numbers = connect(server.grpc, model="n", worker="w0", retry_for_s=30.0)
    create(numbers)
    for round_ in range(2):
        twins.step(round_)
        numbers.push(grads(round_))
        assert server.stop() == 0
        server = restart(server)
    twins.step(7)
    twins.check_state()
    assert numbers.push(grads(2)).version == 3
    assert counts(numbers, 3) == [1, 1, 1]
    receipt = twins.remote.last_receipt
    # the same epoch and timeline: nothing of it was lost, so nobody had to join again
    assert receipt is not None and (receipt.version, receipt.epoch, receipt.timeline) == (3, 1, 1)
    twins.remote._session.close()
    numbers.close()
    assert server.stop() == 0


def test_a_step_waits_for_a_server_that_is_away(data: Path, model_name: str) -> None:
    server = start_server(data)
    session = connect(server.grpc, model=model_name, worker="w0", retry_for_s=60.0)
    create(session)
    session.push(grads(0))
    assert server.stop() == 0
    with ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(session.push, grads(1))
        server = restart(server)
        assert pushing.result(60).version == 2
    assert counts(session, 2) == [1, 1]
    session.close()
    assert server.stop() == 0


def test_a_killed_server_tells_what_it_lost(data: Path, model_name: str) -> None:
    """Back to the last snapshot, on a new timeline: of a model that nobody has saved, to that of its creation."""
    server = start_server(data)
    numbers = connect(server.grpc, model="n", worker="w0", retry_for_s=30.0)
    create(numbers)
    unsaved = connect(server.grpc, model="unsaved", worker="w0", retry_for_s=30.0)
    create(unsaved)
    for number in range(3):
        numbers.push(grads(number))
        unsaved.push(grads(number))
        if number == 0:
            assert server.rest("POST", "/v1/models/n/snapshots").status_code in (200, 201)
    server.stop(signal.SIGKILL)
    server = restart(server)
    with pytest.warns(RuntimeWarning, match=r"undone 2 versions .* version 1 \(timeline 2\).*not applied"):
        receipt = numbers.push(grads(3))
    assert receipt.outcome is Outcome.SUPERSEDED
    assert numbers.push(grads(4)).version == 2
    assert counts(numbers, 5) == [1, 0, 0, 0, 1]
    with pytest.warns(RuntimeWarning, match=r"undone 3 versions .* version 0 \(timeline 2\).*not applied"):
        unsaved.push(grads(3))
    assert unsaved.push(grads(3)).version == 1
    numbers.close()
    unsaved.close()
    assert server.stop() == 0


def test_what_a_restore_has_undone_stays_undone(data: Path) -> None:
    """A killed server comes back from what the restored model was made from, not from what was newer before."""
    server = start_server(data)
    session = connect(server.grpc, model="m", worker="w0", retry_for_s=30.0)
    create(session)
    session.push(grads(0))
    snapshot = take_snapshot(server, "m")["id"]
    session.push(grads(1))
    take_snapshot(server, "m")
    restore(server, "m", snapshot)
    with pytest.warns(RuntimeWarning, match=r"restored to version 1 \(timeline 2\)"):
        session.push(grads(2))
    session.push(grads(3))
    server.stop(signal.SIGKILL)
    server = restart(server)
    with pytest.warns(RuntimeWarning, match=r"undone 1 versions .* version 1 \(timeline 3\)"):
        assert session.push(grads(4)).outcome is Outcome.SUPERSEDED
    assert session.push(grads(5)).version == 2
    assert counts(session, 6) == [1, 0, 0, 0, 0, 1]
    session.close()
    assert server.stop() == 0


@pytest.mark.parametrize("interface", ["arrays", "optimizer"])
def test_after_a_raised_restore_nothing_of_the_old_timeline_is_kept(
    server: RunningServer, model_name: str, interface: str
) -> None:
    """Versions of two timelines have equal numbers: what is held of one must not pass for the other's."""
    session = server.connect(model_name, on_restore="raise")
    weight = torch.nn.Parameter(torch.zeros(3))
    if interface == "arrays":
        session.create({"w": np.zeros(3, np.float32)}, [{"rule": "adagrad", "params": ["w"], "lr": 0.5}])
        optimizer = None
    else:
        optimizer = session.attach(Adagrad([weight], lr=0.5), names=["w"])

    def exchange(value: float) -> np.ndarray:
        if optimizer is None:
            return session.exchange({"w": np.full(3, value, np.float32)})[1]["w"]
        weight.grad = torch.full((3,), value)
        optimizer.step()
        return weight.detach().numpy().copy()

    exchange(1.0)
    restored = exchange(2.0)
    snapshot = server.rest("POST", f"/v1/models/{model_name}/snapshots").json()["id"]
    exchange(3.0)
    assert server.rest("POST", f"/v1/models/{model_name}/snapshots/{snapshot}/restore").status_code == 200
    with pytest.raises(Superseded):
        exchange(4.0)
    if optimizer is not None:
        assert np.array_equal(weight.detach().numpy(), restored)
    after = exchange(5.0)
    reader = server.connect(model_name, "reader")
    assert np.array_equal(after, reader.pull()["w"])
    assert session.last_receipt is not None and session.last_receipt.version == 3
