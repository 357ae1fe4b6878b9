"""Kill -9 at every point of a step through memory of the device: nothing is freed too early, or never; nobody hangs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pushstep.client import connect
from pushstep.client.attachment.parameters import Parameters
from pushstep.client.shared_memory.local_socket import LocalSocket
from pushstep.optim import Adadelta
from pushstep.proto.errors import PushstepError
from pushstep.proto.shared_memory import cuda_ipc as device_memory
from tests.support.cuda.device_host import DeviceHost, shares_device
from tests.support.processes import device_memory_victim
from tests.support.processes.forked import Forked, workers
from tests.support.processes.shared_memory_victim import ELEMENTS, SOON_S
from tests.support.servers.harness import RunningServer, start_server, wait_until
from tests.system.test_device_memory import Worker, host  # noqa: F401 - its fixture

DEATHS = ["asked", "handed over", "open", "written", "sent", "answered", "copying out", "closed"]
# a server's end is seen in the same way wherever it comes
SERVER_DEATHS = ["handed over", "sent", "copying out"]
# one region of the model is 3 * 4 MB and half of the budget is for regions: there is room for one
BUDGET = ["--staging-bytes", "30000000"]


@pytest.fixture(scope="module")
def tight(host: DeviceHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:  # noqa: F811
    with host.server(tmp_path_factory.mktemp("tight") / "data", *BUDGET) as server:
        yield server


@pytest.fixture(scope="module")
def victims(host: DeviceHost, tight: RunningServer) -> Iterator[Forked]:  # noqa: F811
    where = (tight.grpc, str(host.device), str(host.folder))
    process = workers().piped(device_memory_victim.__name__, *where)
    yield process
    process.end()


def after_steps(steps: int, device: torch.device) -> torch.Tensor:
    """The parameters after so many whole steps."""
    parameter = torch.nn.Parameter(torch.zeros(ELEMENTS, device=device))
    optimizer = Adadelta([parameter])
    for _ in range(steps):
        parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("point", DEATHS)
def test_a_killed_worker(
    host: DeviceHost,  # noqa: F811
    tight: RunningServer,
    victims: Forked,
    model_name: str,
    point: str,
) -> None:
    assert victims.stdin is not None
    assert victims.stdout is not None
    victims.stdin.write(f"{model_name} {point}\n")
    victims.stdin.flush()
    assert victims.stdout.readline() == f"{model_name} {point}\n"
    wait_until(lambda: not any("." not in name for name in host.allocations()))
    with tight.connect(model_name, "next", shared_memory=True) as session:
        parameter = torch.nn.Parameter(torch.zeros(ELEMENTS, device=host.device))
        remote = session.attach(torch.optim.Adadelta([parameter]), names=["w"])
        held = remote._parameters.at
        assert held is not None
        assert torch.equal(parameter, after_steps(held[1], host.device))
        parameter.grad = torch.full_like(parameter, 0.5)
        remote.step()
        assert shares_device(session)  # the budget has room for one region: the dead worker's was given back
    tight.rest("DELETE", f"/v1/models/{model_name}").raise_for_status()
    assert host.faults() == []


def kill_at(server: RunningServer, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the server die when this process comes to a point."""

    def kill() -> None:
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()

    def then(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            kill()
            return real(*args, **options)

        return run

    def sent(*args: Any) -> Any:
        threading.Timer(SOON_S, lambda: server.process.send_signal(signal.SIGKILL)).start()
        return exchange(*args)

    exchange = LocalSocket.exchange
    places: dict[str, tuple[Any, str]] = {
        "handed over": (device_memory.driver, "open"),
        "copying out": (Parameters, "take"),
    }
    if point == "sent":
        monkeypatch.setattr(LocalSocket, "exchange", sent)
    else:
        owner, name = places[point]
        monkeypatch.setattr(owner, name, then(getattr(owner, name)))


@pytest.mark.parametrize("point", SERVER_DEATHS)
def test_a_killed_server(
    host: DeviceHost,  # noqa: F811
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
) -> None:
    server = start_server(data, environment=host.environment)
    session = connect(server.grpc, model="m", worker="w0", timeout_s=5, retry_for_s=0.3, shared_memory=True)
    try:
        if point == "handed over":
            kill_at(server, point, monkeypatch)
        try:
            worker = Worker(session, host.device)
            worker.step(0)
            assert shares_device(session)
            kill_at(server, point, monkeypatch)
            worker.step(1)
        except PushstepError as error:
            assert error.code in ("no_answer", "server_unavailable", "fate_unknown"), error.code
    finally:
        server.outlived_by(session)
    assert session.memory.region is None or not session.memory.region.local_socket.is_open()
    if host.driver is not None:
        assert not host.driver.held  # what was opened here is closed, whoever is gone
        for left in host.allocations():  # which a device has of no process that has ended
            (host.folder / left).unlink()
    assert host.faults() == []
