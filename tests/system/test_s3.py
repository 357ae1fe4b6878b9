"""Snapshots in S3, by its own protocol: s3fs speaks it in the server, and moto answers here. Neither is among the tests' packages.

`make test` takes them up where they are installed: `.venv/bin/pip install s3fs 'moto[server]'`.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.servers.operators import restore, take_snapshot
from tests.support.workers.wire import PARAMETERS, created, state_of

# what flask and boto say of themselves
pytestmark = [pytest.mark.s3, pytest.mark.filterwarnings("default")]
SECRET = "topsecret"
STEP = {name: np.full(value.shape, 0.25, np.float32) for name, value in PARAMETERS.items()}
SAME = ("uid", "version", "edit", "export", "body", "steps", "hooks")


class S3:
    """A server of S3's protocol, which can be away for a while, with one bucket."""

    def __init__(self) -> None:
        self.port = 0
        self.start()
        # moto keeps what it holds for as long as its process lives
        self.bucket = f"bucket-{uuid.uuid4().hex}"
        self.url = f"s3://{self.bucket}/a"
        httpx.put(f"{self.endpoint}/{self.bucket}", trust_env=False).raise_for_status()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()

    def held(self) -> list[str]:
        listed = httpx.get(f"{self.endpoint}/{self.bucket}?list-type=2", trust_env=False)
        return re.findall(r"<Key>([^<]+)</Key>", listed.text)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    made = S3()
    settings = {
        "AWS_ENDPOINT_URL": made.endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield made
    made.stop()


def same(state: dict[str, Any]) -> list[Any]:
    return [state[key] for key in SAME]


def sent(server: RunningServer) -> dict[str, Any]:
    found: dict[str, Any] = server.rest("GET", "/v1/models/m/durability").json()["snapshots_store"]
    return found


def test_snapshots_are_kept_read_restored_and_deleted_there(data: Path, s3: S3) -> None:
    options: dict[str, Any] = {"environment": dict(os.environ)}
    with running_server(data, "--snapshots", s3.url, "--durability", "everysec", **options) as server:
        session = created(server, "m")
        first = take_snapshot(server, "m")["id"]
        session.push(STEP)
        before = state_of(server, "m")
        content = server.rest("GET", f"/v1/models/m/snapshots/{first}/content").content
        assert server.rest("GET", f"/v1/models/m/snapshots/{first}").json()["verified"]
        log = server.log
    assert any(f"/{first}/manifest.json" in key for key in s3.held())
    assert not list((data / "models" / "m" / "snapshots").glob("t*"))
    with running_server(data, "--snapshots", s3.url, **options) as server:
        assert same(state_of(server, "m")) == same(before)
        assert server.rest("GET", f"/v1/models/m/snapshots/{first}/content").content == content
        assert restore(server, "m", first)["effective_version"] == 1
        assert server.rest("DELETE", f"/v1/models/m/snapshots/{first}").status_code == 204
        wait_until(lambda: not any(f"/{first}/" in key for key in s3.held()))
        assert server.rest("DELETE", "/v1/models/m").status_code == 204
        wait_until(lambda: [key.removeprefix("a/") for key in s3.held()] == ["owner.json"])
        assert SECRET not in log.read_text() + server.log.read_text()


def test_training_goes_on_while_it_is_away(data: Path, s3: S3) -> None:
    options: dict[str, Any] = {"environment": dict(os.environ)}
    with running_server(data, "--snapshots", s3.url, "--durability", "durable", **options) as server:
        session = created(server, "m")
        wait_until(lambda: sent(server)["sent"] is not None)
        s3.stop()
        refused = server.rest("POST", "/v1/models/m/snapshots")
        assert (refused.status_code, refused.json()["code"]) == (503, "snapshots_away")
        assert session.push(STEP).durable_version == 2
        s3.start()
        wait_until(lambda: sent(server)["problem"] is None, 60.0)
        newest = take_snapshot(server, "m")["id"]
        wait_until(lambda: any(f"/{newest}/manifest.json" in key for key in s3.held()))
        assert SECRET not in server.log.read_text()
