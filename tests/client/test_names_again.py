"""A script that runs again has its name at once, whatever ended the last run; a live one elsewhere keeps it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pushstep.client import Session
from pushstep.client.membership import member as membership
from pushstep.client.transport.channel import Transport
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import AlreadyJoined, Fenced
from pushstep.proto.training_pb2 import Process
from tests.support.processes.nursery import Nursery, Script, nursery
from tests.support.servers.harness import RunningServer, running_server, start_server, wait_until
from tests.support.servers.operators import show_worker
from tests.support.workers.counting import counts, create, grads

# What a new run may take: its predecessor's lease is 30 s.
AT_ONCE_S = 1.5

BEGIN = """
import ctypes, os, signal, sys
import numpy as np
from pushstep.client import connect
session = connect(sys.argv[1], model=sys.argv[2], worker=sys.argv[3], shared_memory=sys.argv[4] == "True")
session.create({"w": np.zeros(3, np.float32)}, [{"rule": "adagrad", "params": ["w"], "lr": 0.5}])
session.push({"w": np.ones(3, np.float32)})
print("trained", flush=True)
"""
# What ends a script that no line of Python's sees.
ENDS: dict[str, tuple[str, Callable[[Script], int]]] = {
    "SIGKILL": ("signal.pause()", lambda script: script.kill(signal.SIGKILL)),
    "SIGTERM": ("signal.pause()", lambda script: script.kill(signal.SIGTERM)),
    "SIGKILL while it stands still": (
        "os.kill(os.getpid(), signal.SIGSTOP)",
        lambda script: script.kill(signal.SIGKILL),
    ),
    "os._exit": ("os._exit(7)", lambda script: script.wait()),
    "a crash": ("ctypes.string_at(0)", lambda script: script.wait()),
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("scripts")) as made:
        yield made


def run(
    scripts: Nursery, server: RunningServer, model: str, code: str, worker: str = "w0", shared: bool = False
) -> Script:
    script = scripts.start(BEGIN + code, server.grpc, model, worker, str(shared))
    script.wait_for("trained")
    return script


def go_on(server: RunningServer, model: str, worker: str = "w0") -> Session:
    """The next run: it joins at once or not at all."""
    session = server.connect(model, worker, retry_for_s=AT_ONCE_S)
    create(session)
    return session


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("end", ENDS)
def test_a_script_that_was_ended_runs_again(
    server: RunningServer, model_name: str, scripts: Nursery, end: str, shared: bool
) -> None:
    code, ended = ENDS[end]
    assert ended(run(scripts, server, model_name, code, shared=shared)) != 0
    assert show_worker(server, model_name, "w0")["state"] == "live", "nobody has noticed"
    session = go_on(server, model_name)
    assert session.push(grads(1)).epoch == 2
    assert counts(session, 2) == [1, 1]


def test_a_live_script_keeps_its_name(server: RunningServer, model_name: str, scripts: Nursery) -> None:
    script = run(scripts, server, model_name, "signal.pause()")
    try:
        for pause in (signal.SIGCONT, signal.SIGSTOP):
            signal_to(script, pause)
            with pytest.raises(AlreadyJoined, match="'w0' is live for another"):
                go_on(server, model_name).push(grads(1))
    finally:
        script.kill()


def signal_to(script: Script, number: signal.Signals) -> None:
    os.kill(script.pid, number)


def test_a_server_that_was_restarted_knows_whose_names_they_were(
    data: Path, model_name: str, scripts: Nursery
) -> None:
    server = start_server(data)
    script = run(scripts, server, model_name, "signal.pause()")
    server.stop()
    script.kill()
    with running_server(data) as server:
        session = go_on(server, model_name)
        assert session.push(grads(1)).epoch == 2
        assert counts(session, 2) == [1, 1]


def test_a_model_whose_creator_was_killed_is_created_by_the_next(
    server: RunningServer, model_name: str, scripts: Nursery
) -> None:
    """Also under another name, as a script without one has it in each run."""
    code = BEGIN.replace(
        "session = connect(",
        "from pushstep.client.transport.channel import Transport\n"
        "def stop(*arguments): print('trained', flush=True); signal.pause()\n"
        "Transport.upload = stop\n"
        "session = connect(",
    )
    script = scripts.start(code, server.grpc, model_name, "w0", "False")
    script.wait_for("trained")
    script.kill()
    assert go_on(server, model_name, "w1").push(grads(0)).version == 1


def test_a_round_goes_on_with_a_run_again(server: RunningServer, model_name: str, scripts: Nursery) -> None:
    script = run(scripts, server, model_name, "signal.pause()", "w1")
    server.rest(
        "PATCH", f"/v1/models/{model_name}/policy", json={"policy": "sync", "timeout_s": None}
    ).raise_for_status()
    one = go_on(server, model_name, "w0")
    pushing = threading.Thread(target=lambda: one.push(grads(1)))
    pushing.start()
    wait_until(lambda: show_worker(server, model_name, "w0")["round"] == "present")
    script.kill()
    again = go_on(server, model_name, "w1")
    receipt = again.push(grads(1))
    assert (receipt.epoch, receipt.version, receipt.contributors) == (2, 2, ["w0", "w1"])
    pushing.join(60)
    assert not pushing.is_alive()
    one.close()


# --- in one process


def test_a_cell_that_runs_again(server: RunningServer, model_name: str) -> None:
    """The last run's session is alive and fenced; the module is the same."""
    module = nn.Linear(3, 3)
    before: list[tuple[Session, Any]] = []
    for number in range(1, 4):
        session = server.connect(model_name, retry_for_s=AT_ONCE_S, shared_memory=True)
        optimizer = session.attach(torch.optim.Adagrad(module.parameters(), lr=0.1), module=module)
        for _ in range(2):
            optimizer.zero_grad()
            module(torch.ones(2, 3)).sum().backward()
            optimizer.step()
        assert optimizer.last_receipt is not None
        assert (optimizer.last_receipt.epoch, optimizer.last_receipt.version) == (number, 2 * number)
        before.append((session, optimizer))
    for session, optimizer in before[:-1]:
        with pytest.raises(Fenced, match="another session joined"):
            optimizer.step()
        session.close()
    assert show_worker(server, model_name, "w0")["state"] == "live", "a fenced one that leaves says nothing"


def test_a_holder_of_whom_nothing_is_known_keeps_its_name(
    server: RunningServer, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another host, or of a system that does not tell: its lease decides."""
    create(server.connect(model_name, "w9"))
    for worker, process in (("w0", None), ("w1", Process(host=b"another", pid=1, started=1))):
        transport = Transport(server.grpc, 5.0)
        transport.join(pb.JoinRequest(model=model_name, worker=worker, process=process))
        transport.close()
        with pytest.raises(AlreadyJoined):
            server.connect(model_name, worker, retry_for_s=0.2).push(grads(0))
        monkeypatch.setattr(membership, "this_process", lambda: None)
        with pytest.raises(AlreadyJoined):
            server.connect(model_name, worker, retry_for_s=0.2).push(grads(0))
        monkeypatch.undo()
