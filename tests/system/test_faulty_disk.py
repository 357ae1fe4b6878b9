"""A server that is killed, told to stop, or refused by its disk in the middle of each phase, one after the other.

All of them work on one data folder: each start finds what the one before has left, and has to have every model that had a
snapshot, bit for bit.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pushstep.client.transport.retry import TransportFailure
from pushstep.proto.errors import NoAnswer, PushstepError
from pushstep.proto.errors.status import from_problem
from tests.support.servers import faulty_server
from tests.support.servers.harness import RunningServer, running_server, start_server
from tests.support.workers.wire import GROUPS, PARAMETERS, created, state_of

FAULTY = Path(faulty_server.__file__)
SAME = ("uid", "version", "edit", "export", "body", "steps", "hooks")
STEP = {name: np.full(value.shape, 0.25, np.float32) for name, value in PARAMETERS.items()}


def same(state: dict[str, Any]) -> list[Any]:
    """What a restart must not change."""
    return [state[key] for key in SAME]


def answered(server: RunningServer, method: str, path: str) -> None:
    """A call of an operator's; what refuses it is raised."""
    answer = server.rest(method, f"/v1/models/{path}")
    if answer.status_code >= 400:
        raise from_problem(answer.json())


def create(server: RunningServer, snapshot: str) -> None:
    server.connect("new").create(PARAMETERS, GROUPS)  # its session is closed with the server


def push(server: RunningServer, snapshot: str) -> None:
    with server.connect("m", retry_for_s=0.5) as session:
        session.push(STEP)


def take(server: RunningServer, snapshot: str) -> None:
    answered(server, "POST", "m/snapshots")


def restore(server: RunningServer, snapshot: str) -> None:
    answered(server, "POST", f"m/snapshots/{snapshot}/restore")


def delete_snapshot(server: RunningServer, snapshot: str) -> None:
    answered(server, "DELETE", f"m/snapshots/{snapshot}")


def delete_model(server: RunningServer, snapshot: str) -> None:
    answered(server, "DELETE", "other")


Phase = Callable[[RunningServer, str], None]
# what is done, and in the middle of which call to the operating system it is struck
STRIKES: dict[str, tuple[Phase, str]] = {
    "create, before the name is on the disk": (create, "replace:new/identity.json"),
    "snapshot, before its manifest is on the disk": (take, "fsync:manifest.json"),
    "snapshot, before it has its name": (take, "replace:-e0-*"),
    "restore, before its timeline is on the disk": (restore, "replace:m/identity.json"),
    "restore, when its timeline is": (restore, "fsync:models/m"),
    "delete a snapshot, of which a half is gone": (delete_snapshot, "unlink:arena-0001.safetensors"),
    "delete a model, of which a half is gone": (delete_model, "rmdir:snapshots"),
}


@contextlib.contextmanager
def faulty(data: Path, calls: str, deed: str) -> Iterator[RunningServer]:
    """A server whose calls fail once it is armed; its sessions end quietly, however it does."""
    (data / "armed").unlink(missing_ok=True)
    server = start_server(data, command=(sys.executable, FAULTY, calls, deed))
    try:
        yield server
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a session whose server is gone could not leave
            for session in server.sessions:
                session.close()
        server.kill()


@pytest.fixture
def snapshot(data: Path) -> str:
    """A data folder with `m` and `other`, of which `m` has gone on since its snapshot; the snapshot's name."""
    with running_server(data) as server:
        created(server, "other")
        created(server, "m")
        return str(server.rest("POST", "/v1/models/m/snapshots").json()["id"])


def struck(phase: Phase, server: RunningServer, snapshot: str) -> None:
    """A phase in the middle of which the process goes, whoever asked for it."""
    gone = (httpx.TransportError, NoAnswer, TransportFailure, PushstepError)
    with contextlib.suppress(*gone), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        phase(server, snapshot)


def test_killed_in_each_phase(data: Path, snapshot: str) -> None:
    """What is not acknowledged may be gone; what had a snapshot is there, on a timeline of its own."""
    held: dict[str, list[Any]] = {}
    timeline = 1
    for name, (phase, call) in STRIKES.items():
        with faulty(data, call, "kill") as server:
            state = state_of(server, "m")
            assert held.setdefault("m", same(state)) == same(state), name
            assert state["timeline"] >= timeline, name
            timeline = state["timeline"] + 1
            assert list((data / "models").glob("*/snapshots/tmp-*")) == []
            push(server, snapshot)  # acknowledged, and undone: there is no snapshot of it
            victim = snapshot
            if phase is delete_snapshot:
                (data / "armed").unlink(missing_ok=True)
                answered(server, "POST", "m/snapshots")
                victim = server.rest("GET", "/v1/models/m/snapshots").json()["snapshots"][0]["id"]
            (data / "armed").touch()
            struck(phase, server, victim)
            assert server.process.wait(30) == -signal.SIGKILL, name
    (data / "armed").unlink()
    with running_server(data) as server:
        assert same(state_of(server, "m")) == held["m"]
        assert [m["name"] for m in server.rest("GET", "/v1/models").json()["models"]] == ["m"]
        assert server.rest("GET", "/v1/models").json()["not_loaded"] == []


def test_killed_while_it_starts_and_while_it_stops(data: Path, snapshot: str) -> None:
    with running_server(data) as server:
        before = same(state_of(server, "m"))
    with pytest.raises(RuntimeError, match="did not start"):
        start_server(data, command=(sys.executable, FAULTY, "read:!m/identity.json", "kill"))
    with faulty(data, "fsync:manifest.json", "kill") as server:
        assert same(state_of(server, "m")) == before
        push(server, snapshot)
        (data / "armed").touch()
        assert server.stop() == -signal.SIGKILL
    with running_server(data) as server:
        assert same(state_of(server, "m")) == before


def test_told_to_stop_in_each_phase(data: Path, snapshot: str) -> None:
    """What was begun is done and answered, and the next start goes on from there on the same timeline."""
    held: list[Any] = []
    timeline = 1
    for name, (phase, call) in STRIKES.items():
        with faulty(data, call, "stop") as server:
            state = state_of(server, "m")
            held = held or same(state)
            assert (same(state), state["timeline"]) == (held, timeline), name
            timeline += phase is restore
            (data / "armed").touch()
            phase(server, snapshot)
            assert server.process.wait(30) == 0, name
    (data / "armed").unlink()
    with running_server(data) as server:
        state = state_of(server, "m")
        assert (same(state), state["timeline"]) == (held, timeline)
        listed = server.rest("GET", "/v1/models").json()
        assert ([m["name"] for m in listed["models"]], listed["not_loaded"]) == (["m", "new"], [])


@pytest.mark.parametrize(("deed", "code"), [("ENOSPC", "disk_full"), ("EIO", "storage_failed")])
def test_refused_by_the_disk_in_each_phase(deed: str, code: str, data: Path, snapshot: str) -> None:
    """By name; nothing is changed or left behind, and the same is done once the disk takes it again."""
    phases: dict[Phase, str] = {
        phase: code for phase, _ in STRIKES.values() if phase not in (delete_snapshot, delete_model)
    }
    calls = "+".join(call for phase, call in STRIKES.values() if phase in phases)
    with faulty(data, calls, deed) as server:
        before = state_of(server, "m")
        (data / "armed").touch()
        for phase in phases:
            with pytest.raises(PushstepError) as caught:
                phase(server, snapshot)
            assert caught.value.code == code, phase.__name__
            assert str(data) not in caught.value.message
            assert state_of(server, "m") == before, phase.__name__
        log = server.log.read_text()
        assert "Traceback" not in log
        assert list((data / "models").glob("*/snapshots/tmp-*")) == []
        (data / "armed").unlink()
        for phase in (create, take, restore):
            phase(server, snapshot)
        (data / "armed").touch()
        assert server.stop() == 3
        assert server.log.read_text().count("was NOT saved") == 3
    (data / "armed").unlink()
    with running_server(data) as server:
        state = state_of(server, "m")
        assert same(state) == same(before)
        listed = server.rest("GET", "/v1/models").json()
        assert [m["name"] for m in listed["models"]] == ["m", "new", "other"]
