"""Ctrl-C, and whatever else a signal's handler raises: the session goes on, and no parameter is torn."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pushstep.client import RemoteOptimizer, Session, connect
from pushstep.client.optimizer import overlap
from pushstep.optim import Adagrad
from pushstep.proto.errors import SessionClosed
from tests.support.processes.interrupts import interrupt_after, python_s_handler
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.servers.operators import show_model, show_worker
from tests.support.servers.proxy import Proxy

__all__ = ["python_s_handler"]
pytestmark = pytest.mark.usefixtures("python_s_handler")

LAYERS, WIDTH = 4, 160


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def optimizer(model: nn.Module) -> Adagrad:
    return Adagrad(model.parameters(), lr=0.01)


def backward(model: nn.Module) -> None:
    """The same gradients at every step, whatever the parameters are: a version is known by its number."""
    torch.stack([parameter.sum() for parameter in model.parameters()]).sum().backward()  # type: ignore[no-untyped-call]


class Versions:
    """What the parameters are at each version, stepped here."""

    def __init__(self) -> None:
        self._model = network()
        self._local = optimizer(self._model)
        self._all = [self._now()]

    def _now(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self._model.parameters()]

    def __getitem__(self, version: int) -> list[torch.Tensor]:
        while len(self._all) <= version:
            self._local.zero_grad()
            backward(self._model)
            self._local.step()
            self._all.append(self._now())
        return self._all[version]

    def number_of(self, model: nn.Module, about: int) -> int:
        """Which version the parameters are, all of them; AssertionError if they are none near `about`."""
        for version in range(max(0, about - 2), about + 3):
            if all(torch.equal(p, v) for p, v in zip(model.parameters(), self[version], strict=True)):
                return version
        raise AssertionError(f"the parameters are no version near {about}")


def step(model: nn.Module, remote: RemoteOptimizer) -> None:
    remote.zero_grad()
    backward(model)
    remote.step()


CONNECT: dict[str, dict[str, Any]] = {
    "TCP": {},
    "Unix socket": {"address": "unix"},
    "shared memory": {"shared_memory": True},
    "prefetch": {},
    "overlap": {},
}


def train_through(server: RunningServer, model_name: str, how: str, interrupts: int, seed: int) -> int:
    """Step under interrupts at random moments; how many KeyboardInterrupts came out."""
    options = dict(CONNECT[how])
    if options.get("address"):
        options["address"] = f"unix:{server.unix}"
    chance = random.Random(seed)
    session = server.connect(model_name, **options)
    model, versions = network(), Versions()
    extra = {how: True} if how in ("prefetch", "overlap") else {}
    remote = session.attach(optimizer(model), module=model, **extra)
    step(model, remote)
    began_s = time.perf_counter()
    for _ in range(5):
        step(model, remote)
    usual_s = (time.perf_counter() - began_s) / 5
    came, about = 0, 6
    for _ in range(interrupts):
        try:
            with interrupt_after(chance.uniform(0, 1.5 * usual_s)):
                step(model, remote)
                step(model, remote)
        except KeyboardInterrupt:
            came += 1
        about = versions.number_of(model, about)
    step(model, remote)
    remote.synchronize()
    assert how != "overlap" or remote.overlapped_steps > interrupts / 2
    at = show_model(server, model_name)["version"]
    assert versions.number_of(model, at) == at
    assert remote.last_receipt is not None and remote.last_receipt.epoch == 1, "nothing was ever in doubt"
    remote.upload()  # sets nothing back
    pulled = session.pull().values()
    assert all(np.array_equal(p, v.numpy()) for p, v in zip(pulled, versions[at], strict=True))
    session.close()
    return came


@pytest.mark.parametrize("how", CONNECT)
def test_interrupts_at_random_moments(
    server: RunningServer, model_name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "BUCKET_BYTES", 1 << 17)
    assert train_through(server, model_name, how, 100, 1) > 25


@pytest.mark.soak
@pytest.mark.parametrize("how", CONNECT)
def test_many_interrupts_at_random_moments(
    server: RunningServer, model_name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes about 6 seconds."""
    monkeypatch.setattr(overlap, "BUCKET_BYTES", 1 << 17)
    assert train_through(server, model_name, how, 400, 2) > 100


# --- while it waits


def attached(session: Session, **options: Any) -> tuple[nn.Module, RemoteOptimizer]:
    model = network()
    return model, session.attach(optimizer(model), module=model, **options)


@pytest.mark.parametrize("shared_memory", [False, True])
@pytest.mark.parametrize("kind", ["once", "twice"])
def test_a_wait_for_others_ends(
    server: RunningServer, model_name: str, kind: str, shared_memory: bool
) -> None:
    """Soon, and at once if the user insists. The next step withdraws what was handed in and goes on."""
    session = server.connect(model_name, shared_memory=shared_memory)
    model, remote = attached(session, policy={"policy": "sync", "min_workers": 2, "timeout_s": None})
    before = Versions()
    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupt_after(*([0.1] if kind == "once" else [0.1, 0.05])):
        step(model, remote)
    assert time.monotonic() - began_s < (4.0 if kind == "once" else 0.9)
    assert before.number_of(model, 0) == 0
    server.rest("PATCH", f"/v1/models/{model_name}/policy", json={"min_workers": 1})
    step(model, remote)
    assert before.number_of(model, 1) == 1
    session.close()


@pytest.mark.parametrize("shared_memory", [False, True])
def test_a_handler_that_raises_nothing_ends_nothing(
    server: RunningServer, model_name: str, shared_memory: bool
) -> None:
    """One that only makes a note, as those of trainers do: the wait goes on, and the push counts once."""
    notes: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: notes.append(number))
    try:
        session = server.connect(model_name, shared_memory=shared_memory)
        model, remote = attached(session, policy={"policy": "sync", "min_workers": 2, "timeout_s": None})

        def join() -> None:
            wait_until(lambda: notes)
            other = server.connect(model_name, "w1", address=server.grpc)
            other.create({n: p.detach() for n, p in network().named_parameters()}, group_of(network()))
            other.exchange({n: torch.ones_like(p) for n, p in network().named_parameters()})

        helper = threading.Thread(target=join)
        helper.start()
        with interrupt_after(0.1):
            step(model, remote)
        helper.join()
        assert notes == [signal.SIGINT]
        assert Versions().number_of(model, 1) == 1
        assert show_model(server, model_name)["version"] == 1
        session.close()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def group_of(model: nn.Module) -> list[dict[str, Any]]:
    return [{"rule": "adagrad", "params": [name for name, _ in model.named_parameters()], "lr": 0.01}]


class TimedOut(Exception):
    """What a handler of the user's raises."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1])
def test_other_signals_whose_handlers_raise(
    server: RunningServer, model_name: str, number: signal.Signals
) -> None:
    def handler(number: int, frame: object) -> None:
        raise TimedOut

    before = signal.signal(number, handler)
    try:
        model, remote = attached(server.connect(model_name))
        versions, chance, about = Versions(), random.Random(int(number)), 0
        for _ in range(30):
            try:
                with interrupt_after(chance.uniform(0, 0.01), number=number):
                    step(model, remote)
            except TimedOut:
                pass
            about = versions.number_of(model, about)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


# --- in doubt


def test_an_upload_after_a_broken_step_sets_nothing_back(server: RunningServer, model_name: str) -> None:
    """The step was applied and its answer lost: what is sent is what it has made."""
    with Proxy(server.grpc) as proxy:
        session = server.connect(model_name, address=proxy.address)
        model, remote = attached(session)
        step(model, remote)
        proxy.hold("down")
        with pytest.raises(KeyboardInterrupt), interrupt_after(0.2, 0.1):
            step(model, remote)
        versions = Versions()
        assert versions.number_of(model, 1) == 1
        wait_until(lambda: show_model(server, model_name)["version"] == 2)
        proxy.release()
        assert remote.upload() == 3
        assert versions.number_of(model, 2) == 2
        assert remote.last_receipt is not None and remote.last_receipt.version == 2
        session.close()


def test_a_flight_is_landed_after_the_interrupt(server: RunningServer, model_name: str) -> None:
    with Proxy(server.grpc) as proxy:
        session = server.connect(model_name, address=proxy.address)
        model, remote = attached(session, prefetch=True)
        step(model, remote)
        proxy.hold("down")
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt), interrupt_after(0.2, 0.1):
                step(model, remote)
        proxy.release()
        step(model, remote)
        remote.synchronize()
        assert Versions().number_of(model, 2) == 2
        session.close()


def refuse_to_wait(call: Callable[[], Any]) -> None:
    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupt_after(0.2, 0.1):
        call()
    assert time.monotonic() - began_s < 4.0


@pytest.mark.parametrize("prefetch", [False, True])
def test_close_is_interrupted(server: RunningServer, model_name: str, prefetch: bool) -> None:
    """It is closed all the same, and its name is free when the lease ends."""
    with Proxy(server.grpc) as proxy:
        session = server.connect(model_name, address=proxy.address)
        model, remote = attached(session, prefetch=prefetch)
        step(model, remote)
        proxy.hold("up")
        refuse_to_wait(session.close)
        with pytest.raises(SessionClosed):
            session.pull()
        proxy.release()
    assert show_worker(server, model_name, "w0")["state"] in ("live", "left")


CALLS: dict[str, Callable[[Session, nn.Module, RemoteOptimizer], Any]] = {
    "pull": lambda session, model, remote: session.pull(),
    "pull_rows": lambda session, model, remote: session.pull_rows("0.weight", [1]),
    "push": lambda session, model, remote: session.push({"0.bias": np.ones(WIDTH, np.float32)}),
    "exchange": lambda session, model, remote: session.exchange({"0.bias": np.ones(WIDTH, np.float32)}),
    "upload": lambda session, model, remote: remote.upload(),
    "state_dict": lambda session, model, remote: remote.state_dict(),
    "load_state_dict": lambda session, model, remote: remote.load_state_dict(
        optimizer(network()).state_dict()
    ),
    "add_param_group": lambda session, model, remote: remote.add_param_group(
        {"params": [nn.Parameter(torch.zeros(3))]}
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_can_be_interrupted_and_made_again(
    server: RunningServer, model_name: str, call: str
) -> None:
    with Proxy(server.grpc) as proxy:
        session = server.connect(model_name, address=proxy.address)
        model, remote = attached(session)
        step(model, remote)
        proxy.hold("up")
        refuse_to_wait(lambda: CALLS[call](session, model, remote))
        proxy.release()
        CALLS[call](session, model, remote)
        wait_until(lambda: show_worker(server, model_name, "w0")["state"] == "live")
        session.close()


def test_connect_is_interrupted(server: RunningServer, model_name: str) -> None:
    with Proxy(server.grpc) as proxy:
        proxy.hold("up")
        refuse_to_wait(lambda: connect(proxy.address, model=model_name, worker="w0"))
