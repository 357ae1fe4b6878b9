"""A worker on the GPU of its server: the same bits as over frames, through memory of that device.

On a real device with `pytest -m gpu`; elsewhere on a model of its driver, in which files are allocations that real
processes open (see modelled_driver.py), and of its streams (streams.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pushstep.client import Outcome, Session
from pushstep.client.shared_memory import imported_memory
from pushstep.client.shared_memory.imported_memory import ImportedMemory
from pushstep.client.shared_memory.local_socket import LocalSocket
from pushstep.client.transport.retry import TransportFailure
from pushstep.optim import Adagrad
from pushstep.proto.errors import NoSharedMemory
from pushstep.proto.shared_memory import cuda_ipc as device_memory
from pushstep.proto.shared_memory.cuda_ipc import HANDLE_BYTES, CudaDriver
from pushstep.proto.types_pb2 import DeviceMemory
from tests.support.cuda.device_host import DeviceHost, shares_device
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import Make, adadelta, adagrad, both
from tests.support.trainings.twins import Twins

ELEMENTS = 300_007  # more than the digest leaves to the host, and on no border


@pytest.fixture(scope="module", params=["modelled", pytest.param("cuda", marks=pytest.mark.gpu)])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceHost]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    with pytest.MonkeyPatch.context() as patch:
        yield DeviceHost(request.param, tmp_path_factory.mktemp("driver"), patch)


@pytest.fixture(scope="module")
def server(host: DeviceHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with host.server(tmp_path_factory.mktemp("server") / "data") as running:
        yield running


class Worker:
    """One parameter under Adagrad, stepped with gradients that follow from their number."""

    def __init__(self, session: Session, device: torch.device, elements: int = ELEMENTS) -> None:
        self.session = session
        self.parameter = nn.Parameter(torch.ones(elements, device=device))
        self.remote = session.attach(torch.optim.Adagrad([self.parameter], lr=0.1))
        self.here = nn.Parameter(torch.ones(elements, device=device))
        self.local = Adagrad([self.here], lr=0.1)

    def step(self, number: int) -> None:
        """One step, remote and local: the same bits."""
        for parameter, optimizer in ((self.parameter, self.remote), (self.here, self.local)):
            draw = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.device)
            optimizer.step()
        assert torch.equal(self.parameter, self.here)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("make", [adadelta, adagrad, both])
def test_every_step_is_the_local_optimizers(
    host: DeviceHost, server: RunningServer, model_name: str, make: Make, sparse: bool
) -> None:
    with server.connect(model_name, address=f"unix:{server.unix}", shared_memory=True) as session:
        twins = Twins(session, Network(sparse=sparse).to(host.device), make)
        twins.step(*range(6))
        assert shares_device(session)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_in_other_dtypes(
    host: DeviceHost, server: RunningServer, model_name: str, dtype: torch.dtype
) -> None:
    with server.connect(model_name, shared_memory=True) as session:
        twins = Twins(session, Network(dtype=dtype).to(host.device), adadelta)
        twins.step(*range(4))
        assert shares_device(session)


@pytest.mark.parametrize("wire", [None, "bfloat16", ("float16", "float32")], ids=str)
def test_receipts_and_parameters_are_those_of_frames(
    host: DeviceHost, server: RunningServer, model_name: str, wire: Any
) -> None:
    """The norm, by which gradients are clipped, is taken on the device."""
    seen: list[list[object]] = []
    for shared in (True, False):
        name = f"{model_name}-{shared}"
        with server.connect(name, shared_memory=shared, wire=wire) as session:
            layers = nn.Sequential(nn.Linear(701, 503), nn.Linear(503, 1, bias=False))
            with torch.no_grad():
                for number, parameter in enumerate(layers.parameters()):
                    draw = torch.Generator().manual_seed(number)
                    parameter.copy_(torch.randn(parameter.shape, generator=draw))
            layers.to(host.device)
            remote = session.attach(torch.optim.Adadelta(layers.parameters()), module=layers)
            hook = {"name": "clip_grad_norm", "point": "step_pre", "settings": {"max_norm": 0.1}}
            server.rest("POST", f"/v1/models/{name}/hooks", json=hook).raise_for_status()
            found: list[object] = []
            for number in range(3):
                for place, parameter in enumerate(layers.parameters()):
                    draw = torch.Generator().manual_seed(10 * number + place)
                    gradient = torch.randn(parameter.shape, generator=draw).to(parameter.device)
                    # now and then one is missing, and the body has other segments
                    parameter.grad = None if (number, place) == (1, 1) else gradient
                remote.step()
                assert remote.last_receipt is not None
                found.append(remote.last_receipt.gradient_norm)
                found += [p.detach().cpu().numpy().tobytes() for p in layers.parameters()]
            seen.append(found)
            assert shares_device(session) == shared
    assert seen[0] == seen[1]


def test_a_round_of_two_workers_is_the_one_of_frames(
    host: DeviceHost, server: RunningServer, model_name: str
) -> None:
    seen: list[list[bytes]] = []
    for shared in (True, False):
        name = f"{model_name}-{shared}"
        sessions = [server.connect(name, worker, shared_memory=shared) for worker in ("a", "b")]
        parameters = [nn.Parameter(torch.ones(ELEMENTS, device=host.device)) for _ in sessions]
        policy = {"policy": "sync", "min_workers": 2}
        remotes = [
            session.attach(torch.optim.Adagrad([parameter]), names=["w"], policy=policy)
            for session, parameter in zip(sessions, parameters, strict=True)
        ]

        def step(place: int, number: int, parameters: Any = parameters, remotes: Any = remotes) -> None:
            draw = torch.Generator().manual_seed(2 * number + place)
            gradient = torch.randn(ELEMENTS, generator=draw)
            parameters[place].grad = gradient.to(parameters[place].device)
            remotes[place].step()

        with ThreadPoolExecutor(2) as both_at_once:
            for number in range(3):
                list(both_at_once.map(step, (0, 1), (number, number)))
        assert [shares_device(session) for session in sessions] == [shared, shared]
        assert torch.equal(*parameters)
        seen.append([p.detach().cpu().numpy().tobytes() for p in parameters])
        for session in sessions:
            session.close()
    assert seen[0] == seen[1]


def test_a_push_is_the_same_one_when_it_comes_again_as_frames(
    host: DeviceHost, server: RunningServer, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = LocalSocket.exchange

    def unheard(*arguments: Any) -> Any:
        exchange(*arguments)
        raise TransportFailure("the answer was lost")

    with server.connect(model_name, shared_memory=True) as session:
        worker = Worker(session, host.device)
        worker.step(0)
        with monkeypatch.context() as patch:
            patch.setattr(LocalSocket, "exchange", unheard)
            worker.step(1)  # frames: of another digest it would be a conflict
        receipt = worker.remote.last_receipt
        assert receipt is not None
        assert (receipt.outcome, receipt.version) == (Outcome.APPLIED, 2)
        worker.step(2)
        assert shares_device(session)


def test_a_group_that_is_added_and_a_restore_open_another_region(
    host: DeviceHost, server: RunningServer, model_name: str
) -> None:
    with server.connect(model_name, shared_memory=True) as session:
        worker = Worker(session, host.device, 1000)
        worker.step(0)
        first = session.memory.region
        added = nn.Parameter(torch.ones(5, device=host.device))
        worker.remote.add_param_group({"params": [added]})
        worker.step(1)
        assert session.memory.region is not first
        assert shares_device(session)
        snapshot = server.rest("POST", f"/v1/models/{model_name}/snapshots").json()["id"]
        server.rest("POST", f"/v1/models/{model_name}/snapshots/{snapshot}/restore").raise_for_status()
        with pytest.warns(RuntimeWarning, match="restored"):
            worker.remote.step()
        worker.step(2)
        assert shares_device(session)


def test_nan_is_refused_where_it_lies(host: DeviceHost, server: RunningServer, model_name: str) -> None:
    with server.connect(model_name, shared_memory=True, on_reject="skip") as session:
        worker = Worker(session, host.device, 1000)
        worker.step(0)
        worker.parameter.grad = torch.full_like(worker.parameter, float("nan"))
        with pytest.warns(RuntimeWarning, match="rejected"):
            worker.remote.step()
        worker.step(1)
        assert shares_device(session)


# What a worker finds, or is told, that makes it take the host's memory: (what to replace, by what).


def _refuses(*_: Any) -> Any:
    raise NoSharedMemory(problem="the driver says no")


class NoLibrary(CudaDriver):
    """The real driver on a machine that has none."""

    def serves(self, where: torch.device) -> bool:
        return True

    @property
    def _library(self) -> Any:  # type: ignore[override]
        raise NoSharedMemory(problem="the driver's library cannot be loaded")


def _with(**changed: Any) -> Callable[..., tuple[bytes, int]]:
    received = imported_memory._received

    def run(connection: Any) -> tuple[bytes, int]:
        message, tell = received(connection)
        sent = DeviceMemory.FromString(message)
        for field, change in changed.items():
            setattr(sent, field, change(getattr(sent, field)))
        return sent.SerializeToString(), tell

    return run


WAYS: dict[str, Callable[[Any], tuple[Any, str, Any]]] = {
    "another device": lambda driver: (driver, "uuid", lambda where: b"\7" * 16),
    "no driver": lambda driver: (device_memory, "driver", NoLibrary()),
    "it is not opened": lambda driver: (driver, "open", _refuses),
    "less is opened": lambda driver: (driver, "extent", lambda where, address: 4096),
    "no tensor of it": lambda driver: (driver, "tensor", _refuses),
    "a short handle": lambda driver: (imported_memory, "_received", _with(handle=lambda h: h[:-1])),
    "a long handle": lambda driver: (imported_memory, "_received", _with(handle=lambda h: h + b"\0")),
    "no handle": lambda driver: (imported_memory, "_received", _with(handle=lambda h: b"")),
    "another's handle": lambda driver: (
        imported_memory,
        "_received",
        _with(handle=lambda h: b"\1" * HANDLE_BYTES),
    ),
    "another size": lambda driver: (imported_memory, "_received", _with(size_bytes=lambda n: n + 1)),
    "another device's handle": lambda driver: (
        imported_memory,
        "_received",
        _with(device_uuid=lambda u: b"\7" * 16),
    ),
    "no uuid": lambda driver: (imported_memory, "_received", _with(device_uuid=lambda u: b"")),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_hosts_memory_when_the_devices_is_not_to_be_had(
    host: DeviceHost,
    server: RunningServer,
    model_name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    monkeypatch.setattr(*WAYS[way](device_memory.driver))
    with server.connect(model_name, shared_memory=True) as session:
        worker = Worker(session, host.device, 1000)
        for number in range(3):
            worker.step(number)
        assert session.memory.region is not None
        assert not shares_device(session)
        said = [r for r in caplog.records if "using the host's" in r.getMessage()]
        assert [record.levelname for record in said] == ["WARNING"]
        wait_until(lambda: host.allocations() == [])


def test_frames_when_the_budget_is_taken(
    host: DeviceHost, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # three times 4 MB a region, of half the budget
    with host.server(data, "--staging-bytes", "30000000") as tight:
        first = Worker(tight.connect("a", shared_memory=True), host.device, 1_000_000)
        second = Worker(tight.connect("b", shared_memory=True), host.device, 1_000_000)
        for worker in (first, second):
            worker.step(0)
        assert shares_device(first.session)
        assert second.session.memory.region is None
        said = [r.getMessage() for r in caplog.records if "budget" in r.getMessage()]
        assert ["using the host's" in text for text in said] == [True, False]
        first.session.memory.drop()  # and what was given up is there for the next
        third = Worker(tight.connect("c", shared_memory=True), host.device, 1_000_000)
        third.step(0)
        assert shares_device(third.session)


def test_memory_is_kept_for_as_long_as_a_living_worker_has_it_open(
    host: DeviceHost, server: RunningServer, model_name: str
) -> None:
    with server.connect(model_name, shared_memory=True, takeover=True) as session:
        worker = Worker(session, host.device, 1000)
        worker.step(0)
        region = session.memory.region
        assert region is not None
        server.rest("DELETE", f"/v1/models/{model_name}/workers/w0").raise_for_status()
        wait_until(lambda: not region.local_socket.is_open())
        if host.driver is not None:
            assert len(host.allocations()) == 2  # one, and who has it open
        session.memory.drop()
        wait_until(lambda: host.allocations() == [])


def test_a_child_of_fork_closes_nothing_of_its_parents(
    host: DeviceHost, server: RunningServer, model_name: str
) -> None:
    if host.kind == "cuda":
        pytest.skip("a process that uses CUDA cannot fork and go on using it")
    with server.connect(model_name, shared_memory=True) as session:
        worker = Worker(session, host.device, 1000)
        worker.step(0)
        child = os.fork()
        if child == 0:
            os._exit(0 if session.memory.region is None else 1)
        assert os.waitpid(child, 0)[1] == 0
        worker.step(1)
        assert shares_device(session)


def test_fifty_sessions_leave_nothing(host: DeviceHost, server: RunningServer, model_name: str) -> None:
    files = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    own = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        with server.connect(f"{model_name}-{number}", shared_memory=True) as session:
            Worker(session, host.device, 100).step(0)
            assert shares_device(session)
        server.sessions.remove(session)
    wait_until(lambda: host.allocations() == [])
    wait_until(lambda: len(os.listdir(f"/proc/{server.process.pid}/fd")) <= files + 5)
    assert len(os.listdir("/proc/self/fd")) <= own + 5


# What the model is good for: each of these leaves out one care, and must show.
MISTAKES = {
    "finish": "a slot is handed over before it is written",
    "_unmap": "closed is said of what is open",
}


@pytest.mark.parametrize("left_out", MISTAKES)
def test_the_model_finds_mistakes(
    host: DeviceHost,
    server: RunningServer,
    model_name: str,
    monkeypatch: pytest.MonkeyPatch,
    left_out: str,
) -> None:
    if host.driver is None:
        pytest.skip("of a real device nobody knows")
    found = []
    with server.connect(model_name, shared_memory=True) as session:
        with monkeypatch.context() as patch:
            patch.setattr(ImportedMemory, left_out, lambda memory: None)
            try:
                Worker(session, host.device, 1000).step(0)
            except AssertionError:
                found.append("other bits")
            session.memory.drop()
        wait_until(lambda: not any("." not in name for name in host.allocations()))
    found += host.driver.take_faults()
    assert found
