"""Lists a page at a time: every entry that is there throughout comes once, whatever is inserted or removed meanwhile."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.servers.harness import RunningServer, running_server
from tests.support.servers.operators import add_hook, delete_snapshot, remove_hook, take_snapshot
from tests.support.workers.wire import created

M = "/v1/models/m"
LISTS = ("/v1/models", *(M + path for path in ("/parameters", "/workers", "/snapshots", "/hooks", "/events")))
LISTS += (f"{M}/param-groups",)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("pages") / "data") as server:
        created(server, "m")
        yield server


def ask(server: RunningServer, path: str, status: int = 200, **query: Any) -> dict[str, Any]:
    answer = server.rest("GET", path, params=query)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def walked(server: RunningServer, path: str, key: str, between: Callable[[int], None]) -> list[Any]:
    """The entries of a list, one of each page; `between` is called after each."""
    name, found = path.rpartition("/")[2].replace("-", "_"), []
    query: dict[str, Any] = {"limit": 1}
    for number in range(100):
        page = ask(server, path, **query)
        found += [entry[key] for entry in page[name]]
        if page["next"] is None:
            return found
        between(number)
        query["cursor"] = page["next"]
    raise AssertionError(f"{path} has no end")


def nothing(_: int) -> None:
    """What most lists change in while they are read."""


def test_whole_pages_and_single_ones_agree(served: RunningServer) -> None:
    for hook in range(3):
        add_hook(served, "m", "json_log", "step_post", {"every": 10 + hook})
    for path in LISTS:
        name = path.rpartition("/")[2].replace("-", "_")
        whole = ask(served, path)
        assert whole["next"] is None, path
        key = {"param_groups": "index", "hooks": "id", "snapshots": "id", "events": "id"}.get(name, "name")
        assert walked(served, path, key, nothing) == [entry[key] for entry in whole[name]], path


def test_models_come_and_go_between_pages(served: RunningServer) -> None:
    def one(name: str) -> None:
        session = served.connect(name)
        session.create({"p": np.zeros(2, np.float32)}, [{"rule": "adagrad", "params": ["p"]}])
        session.close()

    for name in ("b", "d", "x"):
        one(name)

    def change(number: int) -> None:
        if number == 0:  # `b` was shown: it goes, and one before it comes
            one("a")
            assert served.rest("DELETE", "/v1/models/b").status_code == 204
        elif number == 1:
            one("q")

    assert walked(served, "/v1/models", "name", change) == ["b", "d", "m", "q", "x"]


def test_workers_come_and_go_between_pages(served: RunningServer) -> None:
    sessions = [served.connect("m", f"w{number}") for number in range(4)]
    for session in sessions:
        session.push({"bias": np.ones(4, np.float32)})
    found = walked(
        served, f"{M}/workers", "name", lambda number: served.connect("m", f"a{number}").pull() and None
    )
    assert found == ["owner", "w0", "w1", "w2", "w3"]


def test_snapshots_come_and_go_between_pages(served: RunningServer) -> None:
    old = [take_snapshot(served, "m")["id"] for _ in range(3)]

    def change(number: int) -> None:
        if number == 0:
            take_snapshot(served, "m")
            delete_snapshot(served, "m", old[2])  # it was shown
        elif number == 1:
            delete_snapshot(served, "m", old[0])  # it was not yet

    found = walked(served, f"{M}/snapshots", "id", change)
    assert found[:2] == [old[2], old[1]]
    assert old[0] not in found
    assert len(set(found)) == len(found)


def test_hooks_come_and_go_between_pages(served: RunningServer) -> None:
    there = [hook["id"] for hook in ask(served, f"{M}/hooks")["hooks"]]
    there += [add_hook(served, "m", "json_log", "step_post", {"every": 99})["id"] for _ in range(2)]

    def change(number: int) -> None:
        if number == 0:
            body = {"name": "finite_guard", "point": "step_pre", "prepend": True}
            assert served.rest("POST", f"{M}/hooks", json=body).status_code == 201
            remove_hook(served, "m", there[0])

    found = walked(served, f"{M}/hooks", "id", change)
    assert [hook for hook in found if hook in there] == there
    assert len(set(found)) == len(found) == len(there) + 1


def cursor(*parts: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).rstrip(b"=").decode()


BAD = {
    "nothing": "",
    "no base64": "%%%",
    "half of one": "ab",
    "no JSON": base64.urlsafe_b64encode(b"{").decode(),
    "nested": base64.urlsafe_b64encode(b"[" * 3000).decode(),
    "of another list": cursor("others", "a"),
    "a number's": cursor("KIND", 10**4200),
    "no number": cursor("KIND", True),
    "a null": cursor("KIND", None),
    "lists in a list": cursor("KIND", [["a"], {}]),
    "too long": cursor("KIND", "1" * 8000),
    "a snapshot's with long numbers": cursor("KIND", f"t{'1' * 4400}-v1-e1-1"),
    "not a text": cursor("KIND", {"a": 1}),
    "beyond any": "x" * 9001,
}


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_what_is_no_cursor_is_refused_by_name(text: str, path: str, served: RunningServer) -> None:
    kind = path.rpartition("/")[2]
    if "KIND" in (plain := _plain(text)):
        text = cursor(kind, json.loads(plain)[1])
    answer = served.rest("GET", path, params={"cursor": text})
    if answer.status_code == 200:  # a key that fits, of what is not there
        assert set(answer.json())
    else:
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_settings")


def _plain(text: str) -> str:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    except ValueError:
        return ""


def test_no_page_was_an_internal_error(data: Path, served: RunningServer) -> None:
    assert "Traceback" not in served.log.read_text()
