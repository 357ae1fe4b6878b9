"""An attach that fails, wherever it does, has not been: no model, no worker, and the user's optimizer as it was."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from torch import nn

import pushstep.client
from pushstep.client import Session
from pushstep.client.transport import shield as shield_file
from pushstep.optim import Adadelta, Adagrad
from pushstep.proto import training_pb2, training_pb2_grpc
from pushstep.proto.errors import (
    BeingCreated,
    InvalidHyperparameter,
    InvalidManifest,
    InvalidSettings,
    ManifestMismatch,
    UnsupportedModule,
    WrongDtype,
    WrongShape,
)
from pushstep.proto.errors.status import from_rpc_error
from pushstep.proto.types_pb2 import Manifest, Parameter, ParamGroup
from tests.support.processes.interrupts import python_s_handler
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.servers.operators import show_worker
from tests.support.servers.proxy import Proxy
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import backward, both

__all__ = ["python_s_handler"]
# a socket that was just being opened is closed by the collector
COLLECTED = pytest.mark.filterwarnings("ignore:.*unclosed <socket:pytest.PytestUnraisableExceptionWarning")
CLIENT = str(Path(pushstep.client.__file__).parent)
# what begins and ends with it lies outside of what is undone, and signals are held off in it
SHIELD = shield_file.__file__


class Interrupted(BaseException):
    """As Ctrl-C, or anything else that comes from anywhere."""


def _raise() -> None:
    raise Interrupted


def _signal() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class FaultAt:
    """Does something in the n-th call of a function of the client's, at first raise; `calls` counts them."""

    def __init__(self, number: int, fault: Callable[[], None] = _raise) -> None:
        self.number = number
        self.fault = fault
        self.calls = 0
        self.where = ""

    def __enter__(self) -> FaultAt:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> None:
        # of a generator this would be at its end, too, where nobody hears of it
        file = frame.f_code.co_filename
        ours = file.startswith(CLIENT) and not frame.f_code.co_flags & inspect.CO_GENERATOR
        ours = ours and file != SHIELD
        if event == "call" and ours:
            self.calls += 1
            if self.calls == self.number:
                sys.settrace(None)
                self.where = f"{frame.f_code.co_qualname}, call {self.number}"
                self.fault()


class Trained(Network):
    """With a buffer and a frozen layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.register_buffer("seen", torch.full((3,), float(seed)))
        torch.manual_seed(seed)
        self.fixed = nn.Linear(2, 2).requires_grad_(False)


class Script:
    """What a user has before attach, and whether it is as it was."""

    def __init__(self, seed: int) -> None:
        self.model = Trained(seed)
        self.optimizers: list[torch.optim.Optimizer] = both(self.model)
        backward(self.model, self.optimizers, seed)
        for optimizer in self.optimizers:
            optimizer.step()
        self.calls: list[str] = []
        self.optimizers[0].register_step_pre_hook(lambda *_: self.calls.append("hook"))
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizers[1], 1, gamma=0.5)
        self.optimizers[0].param_groups[0]["lr"] = torch.tensor(0.25)
        self.before = copy.deepcopy([o.state_dict() for o in self.optimizers])
        self.values = copy.deepcopy(self.model.state_dict())
        self.twin = copy.deepcopy((self.model, self.optimizers))

    def check(self) -> None:
        """Values, state and groups are as they were, and a step is the local one."""
        for name, value in self.model.state_dict().items():
            assert torch.equal(value, self.values[name]), name
        for got, expected in zip([o.state_dict() for o in self.optimizers], self.before, strict=True):
            assert repr(got) == repr(expected)
        assert not any(p._post_accumulate_grad_hooks for p in self.model.parameters())
        self.calls.clear()
        model, optimizers = copy.deepcopy(self.twin)
        for network, of_it in ((self.model, self.optimizers), (model, optimizers)):
            backward(network, of_it, 9)
            for optimizer in of_it:
                optimizer.step()
        assert self.calls[:1] == ["hook"]
        for one, other in zip(self.model.parameters(), model.parameters(), strict=True):
            assert torch.equal(one, other)


def _undone(server: RunningServer, model: str, worker: str) -> bool:
    found = server.rest("GET", f"/v1/models/{model}/workers")
    if found.status_code == 404:
        return True
    return all(entry["name"] != worker or entry["state"] == "left" for entry in found.json()["workers"])


@COLLECTED
@pytest.mark.parametrize(
    "options", [{}, {"overlap": True}, {"prefetch": True}], ids=["", "overlap", "prefetch"]
)
@pytest.mark.parametrize("shared_memory", [False, True], ids=["tcp", "shared memory"])
@pytest.mark.parametrize("there", [False, True], ids=["creates", "joins"])
@pytest.mark.parametrize(
    "every",
    [
        pytest.param(None, id="some"),
        pytest.param(1, id="every", marks=[pytest.mark.soak, pytest.mark.timeout(600)]),
    ],
)
def test_whatever_call_fails(
    server: RunningServer,
    model_name: str,
    every: int | None,
    there: bool,
    shared_memory: bool,
    options: dict[str, Any],
) -> None:
    """A fault in one call after the other, of all that attach makes; then the attach that works.

    With every call each takes about 5 seconds.
    """
    if there:
        first = Script(4)
        server.connect(model_name, "w0").attach(first.optimizers, module=first.model)
    session = server.connect(model_name, "w1", shared_memory=shared_memory)
    stride = every or (5 if shared_memory or options else 2)
    for number in _numbers(stride):
        script = Script(1)
        fault = FaultAt(number)
        with warnings.catch_warnings(), contextlib.suppress(Interrupted):
            warnings.simplefilter("ignore")  # that the server's values hold
            with fault:
                remote = session.attach(script.optimizers, module=script.model, **options)
            break
        script.check()
        assert session._attached is None
        assert _undone(server, model_name, "w1"), fault.where
        assert (server.rest("GET", f"/v1/models/{model_name}").status_code == 200) is there, fault.where
    assert number > 60
    backward(script.model, [remote], 9)
    remote.step()
    assert show_worker(server, model_name, "w1")["state"] == "live"


@COLLECTED
@pytest.mark.usefixtures("python_s_handler")
@pytest.mark.parametrize("there", [False, True], ids=["creates", "joins"])
def test_whenever_ctrl_c_comes(server: RunningServer, model_name: str, there: bool) -> None:
    """The attach is undone: what it would have returned is held by nobody."""
    if there:
        first = Script(4)
        server.connect(model_name, "w0").attach(first.optimizers, module=first.model)
    session = server.connect(model_name, "w1")
    for number in itertools.count(1, 29):
        script = Script(1)
        fault = FaultAt(number, _signal)
        try:
            with warnings.catch_warnings(), fault:
                warnings.simplefilter("ignore")  # that the server's values hold
                remote = session.attach(script.optimizers, module=script.model)
        except KeyboardInterrupt:
            script.check()
            assert _undone(server, model_name, "w1"), fault.where
        else:
            break
    assert fault.calls < number and number > 60
    backward(script.model, [remote], 9)
    remote.step()


def _numbers(stride: int = 1) -> Iterator[int]:
    """One call after the other, and later ones at larger distances."""
    yield from range(1, 100, stride)
    yield from itertools.count(100, 7 * stride)


def _own_state(spoil: Callable[[Any], object]) -> Callable[[Script], object]:
    return lambda script: spoil(script.optimizers[1].state[script.model.out.weight])


REFUSED: dict[str, tuple[Callable[[Script], object], type[Exception], str]] = {
    "a dtype": (lambda s: setattr(s.model.out.bias, "data", torch.zeros(1, dtype=torch.complex64)), WrongDtype, "complex64"),
    "a state of another shape": (_own_state(lambda s: s.update(acc_delta=torch.zeros(3))), WrongShape, r"state 'acc_delta' of 'out\.weight'"),
    "a state that lacks": (_own_state(lambda s: s.pop("square_avg")), UnsupportedModule, r"state of 'out\.weight' has no 'square_avg'"),
    "a state of another kind": (_own_state(lambda s: s.update(square_avg=1.0)), UnsupportedModule, "square_avg"),
    "an lr that is none": (lambda s: s.optimizers[1].param_groups[0].update(lr=None), InvalidHyperparameter, "no number"),
    "an lr of two": (lambda s: s.optimizers[1].param_groups[0].update(lr=torch.zeros(2)), InvalidHyperparameter, "no number"),
    "an lr that the rule refuses": (lambda s: s.optimizers[1].param_groups[0].update(lr=-1.0), InvalidHyperparameter, "learning rate"),
    "a meta tensor": (lambda s: setattr(s.model, "late", nn.Linear(2, 2, device="meta")) or s.optimizers[1].add_param_group({"params": s.model.late.parameters()}), UnsupportedModule, r"'late\.weight' is on the meta device"),
    "a lazy one": (lambda s: setattr(s.model, "late", nn.LazyLinear(2)) or s.optimizers[1].add_param_group({"params": s.model.late.parameters()}), UnsupportedModule, r"'late\.weight' has no shape yet"),
    "a buffer's name": (lambda s: s.model._buffers.update({"a\nb": torch.zeros(1)}), InvalidManifest, "not printable"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_by_name(
    server: RunningServer,
    model_name: str,
    spoil: Callable[[Script], object],
    error: type[Exception],
    match: str,
) -> None:
    script = Script(1)
    spoil(script)
    state = [dict(optimizer.state) for optimizer in script.optimizers]
    with pytest.raises(error, match=match):
        server.connect(model_name).attach(script.optimizers, module=script.model)
    assert server.rest("GET", f"/v1/models/{model_name}").status_code == 404
    assert [dict(optimizer.state) for optimizer in script.optimizers] == state
    assert "step" not in vars(script.optimizers[0]) and script.optimizers[0]._optimizer_step_pre_hooks


@pytest.mark.parametrize("what", ["policy", "manifest", "frozen"])
def test_what_the_server_refuses(server: RunningServer, model_name: str, what: str) -> None:
    script = Script(1)
    session = server.connect(model_name, "w1")
    options: dict[str, Any] = {}
    error: type[Exception] = ManifestMismatch
    if what == "policy":
        options, error = {"policy": {"policy": "sync", "min_workers": -1}}, InvalidSettings
    else:
        other = Script(2)
        if what == "manifest":
            other.optimizers = [Adagrad(other.model.parameters())]
        else:
            other.model.fixed = nn.Linear(2, 3).requires_grad_(False)
        server.connect(model_name, "w0").attach(other.optimizers, module=other.model)
    with pytest.raises(error, match="frozen 'fixed.weight'" if what == "frozen" else None):
        session.attach(script.optimizers, module=script.model, **options)
    script.check()
    assert _undone(server, model_name, "w1")
    assert (server.rest("GET", f"/v1/models/{model_name}").status_code == 404) is (what == "policy")


def test_what_goes_before_does_not_go_with_it(server: RunningServer, model_name: str) -> None:
    """A model that arrays have made, or on which somebody else works, is not taken away by an attach that fails."""
    session = server.connect(model_name)
    session.create({"w": np.ones(2, np.float32)}, [{"rule": "adagrad", "params": ["w"]}])
    parameter = nn.Parameter(torch.zeros(2))
    with _Failing(session), pytest.raises(Interrupted):
        session.attach(Adagrad([parameter]), names=["w"])
    assert parameter.tolist() == [0.0, 0.0]
    assert session.pull()["w"].tolist() == [1.0, 1.0]
    session.push({"w": np.ones(2, np.float32)})


class _Failing:
    """The pull that follows a join breaks off."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._pull = session._worker.pull_message

    def __enter__(self) -> None:
        def fail(*_: object) -> Any:
            raise Interrupted

        self._session._worker.pull_message = fail  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        self._session._worker.pull_message = self._pull  # type: ignore[method-assign]


def test_a_model_that_somebody_else_has_joined_stays(server: RunningServer, model_name: str) -> None:
    creator, second = server.connect(model_name, "w0"), server.connect(model_name, "w1")
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
    opened = creator.memory.open

    def join_first(*arguments: Any) -> Any:
        second.attach(Adagrad([other]), names=["w"])
        raise Interrupted

    creator.memory.open = join_first  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        creator.attach(Adagrad([one]), names=["w"])
    creator.memory.open = opened  # type: ignore[method-assign]
    assert other.tolist() == [1.0, 1.0]
    assert _undone(server, model_name, "w0")
    other.grad = torch.ones(2)
    assert second._attached is not None
    second._attached.step()


def test_leave_to_create_is_given_back(server: RunningServer, model_name: str) -> None:
    """Interrupted between its ticket and its values: the next one need not wait for the ticket to run out."""
    channel = grpc.insecure_channel(server.grpc)
    stub: Any = training_pb2_grpc.TrainingServiceStub(channel)  # type: ignore[no-untyped-call]
    probe = training_pb2.JoinRequest(
        model=model_name,
        worker="probe",
        manifest=Manifest(
            groups=[ParamGroup(rule="adagrad")],
            parameters=[Parameter(name="w", shape=[2], dtype="DTYPE_FLOAT32", group=0)],
        ),
    )
    session, parameter = server.connect(model_name), nn.Parameter(torch.zeros(2))
    refusals: list[Any] = []

    def look(*_: object) -> Any:
        try:
            stub.Join(probe)
        except grpc.RpcError as error:
            refusals.append(from_rpc_error(error))
        raise Interrupted

    session._worker.membership.transport.upload = look  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        session.attach(Adagrad([parameter]), names=["w"])
    assert isinstance(refusals[0], BeingCreated)
    assert stub.Join(probe).WhichOneof("result") == "create"
    channel.close()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_network_that_breaks_off_half_way(server: RunningServer, model_name: str, direction: str) -> None:
    script = Script(1)
    with Proxy(server.grpc) as proxy:
        session = server.connect(model_name, address=proxy.address, retry_for_s=0.3, timeout_s=1.0)
        proxy.stop_after(direction, 200)
        with pytest.raises(Exception, match=r"no answer|No answer|in doubt|undo|failed"):
            session.attach(script.optimizers, module=script.model)
        script.check()
        proxy.release()
    wait_until(lambda: server.rest("GET", f"/v1/models/{model_name}").status_code == 404)
    session._worker.membership.closed = True


@COLLECTED
def test_a_group_that_fails_is_not_there(server: RunningServer, model_name: str) -> None:
    """In one call after the other; added again, it is the one that the server may have by now."""
    network = Network()
    session = server.connect(model_name, shared_memory=True)
    remote = session.attach(Adadelta(network.parameters()), module=network)
    late = nn.Linear(2, 2)
    late.bias.requires_grad_(False)
    for number in _numbers():
        values = copy.deepcopy(late.state_dict())
        fault = FaultAt(number)
        with contextlib.suppress(Interrupted):
            with fault:
                remote.add_param_group({"params": list(late.parameters()), "lr": 0.5})
            break
        assert len(remote.param_groups) == 1
        assert all(torch.equal(value, values[name]) for name, value in late.state_dict().items())
        assert not late.weight._post_accumulate_grad_hooks
        backward(network, [remote], number)
        remote.step()
    assert len(remote.param_groups) == 2 and number > 30
    late.weight.grad = torch.ones(2, 2)
    remote.step()
    groups = server.rest("GET", f"/v1/models/{model_name}/param-groups").json()["param_groups"]
    assert [len(group["params"]) for group in groups] == [5, 2]
