"""A server that keeps its snapshots in a store elsewhere, which is away, slow, lossy, or another server's."""

from __future__ import annotations

import json
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.disks import faulty_store
from tests.support.disks.faulty_store import SECRET
from tests.support.servers.harness import RunningServer, running_server, start_server, wait_until
from tests.support.terminals.command import pushstep
from tests.support.workers.wire import GROUPS, PARAMETERS, created, state_of

FAULTY = (sys.executable, Path(faulty_store.__file__))
STEP = {name: np.full(value.shape, 0.25, np.float32) for name, value in PARAMETERS.items()}
SAME = ("uid", "version", "edit", "export", "body", "steps", "hooks")


def same(state: dict[str, Any]) -> list[Any]:
    return [state[key] for key in SAME]


def sent(server: RunningServer) -> dict[str, Any]:
    found: dict[str, Any] = server.rest("GET", "/v1/models/m/durability").json()["snapshots_store"]
    return found


def ids(server: RunningServer) -> list[str]:
    return [entry["id"] for entry in server.rest("GET", "/v1/models/m/snapshots").json()["snapshots"]]


def automatic(server: RunningServer) -> list[bool]:
    listed = server.rest("GET", "/v1/models/m/snapshots").json()["snapshots"]
    return sorted((entry["automatic"] for entry in listed), reverse=True)


def kinds(server: RunningServer) -> list[str]:
    return [event["kind"] for event in server.rest("GET", "/v1/models/m/events").json()["events"]]


def push(server: RunningServer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with server.connect("m") as session:
            session.push(STEP)


def local(data: Path) -> list[Path]:
    return list((data / "models" / "m" / "snapshots").glob("t*"))


def test_everything_works_from_there(data: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store/a"
    with running_server(data, "--snapshots", url, "--durability", "everysec") as server:
        created(server, "m")
        first = server.rest("POST", "/v1/models/m/snapshots").json()["id"]
        push(server)
        before = state_of(server, "m")
        content = server.rest("GET", f"/v1/models/m/snapshots/{first}/content").content
        assert server.rest("GET", f"/v1/models/m/snapshots/{first}").json()["verified"]
    assert local(data) == []
    with running_server(data, "--snapshots", url) as server:
        assert same(state_of(server, "m")) == same(before)
        assert server.rest("GET", f"/v1/models/m/snapshots/{first}/content").content == content
        restored = server.rest("POST", f"/v1/models/m/snapshots/{first}/restore")
        assert restored.json()["effective_version"] == 1
        assert server.rest("DELETE", f"/v1/models/m/snapshots/{first}").status_code == 204
        assert first not in ids(server)
        server.kill()
    checked = pushstep("check", data, "--snapshots", url, "--json")
    assert checked.returncode == 0, checked.stderr
    (model,) = json.loads(checked.stdout)["models"]
    assert model["ok"]
    assert model["snapshots"]
    refused = pushstep("check", data)
    assert refused.returncode == 2
    assert url in refused.stderr
    with running_server(data, "--snapshots", url) as server:
        assert server.rest("DELETE", "/v1/models/m").status_code == 204
        wait_until(lambda: not list((tmp_path / "store" / "a" / "models").iterdir()))


def test_snapshots_of_the_data_folder_move_there(data: Path, tmp_path: Path) -> None:
    with running_server(data) as server:
        created(server, "m")
        before = state_of(server, "m")
    assert local(data)
    url = f"file://{tmp_path}/store"
    with running_server(data, "--snapshots", url) as server:
        wait_until(lambda: not local(data))
        assert same(state_of(server, "m")) == same(before)
    with pytest.raises(RuntimeError, match="are kept at"):
        start_server(data)
    with running_server(data, "--snapshots", url) as server:
        assert same(state_of(server, "m")) == same(before)


@pytest.fixture
def control(tmp_path: Path) -> Path:
    """The file that says how the store fails."""
    (tmp_path / "store").mkdir()
    return tmp_path / "store" / "store"


def faulty_url(tmp_path: Path) -> str:
    return f"faulty://user:{SECRET}@{tmp_path}/store"


def test_training_goes_on_while_the_store_fails(data: Path, tmp_path: Path, control: Path) -> None:
    options = ("--snapshots", faulty_url(tmp_path), "--snapshot-every-s", "0.2", "--durability", "durable")
    with running_server(data, *options, command=FAULTY) as server:
        created(server, "m")
        wait_until(lambda: sent(server)["sent"] is not None)
        answers = []
        for fault in ("away", "deny", "hang", "short", "write:away"):
            version = state_of(server, "m")["version"]
            control.write_text(fault)
            push(server)
            wait_until(lambda: sent(server)["problem"] is not None, 30.0)
            push(server)
            found = server.rest("GET", "/v1/models/m/durability").json()
            assert found["durable_version"] == version + 2, fault
            asked = server.rest("POST", "/v1/models/m/snapshots")
            assert (asked.status_code, asked.json()["code"]) == (503, "snapshots_away"), fault
            answers += [json.dumps(found), asked.text, server.rest("GET", "/v1/models/m/events").text]
            assert list((data / "models" / "m" / "journal").glob("*.journal")), fault
            assert kinds(server).count("snapshots_away") == kinds(server).count("snapshots_sent_again") + 1
            control.unlink()
            wait_until(lambda: sent(server)["problem"] is None, 30.0)
            wait_until(lambda: len(local(data)) == 0, 30.0)
        # those that were asked for are all there, and of the automatic ones those that are kept
        wait_until(lambda: automatic(server) == [True] * 2 + [False] * 5)
        state = state_of(server, "m")
    for text in (*answers, server.log.read_text()):
        assert SECRET not in text
    with running_server(data, *options, command=FAULTY) as server:
        assert same(state_of(server, "m")) == same(state)


def test_a_stop_without_the_store_loses_nothing(data: Path, tmp_path: Path, control: Path) -> None:
    url = faulty_url(tmp_path)
    server = start_server(data, "--snapshots", url, command=FAULTY)
    created(server, "m")
    wait_until(lambda: sent(server)["sent"] is not None)
    push(server)
    state = state_of(server, "m")
    created(server, "other")
    control.write_text("hang")
    assert server.stop() == 3
    # every model is on the disk before the first is sent
    lines = server.log.read_text().splitlines()
    (last_saved, first_sent) = (
        [number for number, line in enumerate(lines) if words in line]
        for words in (" saved at version ", "in the data folder ONLY")
    )
    assert len(last_saved) == 4
    assert max(last_saved[:2]) < min(first_sent)
    assert local(data)
    control.write_text("away")
    assert SECRET not in server.log.read_text()
    with pytest.raises(RuntimeError, match="does not do what is asked") as refused:
        start_server(data, "--snapshots", url, command=FAULTY)
    assert SECRET not in str(refused.value)
    control.unlink()
    with running_server(data, "--snapshots", url, command=FAULTY) as server:
        assert same(state_of(server, "m")) == same(state)
        wait_until(lambda: not local(data))


def test_a_start_waits_for_a_store_that_goes_away(data: Path, tmp_path: Path, control: Path) -> None:
    url = faulty_url(tmp_path)
    with running_server(data, "--snapshots", url, command=FAULTY) as server:
        created(server, "m")
        state = state_of(server, "m")
    # the owner's marker is read and written, and then the models are not
    control.write_text("after:8:away")

    def come_back() -> None:
        wait_until(
            lambda: any("the start waits" in log.read_text() for log in data.glob("server-*.log")), 30.0
        )
        control.unlink()

    back = threading.Thread(target=come_back)
    back.start()
    with running_server(data, "--snapshots", url, command=FAULTY) as server:
        back.join()
        assert same(state_of(server, "m")) == same(state)


def test_a_new_machine_goes_on_from_the_store(data: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    first = start_server(data, "--snapshots", url)
    session = first.connect("m")
    session.create(PARAMETERS, GROUPS)
    session.push(STEP)
    assert first.rest("POST", "/v1/models/m/snapshots").status_code == 201
    session.push(STEP)
    with pytest.raises(RuntimeError, match="takeover"):
        start_server(tmp_path / "new", "--snapshots", url)
    second = start_server(tmp_path / "new", "--snapshots", url, "--snapshots-takeover")
    try:
        # the first server has lost the place, and says so
        asked = first.rest("POST", "/v1/models/m/snapshots")
        assert (asked.status_code, asked.json()["code"]) == (409, "snapshots_owned")
        first.kill()
        assert second.rest("GET", "/v1/models/m").json()["version"] == 1
        second.kill()
        second = start_server(tmp_path / "new", "--grpc", first.grpc, "--snapshots", url)
        with pytest.warns(RuntimeWarning, match="has undone 1 versions"):
            session.push(STEP)
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session.close()
        second.kill()
        first.kill()
