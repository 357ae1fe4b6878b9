"""REST: every route does what it says, edits name the version from which they hold, and errors have one shape."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors import safe_open

from pushstep.client import Session
from pushstep.proto.errors import CATALOGUE
from pushstep.proto.errors.status import from_problem
from pushstep.server.arenas.arena import PARAMETER_BYTES
from pushstep.server.config import Config
from pushstep.server.models.catalog import Catalog
from pushstep.server.models.saved_models import SavedModels
from pushstep.server.operator_door.app import create_app
from pushstep.server.parts.looks import LOOK_ELEMENTS
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.servers.operators import all_models
from tests.support.workers.wire import PARAMETERS, created, state_of

ONES = {"bias": np.ones(4, np.float32)}


class Rest:
    """One model's REST interface."""

    def __init__(self, server: RunningServer, model: str) -> None:
        self.root = f"/v1/models/{model}"
        self.client = httpx.Client(base_url=f"http://{server.http}", timeout=20, trust_env=False)

    def __call__(self, method: str, path: str, status: int = 200, **options: Any) -> Any:
        """The JSON of an answer that has this status; an error's must have the one shape."""
        answer = self.response(method, path, status, **options)
        return answer.json() if answer.content else None

    def response(self, method: str, path: str, status: int = 200, **options: Any) -> httpx.Response:
        url = path if path.startswith(("/v1", "/openapi")) else self.root + path
        answer = self.client.request(method, url, **options)
        assert answer.status_code == status, answer.text
        if status >= 400:
            assert answer.headers["content-type"] == "application/problem+json"
            problem = answer.json()
            assert set(problem) == {"type", "title", "status", "detail", "code", "help", "fields"}
            assert problem["status"] == status
            assert type(from_problem(problem)) is CATALOGUE[problem["code"]]
        return answer


@pytest.fixture
def session(server: RunningServer, model_name: str) -> Session:
    return created(server, model_name)


@pytest.fixture
def rest(server: RunningServer, session: Session) -> Iterator[Rest]:
    made = Rest(server, session.model)
    yield made
    made.client.close()


def test_models(rest: Rest, session: Session, server: RunningServer) -> None:
    shown = rest("GET", "")
    (listed,) = [each for each in all_models(server) if each["name"] == session.model]
    assert listed == {key: value for key, value in shown.items() if key != "figures"}
    assert (shown["name"], shown["version"], shown["timeline"], shown["edit"]) == (session.model, 1, 1, 0)
    assert (shown["parameters"], shown["elements"], shown["groups"]) == (4, 28, 2)
    rows = 5 + 4 + 4  # each with the version that changed it
    assert shown["bytes"] == 4 * (15 * 2 + 13 * 3) + 8 * rows + 4 * PARAMETER_BYTES
    assert (shown["workers_live"], shown["failed"], shown["nonfinite"]) == (1, None, "reject")
    step = shown["last_step"]
    assert (step["version"], step["worker"], step["staleness"], step["clip_factor"]) == (1, "owner", 0, 1.0)
    assert step["gradient_norm"] == pytest.approx(0.5 * 28**0.5)
    accepted = {"policy": "async", "scale": False, "max_staleness": None, "max_staleness_by_group": {}}
    assert rest("GET", "/policy") == {**accepted, "effective_version": 2}
    capacity = rest("GET", "/v1/capacity")
    assert capacity["models"]["held"] == len(all_models(server))
    assert capacity["bytes"]["held"] >= shown["bytes"]


def test_a_deleted_model_is_gone_from_the_disk_too(
    rest: Rest, session: Session, server: RunningServer
) -> None:
    rest("POST", "/snapshots", 201)
    folder = server.data / "models" / session.model
    assert folder.exists()
    assert rest.response("DELETE", "", 204).content == b""
    assert not folder.exists()
    assert rest("GET", "", 404)["code"] == "unknown_model"
    assert rest("DELETE", "", 404)["code"] == "unknown_model"
    with pytest.raises(Exception) as caught:
        session.push(ONES)
    assert getattr(caught.value, "code", "") == "model_lost"


def test_a_model_is_deleted_while_it_is_saved(server: RunningServer, model_name: str) -> None:
    session = server.connect(model_name)
    values = {"p": np.zeros(4_000_000, np.float32)}
    session.create(values, [{"rule": "adadelta", "params": ["p"]}])
    folder = server.data / "models" / model_name
    rest = Rest(server, model_name)
    with rest.client, ThreadPoolExecutor(1) as pool:
        saved = pool.submit(rest, "POST", "/snapshots", 201)
        wait_until(lambda: list(folder.glob("snapshots/tmp-*")))
        rest("DELETE", "", 204)
        assert saved.result(60)["version"] == 0
        assert not folder.exists()
        assert rest("GET", "", 404)["code"] == "unknown_model"


def test_parameters(rest: Rest) -> None:
    listed = rest("GET", "/parameters")
    assert listed["total"] == 4
    assert [(p["name"], p["shape"], p["dtype"], p["group"], p["steps"]) for p in listed["parameters"]] == [
        ("table", [5, 3], "float32", 0, 1),
        ("weight", [4, 2], "float32", 1, 1),
        ("bias", [4], "float32", 1, 1),
        ("scale", [], "float32", 1, 1),
    ]
    first = rest("GET", "/parameters?limit=1")
    page = rest("GET", "/parameters", params={"limit": 2, "cursor": first["next"]})
    assert [p["name"] for p in page["parameters"]] == ["weight", "bias"]
    for query in ("cursor=x", "limit=0", "limit=10001", "limit=x"):
        assert rest("GET", f"/parameters?{query}", 422)["code"] == "invalid_settings"


def test_a_parameter_in_numbers(rest: Rest, session: Session) -> None:
    value = session.pull()["weight"].astype(np.float64)
    shown = rest("GET", "/parameters/weight")
    assert set(shown["statistics"]) == {"value", "square_avg", "acc_delta"}
    statistics = shown["statistics"]["value"]
    assert statistics == pytest.approx(
        {"min": value.min(), "max": value.max(), "mean": value.mean(), "norm": np.linalg.norm(value)}
    )
    assert (shown["version"], shown["timeline"], shown["looked_at"]) == (1, 1, 8)
    assert rest("GET", "/parameters/wei", 404)["code"] == "unknown_parameter"


def test_a_large_parameter_is_looked_at_in_parts(server: RunningServer, model_name: str) -> None:
    """The writer copies a bounded part of it, spread over all of it."""
    values = np.ones(3 * LOOK_ELEMENTS, np.float32)
    values[:LOOK_ELEMENTS] = 3.0
    session = server.connect(model_name)
    session.create({"p": values}, [{"rule": "adagrad", "params": ["p"]}])
    with httpx.Client(base_url=f"http://{server.http}", timeout=60, trust_env=False) as client:
        shown = client.get(f"/v1/models/{model_name}/parameters/p").json()
        assert client.delete(f"/v1/models/{model_name}").status_code == 204
    assert LOOK_ELEMENTS * 0.99 < shown["looked_at"] <= LOOK_ELEMENTS
    statistics = shown["statistics"]["value"]
    assert (statistics["min"], statistics["max"]) == (1.0, 3.0)
    assert statistics["mean"] == pytest.approx(5 / 3, rel=0.01)
    assert statistics["norm"] == pytest.approx(np.linalg.norm(values), rel=0.01)


def test_param_groups_show_torchs_words(rest: Rest) -> None:
    listed = rest("GET", "/param-groups")
    adagrad, adadelta = listed["param_groups"]
    assert listed["effective_version"] == 2
    assert (adagrad["rule"], adagrad["lr"], adagrad["params"]) == ("adagrad", 0.1, ["table"])
    assert (adadelta["rule"], adadelta["rho"], adadelta["params"]) == (
        "adadelta",
        0.9,
        ["weight", "bias", "scale"],
    )
    answer = rest.response("GET", "/param-groups/1")
    assert answer.json() == {**adadelta, "effective_version": 2}
    assert answer.headers["etag"] == adadelta["etag"]
    assert rest("GET", "/param-groups/2", 404)["code"] == "unknown_group"
    assert rest("GET", "/param-groups/-1", 404)["code"] == "unknown_group"
    assert rest("GET", "/param-groups/x", 422)["code"] == "invalid_settings"


def test_a_patch_holds_from_the_version_that_it_says(rest: Rest, session: Session) -> None:
    changed = rest("PATCH", "/param-groups/1", json={"lr": 0.25, "maximize": True})
    assert (changed["lr"], changed["maximize"], changed["rho"]) == (0.25, True, 0.9)
    assert (changed["effective_version"], changed["held"]) == (2, ["lr", "maximize"])
    receipt = session.push(ONES)
    assert receipt.version == 2
    assert receipt.groups[1]["lr"] == 0.25
    assert rest("GET", "")["edit"] == 1
    released = rest("PATCH", "/param-groups/1?hold=false", json={"lr": 0.5})
    assert released["held"] == ["maximize"]
    assert released["effective_version"] == 3


def test_held_fields_outlast_a_workers_edits(rest: Rest, server: RunningServer, model_name: str) -> None:
    module = torch.nn.Linear(2, 1)
    name = f"{model_name}-held"
    remote = server.connect(name).attach(torch.optim.Adadelta(module.parameters(), lr=1.0), module=module)
    held = Rest(server, name)

    def step(**edit: float) -> Any:
        remote.param_groups[0].update(edit)
        remote.zero_grad()
        module(torch.ones(1, 2)).sum().backward()
        remote.step()
        return remote.last_receipt

    assert step(lr=0.9).groups[0]["lr"] == 0.9
    held("PATCH", "/param-groups/0", json={"lr": 0.5})
    with pytest.warns(RuntimeWarning):
        receipt = step(lr=0.8, rho=0.8)
    assert list(receipt.ignored_edits) == ["0.lr"]
    assert (receipt.groups[0]["lr"], receipt.groups[0]["rho"]) == (0.5, 0.8)
    assert remote.param_groups[0]["lr"] == 0.5
    held("PATCH", "/param-groups/0?hold=false", json={"lr": 0.5})
    assert step(lr=0.7).groups[0]["lr"] == 0.7
    assert held("GET", "/param-groups/0")["lr"] == 0.7
    held.client.close()


def test_if_match(rest: Rest, session: Session) -> None:
    """Optional; a worker's push does not make it stale, another PATCH does."""
    etag = rest.response("GET", "/param-groups/0").headers["etag"]
    session.push(ONES)
    answer = rest.response("PATCH", "/param-groups/0", json={"lr": 0.2}, headers={"If-Match": etag})
    newer = answer.headers["etag"]
    assert newer != etag
    stale = rest("PATCH", "/param-groups/0", 412, json={"lr": 0.3}, headers={"If-Match": etag})
    assert stale["code"] == "stale_etag"
    assert newer in stale["detail"]
    assert rest("GET", "/param-groups/0")["lr"] == 0.2
    for condition in ('"nonsense"', "", "W/" + newer):
        rest("PATCH", "/param-groups/0", 412, json={"lr": 0.3}, headers={"If-Match": condition})
    rest("PATCH", "/param-groups/0", json={"lr": 0.4}, headers={"If-Match": newer})
    rest("PATCH", "/param-groups/0", json={"lr": 0.5}, headers={"If-Match": "*"})
    rest("PATCH", "/param-groups/0", json={"lr": 0.6})
    other = rest.response("GET", "/param-groups/1").headers["etag"]
    rest("PATCH", "/param-groups/1", json={"lr": 0.6}, headers={"If-Match": other})


def test_an_etag_is_stale_after_a_restore(rest: Rest) -> None:
    snapshot = rest("POST", "/snapshots", 201)["id"]
    etag = rest.response("GET", "/param-groups/0").headers["etag"]
    rest("POST", f"/snapshots/{snapshot}/restore")
    rest("PATCH", "/param-groups/0", 412, json={"lr": 0.3}, headers={"If-Match": etag})


def test_no_worker_is_ahead_of_a_model_that_went_back(rest: Rest, session: Session) -> None:
    snapshot = rest("POST", "/snapshots", 201)["id"]
    for _ in range(3):
        session.exchange(ONES)
    rest("POST", f"/snapshots/{snapshot}/restore")
    assert [worker["lag"] for worker in rest("GET", "/workers")["workers"]] == [0]


def test_workers_and_eviction(rest: Rest, session: Session, server: RunningServer) -> None:
    other = server.connect(session.model, "other")
    other.push(ONES, metrics={"loss": float("nan"), "accuracy": 0.5})
    shown, owner = rest("GET", "/workers")["workers"]
    assert rest("GET", "/workers/other")["name"] == "other"
    assert (owner["name"], owner["lead"], owner["state"], owner["lag"]) == ("owner", True, "live", 2)
    assert (shown["name"], shown["lead"], shown["epoch"], shown["sequence"]) == ("other", False, 1, 1)
    assert shown["metrics"] == {"loss": None, "accuracy": 0.5}
    assert shown["outcomes"] == {"applied": 1}
    assert 0 < shown["lease_left_s"] <= 30
    assert rest("DELETE", "/workers/other") == {"name": "other", "effective_version": 3}
    with pytest.raises(Exception) as caught:
        other.push(ONES)
    assert getattr(caught.value, "code", "") == "fenced"
    assert [w["state"] for w in rest("GET", "/workers")["workers"]] == ["evicted", "live"]
    assert rest("DELETE", "/workers/nobody", 404)["code"] == "unknown_worker"
    session.push(ONES)


def test_events_say_who_what_and_when(rest: Rest, session: Session) -> None:
    rest("PATCH", "/param-groups/0", json={"lr": 0.25})
    hook = rest("POST", "/hooks", 201, json={"name": "finite_guard", "point": "step_pre"})["id"]
    rest("DELETE", f"/hooks/{hook}")
    snapshot = rest("POST", "/snapshots", 201)["id"]
    rest("POST", f"/snapshots/{snapshot}/restore")
    rest("DELETE", f"/snapshots/{snapshot}", 204)
    events = rest("GET", "/events")["events"]
    kinds = [event["kind"] for event in events]
    assert kinds == [
        "created",
        "snapshot_taken",
        "param_group_changed",
        "hook_added",
        "hook_removed",
        "snapshot_taken",
        "restored",
        "snapshot_deleted",
    ]
    changed = events[2]
    assert (changed["by"], changed["group"], changed["values"]) == ("operator", 0, {"lr": 0.25})
    assert (changed["version"], changed["edit"], changed["timeline"]) == (1, 1, 1)
    assert events[0]["by"] == "owner"
    assert events[-1]["timeline"] == 2
    ids = [event["id"] for event in events]
    assert ids == sorted(set(ids))
    assert rest("GET", f"/events?after={ids[2]}")["events"] == events[3:]
    assert rest("GET", "/events?after=-1", 422)["code"] == "invalid_settings"


def test_snapshots(rest: Rest, session: Session, server: RunningServer) -> None:
    (first,) = rest("GET", "/snapshots")["snapshots"]
    assert (first["version"], first["automatic"]) == (0, True)
    taken = rest("POST", "/snapshots", 201)
    before = state_of(server, session.model)
    assert (taken["version"], taken["timeline"], taken["automatic"]) == (1, 1, False)
    assert [f["stop"] for f in taken["files"]] == [15, 13]
    assert all(len(f["xxh3_128"]) == 32 and f["start"] == 0 for f in taken["files"])
    assert rest("GET", "/snapshots") == {"snapshots": [taken, first], "next": None}
    assert rest("GET", f"/snapshots/{taken['id']}")["verified"] is True
    session.push(ONES)
    restored = rest("POST", f"/snapshots/{taken['id']}/restore")
    assert (restored["timeline"], restored["effective_version"]) == (2, 1)
    after = state_of(server, session.model)
    for key in ("uid", "version", "export", "body", "steps"):
        assert after[key] == before[key], key
    assert rest.response("DELETE", f"/snapshots/{taken['id']}", 204).content == b""
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/restore"), ("GET", "/content")):
        assert rest(method, f"/snapshots/{taken['id']}{path}", 404)["code"] == "unknown_snapshot"


@pytest.mark.parametrize("source", ["export", "content"])
def test_checkpoints_in_both_formats(source: str, rest: Rest, session: Session, tmp_path: Path) -> None:
    values = session.pull()
    path = "/export"
    if source == "content":
        path = f"/snapshots/{rest('POST', '/snapshots', 201)['id']}/content"
        session.push(ONES)
    answer = rest.response("GET", f"{path}?format=safetensors")
    assert answer.headers["x-pushstep-version"] == "1"
    assert answer.headers["x-pushstep-timeline"] == "1"
    assert session.model in answer.headers["content-disposition"]
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(answer.content)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["version"] == "1"
        assert set(opened.keys()) == set(PARAMETERS)
        for name, value in values.items():
            assert opened.get_tensor(name).numpy().tobytes() == value.tobytes()
    answer = rest.response("GET", f"{path}?format=torch")
    loaded = torch.load(io.BytesIO(answer.content), weights_only=True)
    assert {n: t.numpy().tobytes() for n, t in loaded["model"].items()} == {
        n: v.tobytes() for n, v in values.items()
    }
    assert [len(group["params"]) for group in loaded["optimizer"]["param_groups"]] == [1, 3]
    assert all(state["step"] == 1.0 for state in loaded["optimizer"]["state"].values())
    assert rest("GET", f"{path}?format=pickle", 422)["code"] == "unsupported_format"


def test_exports_leave_no_files(rest: Rest, server: RunningServer) -> None:
    for form in ("safetensors", "torch"):
        rest.response("GET", f"/export?format={form}")
    rest("GET", "/export?format=x", 422)
    rest("GET", "/v1/models")
    assert not list(server.data.glob("tmp-export-*"))


def test_state_dict_in_numbers(rest: Rest) -> None:
    shown = rest("GET", "/state-dict")
    (optimizer,) = shown["optimizers"]
    assert shown["version"] == 1
    assert [group["lr"] for group in optimizer["param_groups"]] == [0.1, 1.0]
    table = optimizer["state"]["0"]
    assert (table["step"], table["sum"]["shape"]) == (1.0, [5, 3])
    assert table["sum"]["norm"] == pytest.approx(0.25 * 15**0.5)


def test_openapi_is_valid_and_describes_every_route(rest: Rest) -> None:
    document = rest("GET", "/openapi.json")
    assert document["openapi"].startswith("3.")
    assert not list(_broken_references(document, document))
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    assert len(operations) >= 24
    assert len({operation["operationId"] for _, _, operation in operations}) == len(operations)
    for path, method, operation in operations:
        assert operation["summary"], path
        assert operation["responses"], path
        named = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
        assert named == {
            part[1:-1].removesuffix(":path") for part in path.split("/") if part.startswith("{")
        }, path
        if method == "patch" or (method == "post" and "requestBody" in operation):
            for kind, content in operation["requestBody"]["content"].items():
                assert kind == "application/octet-stream" or "example" in repr(content)


def _broken_references(node: Any, document: Any) -> Iterator[str]:
    if isinstance(node, dict):
        target = node.get("$ref")
        if isinstance(target, str):
            found = document
            for part in target.removeprefix("#/").split("/"):
                found = found.get(part, {})
            if not found:
                yield target
        for value in node.values():
            yield from _broken_references(value, document)
    elif isinstance(node, list):
        for value in node:
            yield from _broken_references(value, document)


def test_health(server: RunningServer) -> None:
    assert server.rest("GET", "/healthz").json() == {"status": "ok"}
    assert server.rest("GET", "/readyz").json() == {"ready": True}


def test_not_ready_before_loading_and_while_draining(data: Path) -> None:
    catalog = Catalog(Config(data=data))
    transport = httpx.ASGITransport(create_app(catalog, None))

    async def ask(path: str) -> int:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.get(path)).status_code

    assert asyncio.run(ask("/readyz")) == 503
    assert asyncio.run(ask("/healthz")) == 200
    asyncio.run(SavedModels(catalog).load())
    assert asyncio.run(ask("/readyz")) == 200
    catalog.ready = False
    assert asyncio.run(ask("/readyz")) == 503
    assert asyncio.run(ask("/healthz")) == 200
