"""Prefetch: step k+1 takes the parameters of step k, so gradients are one step old, and nothing else changes."""

from __future__ import annotations

import copy
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pushstep.client import Outcome, RemoteOptimizer, connect
from pushstep.proto.errors import NoAnswer, NonfiniteGradient, UnsupportedModule
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.servers.operators import restore, show_model, take_snapshot
from tests.support.servers.proxy import Proxy
from tests.support.trainings.bits import check_state_dict
from tests.support.trainings.network import Network, loss_of
from tests.support.trainings.optimizers import adadelta, adagrad, both


class Stale:
    """A remote optimizer, and the same training here: a worker's model one step behind what is stepped."""

    def __init__(self, session: Any, model: nn.Module, make: Any, **options: Any) -> None:
        self.model = model
        self.worker = copy.deepcopy(model)
        self.served = copy.deepcopy(model)
        made = make(self.served)
        self.local = made if isinstance(made, list) else [made]
        self.remote: RemoteOptimizer = session.attach(make(model), module=model, prefetch=True, **options)

    def backward(self, seed: int) -> None:
        for each in (self.model, self.worker):
            each.zero_grad()
            loss_of(each, seed).backward()

    def step(self, *seeds: int) -> None:
        for seed in seeds:
            self.backward(seed)
            self.remote.step()
            self.take()
            for mine, theirs in zip(self.served.parameters(), self.worker.parameters(), strict=True):
                mine.grad = None if theirs.grad is None else theirs.grad.clone()
            for optimizer in self.local:
                optimizer.step()
            self.check()

    def take(self) -> None:
        """The worker here gets what has been stepped so far."""
        self.worker.load_state_dict(self.served.state_dict())

    def synchronize(self) -> None:
        self.remote.synchronize()
        self.take()
        self.check()

    def check(self) -> None:
        for mine, theirs in zip(self.model.parameters(), self.worker.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def versions(server: RunningServer, model: str) -> int:
    return int(show_model(server, model)["version"])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("make", [adadelta, adagrad, both])
def test_it_is_the_sequence_one_step_behind(
    server: RunningServer, model_name: str, make: Any, sparse: bool
) -> None:
    stale = Stale(server.connect(model_name), Network(sparse=sparse), make)
    before = [p.detach().clone() for p in stale.model.parameters()]
    stale.step(0)
    assert stale.remote.last_receipt is None
    assert all(torch.equal(p, b) for p, b in zip(stale.model.parameters(), before, strict=True))
    for seed in range(1, 21):
        stale.step(seed)
        receipt = stale.remote.last_receipt
        assert receipt is not None
        assert (receipt.outcome, receipt.version, receipt.staleness) == (Outcome.APPLIED, seed, seed > 1)
    stale.synchronize()
    assert stale.remote.last_receipt is not None and stale.remote.last_receipt.version == 21
    stale.synchronize()
    got = stale.remote.state_dict()
    for one, optimizer in zip([got] if isinstance(got, dict) else got, stale.local, strict=True):
        check_state_dict(one, optimizer.state_dict())
    stale.step(30, 31)
    assert stale.remote.last_receipt.staleness == 0, "the gradient after synchronize() was on the newest"


def test_step_returns_before_its_answer_and_needs_the_gradients_no_more(
    server: RunningServer, model_name: str
) -> None:
    with Proxy(server.grpc) as proxy:
        session = server.connect(model_name, address=proxy.address)
        stale = Stale(session, Network(), adadelta)
        stale.step(0, 1)
        stale.synchronize()
        proxy.hold("up")
        stale.step(2)
        for parameter in stale.model.parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(7.0)
        assert versions(server, model_name) == 2
        proxy.release()
        wait_until(lambda: versions(server, model_name) == 3)
        stale.step(3, 4)
        stale.synchronize()
        session.close()


def test_a_scheduler_here_is_not_overtaken_by_the_answer(server: RunningServer, model_name: str) -> None:
    stale = Stale(server.connect(model_name), Network(), adagrad)
    schedulers = [
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in (stale.remote, *stale.local)
    ]
    for seed in range(6):
        stale.step(seed)
        for scheduler in schedulers:
            scheduler.step()
        assert stale.remote.param_groups[0]["lr"] == stale.local[0].param_groups[0]["lr"]
    stale.synchronize()
    # an operator's edit arrives with the next answer, when nothing was changed here
    path = f"/v1/models/{model_name}/param-groups/0"
    assert server.rest("PATCH", path, json={"eps": 0.5}).status_code == 200
    stale.local[0].param_groups[0]["eps"] = 0.5
    stale.step(7, 8)
    assert stale.remote.param_groups[0]["eps"] == 0.5
    stale.synchronize()


@pytest.mark.parametrize("on_reject", ["raise", "skip"])
def test_a_rejection_is_told_one_step_later(server: RunningServer, model_name: str, on_reject: str) -> None:
    stale = Stale(server.connect(model_name, on_reject=on_reject), Network(), adagrad)
    stale.step(0)
    stale.backward(1)
    bad = stale.model.hidden.bias.grad  # type: ignore[union-attr]
    good = bad.clone()
    bad[0] = float("nan")
    stale.remote.step()
    stale.take()
    stale.check()
    bad.copy_(good)
    # the gradient that was rejected is sent again, mended, and is by now one step old
    if on_reject == "raise":
        with pytest.raises(NonfiniteGradient, match=r"hidden\.bias"):
            stale.remote.step()
        stale.check()
        stale.remote.step()
    else:
        with pytest.warns(RuntimeWarning, match="push rejected"):
            stale.remote.step()
        assert stale.remote.last_receipt is not None
        assert stale.remote.last_receipt.outcome is Outcome.REJECTED
    stale.check()
    for mine, theirs in zip(stale.served.parameters(), stale.worker.parameters(), strict=True):
        mine.grad = theirs.grad
    stale.local[0].step()
    stale.synchronize()
    stale.step(2, 3)
    stale.synchronize()


def test_a_restore_supersedes_what_is_in_flight_and_what_was_computed(
    server: RunningServer, model_name: str
) -> None:
    stale = Stale(server.connect(model_name), Network(), adagrad)
    stale.step(0, 1)
    stale.synchronize()
    snapshot = take_snapshot(server, model_name)["id"]
    kept = copy.deepcopy((stale.served.state_dict(), stale.local[0].state_dict()))
    stale.step(2)
    wait_until(lambda: versions(server, model_name) == 3)
    restore(server, model_name, snapshot)
    stale.step(3)  # lands push 2, which was applied before; push 3 meets the restore
    stale.backward(4)
    with pytest.warns(RuntimeWarning, match="restored to version 2"):
        stale.remote.step()
    assert stale.remote.last_receipt is not None
    assert stale.remote.last_receipt.outcome is Outcome.SUPERSEDED
    # gradient 4 was computed on the ended timeline: it is never applied, of which there is nothing new to be told
    stale.remote.synchronize()
    assert stale.remote.last_receipt.outcome is Outcome.SUPERSEDED
    assert versions(server, model_name) == 2
    stale.served.load_state_dict(kept[0])
    stale.local[0].load_state_dict(kept[1])
    stale.take()
    stale.check()
    stale.step(5, 6)
    stale.synchronize()


def test_what_else_is_asked_waits_for_the_push_in_flight(server: RunningServer, model_name: str) -> None:
    session = server.connect(model_name)
    stale = Stale(session, Network(), adagrad)
    stale.step(0)
    assert session.pull()["hidden.bias"].shape == (4,)
    assert session.version == 1
    stale.step(1)
    state_dict = stale.remote.state_dict()  # takes what came back, too
    stale.take()
    stale.check()
    state_dict["state"][0]["sum"].fill_(3.0)
    stale.step(2)
    stale.remote.load_state_dict(state_dict)
    stale.take()
    stale.check()
    stale.local[0].load_state_dict(state_dict)
    stale.step(3)
    # edited parameters are the user's wish, and not overwritten by the answer on its way
    for model in (stale.model, stale.worker):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
    session.upload()
    stale.served.load_state_dict(stale.worker.state_dict())
    stale.step(4, 5)
    stale.synchronize()


def test_no_answer(server: RunningServer, model_name: str) -> None:
    with Proxy(server.grpc) as proxy:
        session = server.connect(model_name, address=proxy.address, retry_for_s=0.5)
        stale = Stale(session, Network(), adagrad)
        stale.step(0, 1)
        stale.synchronize()
        proxy.refuse()
        stale.backward(2)
        stale.remote.step()
        with pytest.raises(NoAnswer):
            stale.remote.synchronize()
        stale.check()
        proxy.accept()
        stale.step(2, 3)
        stale.synchronize()
        assert stale.remote.last_receipt is not None
        assert (stale.remote.last_receipt.version, stale.remote.last_receipt.epoch) == (4, 2)
        session.close()


def test_closing_lands_the_last_push(server: RunningServer, model_name: str) -> None:
    session = server.connect(model_name)
    stale = Stale(session, Network(), adagrad)
    stale.step(0, 1)
    session.close()
    stale.take()
    stale.check()
    assert versions(server, model_name) == 2


def test_closing_without_a_server_is_quick_and_says_what_was_lost(data: Path) -> None:
    with running_server(data) as server:
        session = connect(server.grpc, model="m", worker="w0", timeout_s=5.0, retry_for_s=60.0)
        stale = Stale(session, Network(), adagrad)
        stale.step(0)
        stale.synchronize()
        server.stop(signal.SIGKILL)
        stale.backward(1)
        stale.remote.step()
        started_s = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            session.close()
        assert any("the last step failed" in str(one.message) for one in caught)
        assert time.monotonic() - started_s < 10.0
    assert not [thread for thread in threading.enumerate() if thread.name == "pushstep-prefetch"]


def test_it_is_not_for_overlap(server: RunningServer, model_name: str) -> None:
    model = Network()
    with pytest.raises(UnsupportedModule, match="without overlap"):
        server.connect(model_name).attach(adagrad(model), module=model, overlap=True, prefetch=True)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_worker_s_own_bytes_travel_with_the_next_push(
    server: RunningServer, model_name: str, steps: int
) -> None:
    with Proxy(server.grpc) as proxy:
        session = server.connect(model_name, address=proxy.address)
        stale = Stale(session, Network(), adagrad)
        session.worker_state = b"before step 0"
        proxy.hold("up")
        stale.step(0)
        session.worker_state = b"before step 1"
        proxy.release()
        stale.step(*range(1, steps))
        stale.synchronize()
        session.close()
    heir = server.connect(model_name)
    heir.member()
    assert heir.worker_state == b"before step 1"  # of one step the leave brought it
