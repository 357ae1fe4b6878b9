"""How a model is kept on the disk, over REST: its level, its settings, and every version that comes back."""

from __future__ import annotations

import asyncio
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pushstep.client import Session
from pushstep.proto.errors import JournalDamaged, PushstepError, VersionNotKept
from pushstep.server.models import restores
from pushstep.server.models.restores import Restores
from pushstep.server.storage.model_folder import ModelFolder
from tests.support.servers.driven import made
from tests.support.servers.harness import RunningServer, running_server, start_server, wait_until
from tests.support.servers.operators import add_hook, patch_group, restore, take_snapshot
from tests.support.workers.wire import created, state_of

LEVELS = ("applied", "everysec", "durable")
HELD = ("version", "export", "steps", "body", "groups", "hooks")


def push(session: Session, value: float) -> Any:
    return session.push({"bias": np.full(4, value, np.float32)})


def held(server: RunningServer) -> dict[str, Any]:
    """What a restore brings back."""
    state = state_of(server, "m")
    for group in state["groups"]["param_groups"]:
        group.pop("etag", None)
    return {key: state[key] for key in HELD}


def durability(server: RunningServer, **changes: Any) -> dict[str, Any]:
    """The model's durability, after it was changed."""
    answer = server.rest("PATCH", "/v1/models/m/durability", json=changes)
    assert answer.status_code == 200, answer.text
    now, shown = server.rest("GET", "/v1/models/m/durability").json(), answer.json()
    assert all(now[key] == shown[key] for key in ("level", "snapshot_every_s", "keep"))
    return dict(shown)


def back_to(server: RunningServer, version: int) -> tuple[int, dict[str, Any]]:
    answer = server.rest("POST", "/v1/models/m/restore", json={"version": version})
    return answer.status_code, answer.json()


@pytest.mark.parametrize("level", ["everysec", "durable"])
def test_every_version_behind_a_snapshot_comes_back(data: Path, level: str) -> None:
    """With the edits that were made until the next one, and never a version of a timeline that was left."""
    with running_server(data, "--durability", level, "--snapshot-every-s", "600") as server:
        session = created(server, "m")
        durability(server, keep=20)
        states = {}
        for version in range(1, 9):
            if version > 1:
                push(session, version / 8)
            if version == 3:
                patch_group(server, "m", 0, lr=0.25)
            if version == 5:
                add_hook(server, "m", "clip_grad_norm", "step_pre", {"max_norm": 0.5})
            if version == 6:
                take_snapshot(server, "m")
            states[version] = held(server)
        assert back_to(server, 9)[0] == 404
        for timeline, version in enumerate((8, 7, 5, 4, 2), 2):
            assert back_to(server, version) == (200, {"timeline": timeline, "effective_version": version})
            assert held(server) == states[version], version
        status, problem = back_to(server, 4)
        assert (status, problem["code"]) == (404, "version_not_kept")
        assert held(server) == states[2]
        with pytest.warns(RuntimeWarning, match="restored to version 2"):
            push(session, -1.0)
        others = {}
        for version in (3, 4):
            push(session, -1.0)
            others[version] = held(server)
        assert others[4] != states[4]
        assert back_to(server, 3)[0] == 200
        assert held(server) == others[3]
        assert back_to(server, 0)[0] == 200
        assert held(server)["version"] == 0
        with pytest.warns(RuntimeWarning, match="restored to version"):
            push(session, 1.0)
        assert push(session, 1.0).version == 1


@pytest.mark.parametrize("after", LEVELS)
@pytest.mark.parametrize("before", LEVELS)
def test_a_level_holds_once_it_was_answered(data: Path, before: str, after: str) -> None:
    """A kill right behind the next push's receipt: all is there, or the worker is told how much is not."""
    server = start_server(data, "--durability", before, "--snapshot-every-s", "600")
    session = created(server, "m")
    assert push(session, 1.0).durability == before
    states = {1: None, 2: held(server)}
    assert durability(server, level=after)["level"] == after
    receipt = push(session, 2.0)
    assert receipt.durability == after
    if after == "durable":
        assert receipt.durable_version == receipt.version == 3
    states[3] = held(server)
    server.stop(signal.SIGKILL)
    with running_server(data, "--grpc", server.grpc) as again:
        shown = again.rest("GET", "/v1/models/m/durability").json()
        found = held(again)
        if after == "applied":
            # no journal: the newest snapshot, and it says so
            assert receipt.durable_version == (0 if before == "applied" else 2)
            assert receipt.durable_version <= found["version"] < 3
            assert shown["durable_version"] <= found["version"]
            with pytest.warns(RuntimeWarning, match=f"undone {3 - found['version']} versions"):
                push(session, 3.0)
        else:
            assert shown["level"] == after
            assert found == states[3]
            assert push(session, 3.0).version == 4
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            session.close()


def test_without_a_journal_receipts_name_the_newest_snapshot(data: Path) -> None:
    """After a kill, and after a restore, too."""

    def durable(server: RunningServer) -> int:
        return int(server.rest("GET", "/v1/models/m/durability").json()["durable_version"])

    server = start_server(data, "--snapshot-every-s", "600")
    session = created(server, "m")
    assert push(session, 1.0).durable_version == 0
    old = take_snapshot(server, "m")["id"]
    assert push(session, 1.0).durable_version == durable(server) == 2
    push(session, 1.0)
    take_snapshot(server, "m")
    assert push(session, 1.0).durable_version == 4
    server.stop(signal.SIGKILL)
    with running_server(data, "--grpc", server.grpc) as again:
        assert durable(again) == held(again)["version"] == 4
        with pytest.warns(RuntimeWarning, match="undone 1 versions"):
            push(session, 2.0)
        restore(again, "m", old)
        assert durable(again) == held(again)["version"] == 2
        with pytest.warns(RuntimeWarning, match="restored to version 2"):
            push(session, 2.0)
        receipt = push(session, 2.0)
        assert (receipt.version, receipt.durable_version) == (3, 2)
        session.close()


@pytest.mark.parametrize("level", LEVELS)
def test_as_many_automatic_snapshots_stay_as_asked(data: Path, level: str) -> None:
    """The newest ones, and every one that was asked for. The journal is cut off behind the oldest of them."""
    with running_server(data, "--durability", level, "--snapshot-every-s", "600") as server:
        session = created(server, "m")
        push(session, 1.0)
        asked = take_snapshot(server, "m")["id"]

        def kept() -> list[tuple[int, bool]]:
            listed = server.rest("GET", "/v1/models/m/snapshots").json()["snapshots"]
            return [(entry["version"], entry["automatic"]) for entry in listed]

        assert kept() == [(2, False), (0, True)]
        push(session, 1.0)
        durability(server, snapshot_every_s=0.01, keep=2)
        for version in (4, 5, 6):
            push(session, 1.0)
            wait_until(lambda at=version: kept()[0] == (at, True))
        wait_until(lambda: kept() == [(6, True), (5, True), (2, False)])
        durability(server, snapshot_every_s=600.0, keep=1)
        assert kept() == [(6, True), (5, True), (2, False)]
        assert back_to(server, 4)[0] == back_to(server, 3)[0] == 404
        assert back_to(server, 5)[0] == 200
        if level != "applied":  # behind a restore comes a snapshot
            wait_until(lambda: kept() == [(5, True), (2, False)])
        restore(server, "m", asked)
        assert held(server)["version"] == 2
        session.close()


def test_bad_settings_change_nothing(server: RunningServer, model_name: str) -> None:
    created(server, model_name).close()
    path = f"/v1/models/{model_name}/durability"
    before = server.rest("GET", path).json()
    for bad in (
        {"level": "sometimes"},
        {"level": None},
        {"level": 1},
        {"keep": 0},
        {"keep": 1.5},
        {"keep": 1 << 63},
        {"snapshot_every_s": 0},
        {"snapshot_every_s": -1.0},
        {"snapshot_every_s": 1e308},
        {"snapshot_every_s": "60"},
        {"unknown": 1},
    ):
        answer = server.rest("PATCH", path, json=bad)
        assert 400 <= answer.status_code < 500, (bad, answer.text)
        assert server.rest("GET", path).json() == before, bad


def test_a_snapshot_that_is_removed_while_it_is_read_is_no_damage(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept then is looked at again. Damage without a change of the folder is said at once."""
    folder = ModelFolder(data / "models" / "m")
    folder.snapshots.folder.mkdir(parents=True)
    kept = ["t1-v1-e0-n1", "t1-v2-e0-n2"]
    monkeypatch.setattr(folder.snapshots, "ids", lambda: list(kept))
    looks = []

    def look(*_: object) -> None:
        looks.append(len(kept))
        if len(looks) == 1:
            kept.pop(0)
        if len(looks) != 2:
            raise JournalDamaged(model="m", file="1.journal", record=1, problem="it is gone")

    monkeypatch.setattr(restores, "held_at", look)

    async def restored() -> PushstepError:
        model = made()
        try:
            lock = asyncio.Lock()
            unused: Any = None
            made_of: Any = object
            all_of_them = Restores(1, unused, lambda name: folder, lambda name: lock, made_of)
            with pytest.raises(PushstepError) as raised:
                await all_of_them.restore_version(model, 1, "operator")
            return raised.value
        finally:
            await model.close()

    assert isinstance(asyncio.run(restored()), VersionNotKept)
    assert looks == [2, 1]
    assert isinstance(asyncio.run(restored()), JournalDamaged)
    assert looks == [2, 1, 1]
