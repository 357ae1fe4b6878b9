"""The REST interface is what its description says, and the committed description is this code's."""

from __future__ import annotations

from pathlib import Path

import pytest

from pushstep.proto.errors import CATALOGUE
from pushstep.server.operator_door.examples import ANSWERS
from tests.support.access.schema_runs import DELETE_MODEL, described, run_schemathesis
from tests.support.servers.harness import RunningServer, running_server
from tests.support.servers.operators import add_hook, take_snapshot
from tests.support.workers.wire import created


def test_the_committed_description_is_fresh(server: RunningServer) -> None:
    served = server.rest("GET", "/openapi.json").json()
    assert served == described(), "run: python -m pushstep.server.operator_door"


def test_every_error_has_the_one_shape_and_every_model_may_be_missing() -> None:
    for path, operations in described()["paths"].items():
        for method, operation in operations.items():
            problems = {status for status in operation["responses"] if int(status) >= 400}
            assert problems >= {"400", "403", "408", "500", "503"}, (method, path)
            if "{m}" in path:
                assert problems >= {"404", "409"}, (method, path)
    for name, response in described()["components"]["responses"].items():
        assert list(response["content"]) == ["application/problem+json"], name
    patch = described()["paths"]["/v1/models/{m}/param-groups/{index}"]["patch"]
    assert "412" in patch["responses"]


def test_each_route_and_each_error_has_an_example() -> None:
    description = described()
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                kinds = response.get("content", {})
                if status in ("200", "201") and "application/json" in kinds and path != "/metrics":
                    assert "example" in kinds["application/json"], (method, path, status)
            body = operation.get("requestBody", {}).get("content", {})
            assert "application/json" not in body or "example" in repr(body["application/json"]), path
    shown = set()
    for name, response in description["components"]["responses"].items():
        for code, example in response["content"]["application/problem+json"]["examples"].items():
            assert (str(example["value"]["status"]), example["value"]["code"]) == (name, code)
            shown.add(code)
    statuses = set(map(int, description["components"]["responses"]))
    assert shown == {code for code, kind in CATALOGUE.items() if kind.http_status in statuses}


def test_answers_have_the_keys_of_their_examples(server: RunningServer, model_name: str) -> None:
    created(server, model_name)
    names = {
        "m": model_name,
        "index": "0",
        "name": "bias",
        "worker": "owner",
        "snapshot": take_snapshot(server, model_name)["id"],
        "hook_id": add_hook(server, model_name, "json_log", "step_post", {"every": 100})["id"],
    }
    for (method, path), example in ANSWERS.items():
        if method == "get":
            answer = server.rest("GET", path.format(**names))
            assert answer.status_code == 200, (path, answer.text)
            found = answer.json()
            assert set(found) == set(example), path
            for key, value in example.items():
                entries = (
                    isinstance(value, list) and value and found[key] and key not in ("optimizers", "events")
                )
                if entries and isinstance(value[0], dict):
                    assert set(value[0]) <= set(found[key][0]), (path, key)


def test_a_link_leads_to_a_parameter_of_its_target() -> None:
    operations = {op["operationId"]: op for path in described()["paths"].values() for op in path.values()}
    links = [
        link
        for operation in operations.values()
        for response in operation["responses"].values()
        for link in response.get("links", {}).values()
    ]
    assert len(links) > 25
    for link in links:
        known = {parameter["name"] for parameter in operations[link["operationId"]]["parameters"]}
        assert set(link["parameters"]) <= known, link


def check(data: Path, examples: int) -> None:
    """Every operation, on a model that has one of everything and on one that is not there."""
    with running_server(data) as server:
        created(server, "m")
        snapshot = take_snapshot(server, "m")["id"]
        hook = add_hook(server, "m", "json_log", "step_post", {"every": 100})["id"]
        there: dict[str, str | int] = {
            "m": "m",
            "name": "bias",
            "worker": "owner",
            "snapshot": snapshot,
            "hook_id": hook,
            "index": 1,
        }
        others = ("--exclude-operation-id", DELETE_MODEL)
        run_schemathesis(server, data / "there", examples, *others, **there)
        # along the links, without names given: each answer gives those that the next call takes
        run_schemathesis(server, data / "chains", examples, *others, phases="stateful", m="m")
        assert server.rest("GET", "/v1/models/m").status_code == 200
        run_schemathesis(server, data / "missing", examples // 2, **dict.fromkeys(there, "nothing"))
        run_schemathesis(server, data / "gone", 5, "--include-operation-id", DELETE_MODEL, m="m")
        assert server.stop() == 0
        log = server.log.read_text()
        assert "internal error" not in log
        assert "Traceback" not in log


@pytest.mark.timeout(300)
def test_no_answer_is_another_than_described(data: Path) -> None:
    check(data, 12)


@pytest.mark.soak
def test_no_answer_is_another_than_described_at_length(data: Path) -> None:
    """Takes at most an hour."""
    check(data, 1000)
