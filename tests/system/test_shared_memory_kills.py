"""Kill -9 at every point of a step through shared memory: nothing leaks, nothing is half applied, nobody hangs."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pushstep.client import connect
from pushstep.client.shared_memory import region
from pushstep.client.shared_memory.local_socket import LocalSocket
from pushstep.client.worker.cache import ParameterCache
from pushstep.optim import Adadelta
from pushstep.proto.errors import PushstepError
from tests.support.processes import shared_memory_victim
from tests.support.processes.forked import Forked, workers
from tests.support.processes.shared_memory_victim import ELEMENTS, GRADIENT, SOON_S
from tests.support.servers.harness import RunningServer, running_server, start_server, wait_until
from tests.system.test_shared_memory import regions_of, shares

POINTS = ["opened", "handed over", "written", "sent", "answered", "copying out"]
KILLS = 2
# one region of the model is 3 * 4 MB and half of the budget is for regions: there is room for one
BUDGET = ["--staging-bytes", "30000000"]


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("tight") / "data", *BUDGET) as server:
        yield server


@pytest.fixture(scope="module")
def victims(tight: RunningServer) -> Iterator[Forked]:
    process = workers().piped(shared_memory_victim.__name__, tight.grpc)
    yield process
    process.end()


def after_steps(steps: int) -> bytes:
    """The parameters after so many whole steps."""
    parameter = torch.nn.Parameter(torch.zeros(ELEMENTS))
    optimizer = Adadelta([parameter])
    for _ in range(steps):
        parameter.grad = torch.from_numpy(GRADIENT)
        optimizer.step()
    return parameter.detach().numpy().tobytes()


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_worker(tight: RunningServer, victims: Forked, model_name: str, point: str) -> None:
    for kill in range(KILLS):
        model = f"{model_name}-{kill}"
        assert victims.stdin is not None
        assert victims.stdout is not None
        victims.stdin.write(f"{model} {point}\n")
        victims.stdin.flush()
        assert victims.stdout.readline() == f"{model} {point}\n"
        wait_until(lambda: regions_of(tight.process.pid) == 0)
        with tight.connect(model, "next", shared_memory=True) as session:
            values = session.pull()
            assert session.version is not None
            assert values["w"].tobytes() == after_steps(session.version)
            session.exchange({"w": GRADIENT})
            assert shares(session)  # the budget has room for one region: the dead worker's was given back
            tight.rest("DELETE", f"/v1/models/{model}").raise_for_status()


def kill_at(server: RunningServer, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the server die when this process comes to a point."""

    def then(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
            return real(*args, **options)

        return run

    places: dict[str, tuple[Any, str]] = {
        "opened": (region, "_fetch"),
        "handed over": (region, "_mapped"),
        "written": (LocalSocket, "exchange"),
        "answered": (region.Region, "answer_of"),
        "copying out": (ParameterCache, "take"),
    }
    if point == "sent":
        exchange = LocalSocket.exchange

        def sent(*args: Any) -> Any:
            threading.Timer(SOON_S, lambda: server.process.send_signal(signal.SIGKILL)).start()
            return exchange(*args)

        monkeypatch.setattr(LocalSocket, "exchange", sent)
    else:
        owner, name = places[point]
        monkeypatch.setattr(owner, name, then(getattr(owner, name)))


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_server(data: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    server = start_server(data)
    gc.collect()
    before = regions_of(os.getpid())
    session = connect(server.grpc, model="m", worker="w0", timeout_s=5, retry_for_s=0.3, shared_memory=True)
    try:
        session.create({"w": np.zeros(ELEMENTS, np.float32)})
        if point not in ("opened", "handed over"):
            session.exchange({"w": GRADIENT})
            assert shares(session)
        kill_at(server, point, monkeypatch)
        try:
            _, values = session.exchange({"w": GRADIENT})
        except PushstepError as error:
            assert error.code in ("no_answer", "server_unavailable", "fate_unknown"), error.code
        else:
            assert values["w"].tobytes() == after_steps(2)
    finally:
        server.outlived_by(session)
    gc.collect()
    assert regions_of(os.getpid()) == before
