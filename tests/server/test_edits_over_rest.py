"""Operators' edits: a dry run of each changes not a byte, and each is made only on the state that its caller knows (ETags)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from pushstep.server.operator_door.openapi import FILE
from tests.support.servers.harness import RunningServer, running_server, start_server
from tests.support.servers.operators import add_hook, take_snapshot
from tests.support.workers.wire import PARAMETERS, created, state_of

M = "/v1/models/m"
MODEL = "/v1/models/{m}"
NEW = {"new": np.zeros(3, np.float32)}
# Every edit, with what it is tried with: a query, a JSON body or a file.
EDITS: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/models"): {"params": {"name": "other", "groups": '[{"rule": "adagrad"}]'}, "content": save(NEW)},
    ("DELETE", MODEL): {},
    ("PATCH", f"{MODEL}/param-groups/{{index}}"): {"json": {"lr": 0.25, "frozen": True}},
    ("POST", f"{MODEL}/param-groups"): {"json": {"rule": "adagrad", "params": [{"name": "n", "shape": [2]}]}, "params": {"force": "true"}},
    ("POST", f"{MODEL}/hooks"): {"json": {"name": "finite_guard", "point": "step_pre"}},
    ("DELETE", f"{MODEL}/hooks/{{hook_id}}"): {},
    ("PATCH", f"{MODEL}/hooks/{{hook_id}}"): {"json": {"settings": {"every": 7}, "position": 0}},
    ("PATCH", f"{MODEL}/policy"): {"json": {"policy": "bounded", "bound": 2}},
    ("PATCH", f"{MODEL}/gate"): {"json": {"nonfinite": "skip"}},
    ("PATCH", f"{MODEL}/durability"): {"json": {"level": "everysec"}},
    ("POST", f"{MODEL}/restore"): {"json": {"version": 1}},
    ("POST", f"{MODEL}/workers/{{worker}}/quarantine"): {},
    ("POST", f"{MODEL}/workers/{{worker}}/release"): {},
    ("DELETE", f"{MODEL}/workers/{{worker}}"): {},
    ("POST", f"{MODEL}/snapshots"): {},
    ("DELETE", f"{MODEL}/snapshots/{{snapshot}}"): {},
    ("POST", f"{MODEL}/snapshots/{{snapshot}}/restore"): {},
    ("PUT", f"{MODEL}/state-dict"): {"content": save({n: np.asarray(v + 1) for n, v in PARAMETERS.items()})},
}  # fmt: skip
# What has an ETag, and an edit of it.
TAGGED: dict[str, tuple[str, str, Any]] = {
    "/param-groups": ("PATCH", "/param-groups/0", {"lr": 0.5}),
    "/param-groups/0": ("PATCH", "/param-groups/0", {"lr": 0.75}),
    "/hooks": ("POST", "/hooks", {"name": "json_log", "point": "step_post"}),
    "/policy": ("PATCH", "/policy", {"policy": "async", "scale": True}),
    "/gate": ("PATCH", "/gate", {"norm_outlier": 9.0}),
    "/durability": ("PATCH", "/durability", {"keep": 3}),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("edits") / "data", "--snapshot-every-s", "100000") as server:
        created(server, "m")
        answer = server.rest("PATCH", f"{M}/durability", json={"level": "durable"})
        assert answer.status_code == 200
        yield server


def ask(server: RunningServer, method: str, path: str, status: int = 200, **options: Any) -> httpx.Response:
    answer = server.rest(method, path, **options)
    assert answer.status_code == status, answer.text
    return answer


def everything(server: RunningServer) -> dict[str, Any]:
    """All that an operator or the disk can tell of a model."""
    found: dict[str, Any] = state_of(server, "m")
    for path in (*TAGGED, "/events", "/snapshots"):
        answer = ask(server, "GET", M + path)
        found[path] = (answer.content, answer.headers.get("etag"))
    workers = ask(server, "GET", f"{M}/workers").json()["workers"]
    passing = ("last_seen_s", "lease_left_s")
    found["workers"] = [{k: v for k, v in worker.items() if k not in passing} for worker in workers]
    folder = server.data / "models"
    found["files"] = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return found


def test_every_edit_is_tried() -> None:
    described = json.loads(FILE.read_text())["paths"]
    edits = {
        (method.upper(), path)
        for path, operations in described.items()
        for method, operation in operations.items()
        if method != "get"
    }
    assert edits == set(EDITS)
    for method, path in edits:
        parameters = described[path][method.lower()]["parameters"]
        assert "dry_run" in [parameter["name"] for parameter in parameters], (method, path)


def test_a_dry_run_changes_not_a_byte(served: RunningServer) -> None:
    with closing(served.connect("m", "w1")) as worker:
        worker.push({"bias": np.ones(4, np.float32)})
        names = {"m": "m", "index": "0", "worker": "owner"}
        names["snapshot"] = take_snapshot(served, "m")["id"]
        names["hook_id"] = add_hook(served, "m", "json_log", "step_post", {"every": 100})["id"]
        before = everything(served)
        for (method, path), options in EDITS.items():
            query = {**options.get("params", {}), "dry_run": "true"}
            answer = ask(served, method, path.format(**names), **{**options, "params": query}).json()
            assert answer["dry_run"] is True, path
            assert set(answer) >= {"before", "after"}, path
            assert answer["before"] != answer["after"] or path.endswith("/release"), path
            after = everything(served)
            assert [key for key in before if before[key] != after[key]] == [], (method, path)
        assert ask(served, "GET", "/v1/models").json()["models"][0]["name"] == "m"
        worker.push({"bias": np.ones(4, np.float32)})


def test_a_dry_run_says_what_the_edit_does(served: RunningServer) -> None:
    body = {"json": {"lr": 0.125, "frozen": False}}
    path = f"{M}/param-groups/0"
    planned = ask(served, "PATCH", f"{path}?dry_run=true", **body).json()
    done = ask(served, "PATCH", path, **body).json()
    assert {**planned["after"], "etag": done["etag"]} == {
        k: done[k] for k in done if k != "effective_version"
    }
    hook = {"json": {"name": "finite_guard", "point": "step_pre", "prepend": True}}
    planned = ask(served, "POST", f"{M}/hooks?dry_run=true", **hook).json()
    done = ask(served, "POST", f"{M}/hooks", 201, **hook).json()
    assert planned["after"]["id"] == done["id"] == planned["after"]["order"][0]


REFUSED = {
    "a value": ("PATCH", "/param-groups/0", {"lr": -1.0}, "invalid_hyperparameter"),
    "a group": ("PATCH", "/param-groups/9", {"lr": 1.0}, "unknown_group"),
    "a frozen number": ("PATCH", "/param-groups/0", {"frozen": 1.0}, "invalid_hyperparameter"),
    "a hook": ("POST", "/hooks", {"name": "nothing", "point": "step_pre"}, "invalid_hook"),
    "a policy": ("PATCH", "/policy", {"policy": "none"}, "invalid_settings"),
    "a version": ("POST", "/restore", {"version": 10**6}, "version_not_kept"),
    "a snapshot": ("POST", "/snapshots/t9-v9-e9-9/restore", None, "unknown_snapshot"),
    "a deleted snapshot": ("DELETE", "/snapshots/t9-v9-e9-9", None, "unknown_snapshot"),
    "a worker": ("POST", "/workers/nobody/quarantine", None, "unknown_worker"),
}


@pytest.mark.parametrize("method, path, body, code", REFUSED.values(), ids=REFUSED)
def test_a_dry_run_is_refused_as_the_edit_is(
    method: str, path: str, body: Any, code: str, served: RunningServer
) -> None:
    answers = [served.rest(method, f"{M}{path}{dry}", json=body) for dry in ("?dry_run=true", "")]
    assert [answer.json()["code"] for answer in answers] == [code, code]
    assert answers[0].content == answers[1].content


@pytest.mark.parametrize("path", TAGGED)
def test_an_etag_is_changed_by_edits_alone_and_a_stale_one_is_refused(
    path: str, served: RunningServer
) -> None:
    method, where, body = TAGGED[path]
    done = 201 if method == "POST" else 200
    etag = ask(served, "GET", M + path).headers["etag"]
    assert etag.startswith('"')
    with closing(served.connect("m", "w2")) as worker:
        worker.push({"bias": np.ones(4, np.float32)})
    assert ask(served, "GET", M + path).headers["etag"] == etag
    tag = ask(served, "GET", M + (path if method == "POST" else where)).headers["etag"]
    ask(served, method, M + where, done, json=body, headers={"If-Match": tag})
    newer = ask(served, "GET", M + path).headers["etag"]
    assert newer != etag
    before = everything(served)
    for dry in ("", "?dry_run=true"):
        stale = ask(served, method, M + where + dry, 412, json=body, headers={"If-Match": tag})
        assert stale.json()["code"] == "stale_etag"
    assert everything(served) == before
    ask(served, method, M + where, done, json=body, headers={"If-Match": "*"})


def test_a_scheduler_changes_the_etags_of_the_groups_that_it_holds(served: RunningServer) -> None:
    def tags() -> list[str]:
        return [ask(served, "GET", f"{M}/param-groups/{n}").headers["etag"] for n in (0, 1)]

    before = tags()
    settings = {"scheduler": "StepLR", "arguments": {"step_size": 5}, "groups": [1]}
    hook = add_hook(served, "m", "lr_scheduler", "step_post", settings)["id"]
    held = tags()
    assert (held[0] == before[0], held[1] == before[1]) == (True, False)
    etag = ask(served, "GET", f"{M}/hooks/{hook}").headers["etag"]
    ask(served, "DELETE", f"{M}/hooks/{hook}", 412, headers={"If-Match": '"other"'})
    ask(served, "DELETE", f"{M}/hooks/{hook}", headers={"If-Match": etag})
    assert tags()[1] != held[1]


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_etags_are_the_same_after_a_restart(how: str, data: Path) -> None:
    server = start_server(data, "--durability", "durable")
    created(server, "m")
    for method, where, body in TAGGED.values():
        ask(server, method, M + where, 201 if method == "POST" else 200, json=body)
    before = {path: ask(server, "GET", M + path).headers["etag"] for path in TAGGED}
    assert len(set(before.values())) >= 5
    if how == "stop":
        assert server.stop() == 0
    else:
        server.kill()
    with running_server(data) as again:
        assert {path: ask(again, "GET", M + path).headers["etag"] for path in TAGGED} == before
        etag = before["/param-groups/0"]
        ask(again, "PATCH", f"{M}/param-groups/0", json={"lr": 0.5}, headers={"If-Match": etag})
        ask(again, "PATCH", f"{M}/param-groups/0", 412, json={"lr": 0.5}, headers={"If-Match": etag})


def test_another_model_of_the_same_name_has_other_etags(served: RunningServer) -> None:
    tags = []
    for _ in range(2):
        with closing(served.connect("again")) as session:
            session.create({"p": np.zeros(2, np.float32)}, [{"rule": "adagrad", "params": ["p"]}])
            tags.append(ask(served, "GET", "/v1/models/again/gate").headers["etag"])
        ask(served, "DELETE", "/v1/models/again", 204)
    assert tags[0] != tags[1]
