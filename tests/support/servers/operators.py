"""What an operator does over REST, in one line each; every call must succeed."""

from __future__ import annotations

import http.client
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.support.servers.harness import RunningServer


def patch_group(server: RunningServer, model: str, index: int, **values: float | bool) -> dict[str, Any]:
    """Change a group's hyperparameters; the reply."""
    return _answer(server, "PATCH", f"/v1/models/{model}/param-groups/{index}", 200, json=values)


def add_hook(
    server: RunningServer, model: str, name: str, point: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Install a hook; the reply."""
    body = {"name": name, "point": point, "settings": settings}
    return _answer(server, "POST", f"/v1/models/{model}/hooks", 201, json=body)


def remove_hook(server: RunningServer, model: str, hook_id: str) -> dict[str, Any]:
    """Take a hook out; the reply."""
    return _answer(server, "DELETE", f"/v1/models/{model}/hooks/{hook_id}", 200)


def set_policy(server: RunningServer, model: str, **settings: object) -> dict[str, Any]:
    """Have pushes applied by another policy, or by other settings of this one; the reply."""
    return _answer(server, "PATCH", f"/v1/models/{model}/policy", 200, json=settings)


def evict(server: RunningServer, model: str, worker: str) -> dict[str, Any]:
    """Fence a worker; the reply."""
    return _answer(server, "DELETE", f"/v1/models/{model}/workers/{worker}", 200)


def release(server: RunningServer, model: str, worker: str) -> dict[str, Any]:
    """Let a worker out of quarantine; the reply."""
    return _answer(server, "POST", f"/v1/models/{model}/workers/{worker}/release", 200)


def take_snapshot(server: RunningServer, model: str) -> dict[str, Any]:
    """Take a snapshot; its description."""
    return _answer(server, "POST", f"/v1/models/{model}/snapshots", 201)


def restore(server: RunningServer, model: str, snapshot: str) -> dict[str, Any]:
    """Restore a snapshot; the reply."""
    return _answer(server, "POST", f"/v1/models/{model}/snapshots/{snapshot}/restore", 200)


def delete_snapshot(server: RunningServer, model: str, snapshot: str) -> None:
    """Delete a snapshot."""
    answer = server.rest("DELETE", f"/v1/models/{model}/snapshots/{snapshot}")
    assert answer.status_code == 204, answer.text


def set_gate(server: RunningServer, model: str, **settings: object) -> dict[str, Any]:
    """Let other pushes in; the reply."""
    return _answer(server, "PATCH", f"/v1/models/{model}/gate", 200, json=settings)


def show_worker(server: RunningServer, model: str, worker: str) -> dict[str, Any]:
    """One worker, as an operator sees it."""
    workers = _answer(server, "GET", f"/v1/models/{model}/workers", 200)["workers"]
    return next(shown for shown in workers if shown["name"] == worker)


def show_model(server: RunningServer, model: str) -> dict[str, Any]:
    """A model in numbers."""
    return _answer(server, "GET", f"/v1/models/{model}", 200)


def all_models(server: RunningServer) -> list[Any]:
    """The models of all pages."""
    found, query = [], ""
    while True:
        page = server.rest("GET", f"/v1/models{query}").json()
        found += page["models"]
        if page["next"] is None:
            return found
        query = f"?cursor={quote(page['next'])}"


def download(server: RunningServer, path: str, form: str) -> bytes:
    """A checkpoint: of a model's `export`, or of a snapshot's `content`."""
    answer = server.rest("GET", f"/v1/models/{path}", params={"format": form})
    assert answer.status_code == 200, answer.text
    return answer.content


def begin_download(
    server: RunningServer, path: str, until: ExitStack, receive_bytes: int = 4096
) -> http.client.HTTPResponse:
    """A checkpoint's answer of which nothing but the head is read, `until` its connection is closed."""
    host, _, port = server.http.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    until.callback(connection.close)
    connection.connect()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.request("GET", f"/v1/models/{path}")
    answer = connection.getresponse()
    until.callback(answer.close)
    return answer


def _answer(server: RunningServer, method: str, path: str, status: int, **options: Any) -> dict[str, Any]:
    answer = server.rest(method, path, **options)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def checkpoints_held(server: RunningServer) -> int:
    """How many written checkpoints, which no folder lists, the process holds open."""
    found = 0
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        try:
            found += "tmp-export-" in str(link.readlink())
        except FileNotFoundError:
            continue
    return found
