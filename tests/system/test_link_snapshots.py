"""Snapshots of a table of which few rows change, over REST: each is the whole model, whatever becomes of the others."""

from __future__ import annotations

import json
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load
from typer.testing import CliRunner

from pushstep.client import Session
from pushstep.client.commands import app
from tests.support.servers import operators
from tests.support.servers.harness import RunningServer, running_server, start_server, wait_until
from tests.support.workers.wire import state_of

ROWS, WIDTH = 4000, 16
PARAMETERS = {
    "table": np.linspace(-1, 1, ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH),
    "bias": np.zeros(5, np.float32),
}
GROUPS = [{"rule": "adagrad", "params": ["table", "bias"], "lr": 0.1}]
SAME = ("uid", "version", "export", "body", "steps")
LEVEL = ("--durability", "durable", "--snapshot-every-s", "600")


def made(server: RunningServer) -> tuple[Session, dict[str, Any]]:
    """A model and its first snapshot, a whole one."""
    session = server.connect("m", shared_memory=False)
    session.create(PARAMETERS, GROUPS)
    (whole,) = server.rest("GET", "/v1/models/m/snapshots").json()["snapshots"]
    assert bytes_of(whole) > 2 * PARAMETERS["table"].nbytes
    return session, whole


def push(session: Session, first: int, count: int = ROWS // 200) -> None:
    ids = np.arange(first, first + count)
    session.push({"table": (ids, np.full((count, WIDTH), 0.5, np.float32)), "bias": np.ones(5, np.float32)})


def held(server: RunningServer) -> dict[str, Any]:
    state = state_of(server, "m")
    return {key: state[key] for key in SAME}


def listed(server: RunningServer) -> list[str]:
    return [entry["id"] for entry in server.rest("GET", "/v1/models/m/snapshots").json()["snapshots"]]


def bytes_of(snapshot: dict[str, Any]) -> int:
    return sum(entry["bytes"] for entry in snapshot["files"])


def taken(server: RunningServer, session: Session, first: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A snapshot behind a push to 1 % of the rows, and what the model held."""
    push(session, first)
    push(session, first + ROWS // 200)
    return operators.take_snapshot(server, "m"), held(server)


def checked(data: Path) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["check", str(data), "--json"], catch_exceptions=False)
    (model,) = json.loads(done.stdout)["models"]
    return {**model, "status": done.exit_code}


@pytest.fixture
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def test_each_snapshot_is_the_whole_model(data: Path, quiet: None) -> None:
    """Downloaded, restored, and after its base was deleted; 1 % of the rows take 3 % of the bytes."""
    with running_server(data) as server:
        session, whole = made(server)
        links = [taken(server, session, first) for first in (200, 1000, 210)]
        for link, state in links:
            assert bytes_of(link) <= 0.03 * bytes_of(whole)
            content = operators.download(server, f"m/snapshots/{link['id']}/content", "safetensors")
            found = {name: values.tobytes() for name, values in load(content).items()}
            assert found == state["export"]
            shown = server.rest("GET", f"/v1/models/m/snapshots/{link['id']}").json()
            assert shown["verified"] and shown.keys() - {"verified"} == whole.keys()
        operators.delete_snapshot(server, "m", whole["id"])
        operators.delete_snapshot(server, "m", links[1][0]["id"])
        assert set(listed(server)) >= {links[0][0]["id"], links[2][0]["id"]}
        assert not {whole["id"], links[1][0]["id"]} & set(listed(server))
        assert server.rest("GET", f"/v1/models/m/snapshots/{whole['id']}").status_code == 404
        for link, state in (links[2], links[0]):
            operators.restore(server, "m", link["id"])
            assert held(server) == state
        push(session, 50)
        push(session, 60)  # the first was superseded
        again = operators.take_snapshot(server, "m")  # on another timeline
        assert bytes_of(again) >= bytes_of(whole)
    with running_server(data) as server:
        assert server.rest("GET", "/v1/models/m").json()["version"] == again["version"]


def test_a_chain_goes_on_behind_a_kill_and_a_stop(data: Path, quiet: None) -> None:
    """The journal says which rows were changed since; a stop writes what changed."""
    server = start_server(data, *LEVEL)
    session, whole = made(server)
    taken(server, session, 200)
    push(session, 3000)
    expected = held(server)
    server.kill()
    server = start_server(data, *LEVEL, "--grpc", server.grpc)
    assert held(server) == expected
    link, expected = taken(server, session, 500)
    assert bytes_of(link) <= 0.03 * bytes_of(whole)
    push(session, 700)
    expected = held(server)
    assert server.stop() == 0
    found = checked(data)
    assert found["status"] == 0
    newest, before, *_ = found["snapshots"]
    assert newest["based_on"] == [*before["based_on"], before["id"]] and len(before["based_on"]) == 2
    assert newest["bytes"] <= 0.03 * bytes_of(whole)
    shown = CliRunner().invoke(app, ["check", str(data)], env={"COLUMNS": "400"}).stdout
    assert f"on {' + '.join(newest['based_on'])}" in shown
    with running_server(data, "--grpc", server.grpc) as server:
        assert held(server) == expected


def test_a_damaged_link_costs_nothing_where_there_is_a_journal(data: Path, quiet: None) -> None:
    """Whichever of a chain it is: an older one that does not need it is taken, and the journal leads on from there."""
    server = start_server(data, *LEVEL)
    session, _ = made(server)
    kept = server.rest("PATCH", "/v1/models/m/durability", json={"keep": 2, "snapshot_every_s": 0.05})
    kept.raise_for_status()

    def automatic(first: int) -> None:
        before = listed(server)[0]
        push(session, first)
        wait_until(lambda: listed(server)[0] != before)

    for first in range(0, 2000, 100):  # longer than a chain
        automatic(first)
    server.rest("PATCH", "/v1/models/m/durability", json={"snapshot_every_s": 600.0}).raise_for_status()
    push(session, 3500)
    expected = held(server)
    server.stop(signal.SIGKILL)
    for name in ("pushstep.sock", "pushstep.sock.memory"):
        (data / name).unlink(missing_ok=True)
    newest = checked(data)["snapshots"][0]
    assert newest["based_on"]
    for damaged in (newest["id"], newest["based_on"][-1], newest["based_on"][0]):
        path = data / "models" / "m" / "snapshots" / damaged / "arena-0000.safetensors"
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        found = checked(data)
        assert (found["start"]["version"], found["start"]["proven"]) == (expected["version"], True)
        assert found["start"]["snapshot"] != newest["id"]
        assert {entry["id"]: entry["state"] for entry in found["snapshots"]}[newest["id"]] == "damaged"
        if damaged != newest["based_on"][0]:
            path.write_bytes(good)
    with running_server(data, *LEVEL, "--grpc", server.grpc) as server:
        assert held(server) == expected
        session.close()
