"""Checkpoints over HTTP: a download that broke off is gone on with only where it stays one version, and leaves no file."""

from __future__ import annotations

import http.client
import io
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load

from pushstep.client import Session
from pushstep.proto.errors import RangeNotSatisfiable
from pushstep.server.operator_door.answers.download import part_of
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.servers.operators import (
    checkpoints_held,
    delete_snapshot,
    patch_group,
    restore,
    take_snapshot,
)

ELEMENTS = 50_000
ONES = {"a": np.ones(ELEMENTS, np.float32), "b": np.ones(ELEMENTS, np.float32)}


@pytest.fixture
def session(server: RunningServer, model_name: str) -> Iterator[Session]:
    with server.connect(model_name) as made:
        zeros = {name: np.zeros_like(value) for name, value in ONES.items()}
        made.create(zeros, [{"rule": "adagrad", "params": ["a", "b"], "lr": 1.0}])
        made.push(ONES)
        yield made


def get(server: RunningServer, model: str, path: str, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.rest("GET", f"/v1/models/{model}/{path}", headers=names)


def leftovers(server: RunningServer) -> list[Path]:
    return list(server.data.glob("tmp-export-*"))


# what a Range header names of 100 bytes: (first, last) with a part, None with the whole, "416" with nothing
FORMS: dict[str, tuple[int, int] | str | None] = {
    "bytes=0-": (0, 99),
    "bytes=10-19": (10, 19),
    "bytes=99-99": (99, 99),
    "bytes=99-100000": (99, 99),
    "bytes=-10": (90, 99),
    "bytes=-100000": (0, 99),
    "bytes=100-": "416",
    "bytes=99999999-": "416",
    "bytes=100-200": "416",
    "bytes=-0": "416",
    "bytes=a-b": None,
    "bytes=": None,
    "bytes=-": None,
    "bytes=20-10": None,
    "bytes=0-1,5-6": None,
    "bytes=--1": None,
    "bytes=0--1": None,
    "bytes=0x1-": None,
    "bytes=1e1-": None,
    "bytes=" + "9" * 400 + "-": None,
    "bytes=٣-": None,
    "lines=0-1": None,
    "0-1": None,
    "bytes": None,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_range(form: str) -> None:
    expected = FORMS[form]
    if expected == "416":
        with pytest.raises(RangeNotSatisfiable):
            part_of(form, 100)
    else:
        found = part_of(form, 100)
        assert (None if found is None else (found[0], found[1] - 1)) == expected


@pytest.mark.parametrize("source", ["content", "pinned"])
@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_what_cannot_move_is_sent_in_parts(
    form: str, source: str, server: RunningServer, session: Session
) -> None:
    path = f"export?format={form}&version=1"
    if source == "content":
        path = f"snapshots/{take_snapshot(server, session.model)['id']}/content?format={form}"
    whole = get(server, session.model, path)
    assert (whole.status_code, whole.headers["accept-ranges"]) == (200, "bytes")
    size = len(whole.content)
    assert int(whole.headers["content-length"]) == size
    parts = []
    for first in range(0, size, size // 3 + 1):
        last = min(first + size // 3, size - 1)
        part = get(server, session.model, path, range=f"bytes={first}-{last}")
        assert part.status_code == 206
        assert part.headers["content-range"] == f"bytes {first}-{last}/{size}"
        assert part.headers["etag"] == whole.headers["etag"]
        parts.append(part.content)
    assert b"".join(parts) == whole.content
    assert get(server, session.model, path, range="bytes=-7").content == whole.content[-7:]
    behind = get(server, session.model, path, range=f"bytes={size}-")
    assert (behind.status_code, behind.json()["code"]) == (416, "range_not_satisfiable")
    assert behind.headers["content-range"] == f"bytes */{size}"
    assert get(server, session.model, path, range="bytes=b-a").content == whole.content
    assert leftovers(server) == []


def test_a_moving_export_is_sent_whole(server: RunningServer, session: Session) -> None:
    """What `curl -C -` and `wget -c` ask for, who do not say what they have."""
    first = get(server, session.model, "export")
    assert "accept-ranges" not in first.headers
    for asked in ("bytes=1000-", "bytes=99999999-", "bytes=a-b", "bytes=-5"):
        again = get(server, session.model, "export", range=asked)
        assert (again.status_code, again.content) == (200, first.content)
    session.push(ONES)
    after = get(server, session.model, "export", range="bytes=1000-")
    assert after.status_code == 200
    assert float(load(after.content)["a"][0]) == float(load(after.content)["b"][-1])


def test_who_names_its_content_gets_the_rest_of_that(server: RunningServer, session: Session) -> None:
    whole = get(server, session.model, "export")
    etag = whole.headers["etag"]
    assert etag.startswith('"')  # strong
    rest = get(server, session.model, "export", range="bytes=1000-", if_range=etag)
    assert (rest.status_code, rest.content) == (206, whole.content[1000:])
    for other in ('"other"', f"W/{etag}", "Sun, 01 Jan 2030 00:00:00 GMT", ""):
        assert get(server, session.model, "export", range="bytes=1000-", if_range=other).status_code == 200
    session.push(ONES)
    moved = get(server, session.model, "export", range="bytes=1000-", if_range=etag)
    assert moved.status_code == 200
    assert moved.headers["etag"] != etag


def test_a_pinned_version_that_is_gone_is_named(server: RunningServer, session: Session) -> None:
    assert get(server, session.model, "export?version=1").status_code == 200
    session.push(ONES)
    for path in ("export?version=1", "export?version=9", "export?timeline=2", "export?version=2&timeline=7"):
        refused = get(server, session.model, path, range="bytes=10-")
        assert (refused.status_code, refused.json()["code"]) == (409, "version_moved")
    assert get(server, session.model, "export?version=2&timeline=1").status_code == 200


def test_one_number_may_name_two_contents(server: RunningServer, session: Session) -> None:
    """An edit adds no version and changes what the file holds; a restore brings the number back."""
    path = "export?format=torch&version=1"
    first = get(server, session.model, path)
    assert get(server, session.model, path, range="bytes=100-").status_code == 206
    patch_group(server, session.model, 0, lr=0.25)
    for _ in range(2):
        assert get(server, session.model, path, range="bytes=100-").status_code == 200
    assert get(server, session.model, path).content != first.content
    snapshot = take_snapshot(server, session.model)["id"]
    restore(server, session.model, snapshot)
    for _ in range(2):
        assert get(server, session.model, "export?version=1", range="bytes=100-").status_code == 200
    statuses = [
        get(server, session.model, "export?version=1&timeline=2", range="bytes=100-").status_code
        for _ in range(2)
    ]
    assert statuses == [200, 206]  # nobody can have a part of it before it was sent
    delete_snapshot(server, session.model, snapshot)


def test_a_version_that_another_process_has_made(data: Path) -> None:
    """It may have sent something else under the same number, edits before its end included."""
    with running_server(data) as server:
        server.connect("m").create({"a": np.zeros(5000, np.float32)})
    with running_server(data) as server:
        session = server.connect("m")
        for _ in range(2):
            assert get(server, "m", "export?version=0", range="bytes=10-").status_code == 200
        session.push({"a": np.ones(5000, np.float32)})
        statuses = [get(server, "m", "export?version=1", range="bytes=10-").status_code for _ in range(2)]
        assert statuses == [200, 206]


def test_equal_exports_are_equal_bytes(server: RunningServer, session: Session) -> None:
    """Or a strong ETag would never be the same."""
    for form in ("safetensors", "torch"):
        one, other = (get(server, session.model, f"export?format={form}") for _ in range(2))
        assert one.content == other.content
        assert one.headers["etag"] == other.headers["etag"]
    loaded = torch.load(io.BytesIO(other.content), weights_only=True)
    assert loaded["model"]["a"].shape == (ELEMENTS,)


def test_downloads_that_nobody_finishes_leave_nothing(data: Path) -> None:
    """Broken off, and never read: the room on the disk is given back, also while the connection stands."""
    with running_server(data, "--stall-s", "0.3") as server:
        session = server.connect("m")
        session.create({"a": np.zeros(4_000_000, np.float32)})
        host, _, port = server.http.rpartition(":")
        for _ in range(3):
            connection = http.client.HTTPConnection(host, int(port))
            connection.request("GET", "/v1/models/m/export")
            connection.getresponse().read(1000)
            connection.close()
        with socket.socket() as silent:
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            silent.connect((host, int(port)))
            silent.sendall(b"GET /v1/models/m/export HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_until(lambda: checkpoints_held(server) == 1)
            wait_until(lambda: checkpoints_held(server) == 0)
        assert leftovers(server) == []
        assert "Traceback" not in server.log.read_text()
