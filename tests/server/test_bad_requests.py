"""Requests that should not be: one shape of answer for all of them, and the model is what it was before."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from pushstep.client import Session
from pushstep.proto.errors import CATALOGUE
from pushstep.proto.errors.status import from_problem
from pushstep.server.operator_door.app import MAX_BODY_BYTES
from tests.support.servers.harness import RunningServer
from tests.support.workers.wire import created, untouched

MODEL = "bad-requests"
ROOT = f"/v1/models/{MODEL}"
GROUP = f"{ROOT}/param-groups/1"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def owner(server: RunningServer) -> Session:
    return created(server, MODEL)


def raw_request(
    server: RunningServer, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """The status and problem of a refusal. The path goes out as it is: no client tidies it up first."""
    host, _, port = server.http.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host="Host" in (headers or {}), skip_accept_encoding=True)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        if isinstance(body, bytes):
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body if isinstance(body, bytes) else None)
        answer = connection.getresponse()
        content = answer.read()
        assert answer.getheader("content-type") == "application/problem+json", (answer.status, content)
    problem = json.loads(content)
    assert set(problem) == {"type", "title", "status", "detail", "code", "help", "fields"}
    assert problem["status"] == answer.status
    assert type(from_problem(problem)) is CATALOGUE[problem["code"]]
    assert len(problem["detail"]) > 5
    return answer.status, problem


def assert_refused(
    server: RunningServer, status: int, code: str, *request: Any, **more: Any
) -> dict[str, Any]:
    with untouched(server, MODEL):
        got, problem = raw_request(server, *request, **more)
    assert (got, problem["code"]) == (status, code), problem["detail"]
    return problem


# the body of a PATCH of an Adadelta group
PATCHES: dict[str, tuple[bytes | str, str]] = {
    "unknown": ('{"momentum": 0.9}', "invalid_hyperparameter"),
    "of another rule": ('{"lr_decay": 0.1}', "invalid_hyperparameter"),
    "one good, one bad": ('{"lr": 0.5, "rho": 2}', "invalid_hyperparameter"),
    "negative": ('{"lr": -0.1}', "invalid_hyperparameter"),
    "above its range": ('{"rho": 1.5}', "invalid_hyperparameter"),
    "NaN": ('{"lr": NaN}', "invalid_settings"),
    "infinity": ('{"eps": Infinity}', "invalid_settings"),
    "infinity by its exponent": ('{"weight_decay": 1e999}', "invalid_settings"),
    "infinity as words": ('{"lr": "inf"}', "invalid_settings"),
    "a number as words": ('{"lr": "1e3"}', "invalid_settings"),
    "a flag as words": ('{"maximize": "yes"}', "invalid_settings"),
    "a name twice": ('{"lr": 0.5, "lr": 0.25}', "invalid_settings"),
    "half a character": ('{"\\ud800": 1}', "invalid_text"),
    "a control character": ('{"l\\u0000r": 1}', "invalid_text"),
    "an over-long name": ('{"' + "x" * 300 + '": 1}', "invalid_settings"),
    "more than float32 can hold": ('{"lr": 1e39}', "invalid_hyperparameter"),
    "a flag for a number": ('{"lr": true}', "invalid_hyperparameter"),
    "a number for a flag": ('{"maximize": 1}', "invalid_hyperparameter"),
    "null": ('{"lr": null}', "invalid_settings"),
    "a list": ('{"lr": [1]}', "invalid_settings"),
    "an object": ('{"lr": {"a": 1}}', "invalid_settings"),
    "words": ('{"lr": "fast"}', "invalid_settings"),
    "an integer without end": ('{"lr": ' + "9" * 5000 + "}", "invalid_settings"),
    "an integer beyond any float": ('{"lr": ' + "9" * 400 + "}", "invalid_settings"),
    "no object": ("[1]", "invalid_settings"),
    "no JSON": ("{", "invalid_settings"),
    "nothing": ("", "invalid_settings"),
    "no text": (b"\xff\xfe\x00", "invalid_settings"),
    "nested without end": ("[" * 100_000, "invalid_settings"),
    "params": ('{"params": 1}', "invalid_hyperparameter"),
    "the rule": ('{"rule": 1}', "invalid_hyperparameter"),
}


@pytest.mark.parametrize("case", PATCHES)
def test_bad_patch(case: str, server: RunningServer, owner: Session) -> None:
    body, code = PATCHES[case]
    sent = body if isinstance(body, bytes) else body.encode()
    assert_refused(server, 422, code, "PATCH", GROUP, sent, JSON)
    assert server.rest("GET", GROUP).json()["held"] == []


def test_the_largest_float32_is_a_hyperparameter_that_can_be_stepped(server: RunningServer) -> None:
    """One that cannot would break a step off half way."""
    session = created(server, f"{MODEL}-large")
    group = f"/v1/models/{MODEL}-large/param-groups/1"
    for value in (3.4028234663852886e38, 1e-320, 0.0):
        assert server.rest("PATCH", group, json={"lr": value}).json()["lr"] == value
        session.push({"bias": np.full(4, 1e-3, np.float32)})
    assert server.rest("GET", f"/v1/models/{MODEL}-large").json()["failed"] is None


BODIES = [("PATCH", GROUP), ("POST", f"{ROOT}/hooks")]


@pytest.mark.parametrize(("method", "path"), BODIES)
def test_bodies_over_the_limit(method: str, path: str, server: RunningServer, owner: Session) -> None:
    """Declared, so that nothing is read; and in chunks that say nothing of their sum."""
    huge = b" " * MAX_BODY_BYTES + b"{}"
    problem = assert_refused(server, 413, "message_too_large", method, path, huge, JSON)
    assert problem["fields"]["limit"] == str(MAX_BODY_BYTES)

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield bytes(1 << 16)

    with untouched(server, MODEL):
        answer = server.rest(method, path, content=chunks(), headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (413, "message_too_large")


@pytest.mark.parametrize(("method", "path"), BODIES)
def test_a_body_that_is_not_json_by_its_type(
    method: str, path: str, server: RunningServer, owner: Session
) -> None:
    """What a page in a browser may send without being asked."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert_refused(server, 422, "invalid_settings", method, path, b'{"lr": 0.5}', {"Content-Type": kind})


@pytest.mark.parametrize("coding", [b"gzip", b"GZIP, identity", b"deflate", b"x" * 5000])
def test_a_packed_body_is_not_unpacked(coding: bytes, server: RunningServer, owner: Session) -> None:
    """Whatever the body is: one of a few bytes could hold any number of them. Routes of files, too."""
    field = {"Content-Encoding": coding.decode()}
    files = [("PUT", f"{ROOT}/state-dict"), ("POST", "/v1/models?name=packed")]
    for body in (b'{"lr": 0.5}', gzip.compress(b'{"lr": 0.5}')):
        for method, path in [*BODIES, *files]:
            assert_refused(server, 415, "unsupported_encoding", method, path, body, {**JSON, **field})
    answer = server.rest("DELETE", f"{ROOT}/hooks/none", headers=field)
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "identity")
    assert server.rest("GET", GROUP, headers=field).status_code == 200


def test_a_body_as_it_is_may_say_so(server: RunningServer, owner: Session) -> None:
    lr = server.rest("GET", GROUP).json()["lr"]
    field = {"Content-Encoding": "identity"}
    assert server.rest("PATCH", GROUP, json={"lr": lr}, headers=field).status_code == 200


HOSTS = [
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example:80",
    "",
    "[::2]:80",
    "localhost@evil",
    "localhost:1@evil",
    "[localhost]",
    "localhost:x",
    "127.0.0.1:80:80",
    "0",
]


@pytest.mark.parametrize("host", HOSTS, ids=repr)
@pytest.mark.parametrize(
    "request_", [("GET", ROOT), ("DELETE", ROOT), ("PATCH", GROUP), ("GET", "/healthz")], ids=repr
)
def test_foreign_hosts(host: str, request_: tuple[str, str], server: RunningServer, owner: Session) -> None:
    body = b'{"lr": 0.5}' if request_[0] == "PATCH" else None
    assert_refused(server, 403, "host_not_allowed", *request_, body, {**JSON, "Host": host})


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:7071", "[::1]:80", "[::1]"])
def test_own_hosts(host: str, server: RunningServer) -> None:
    assert server.rest("GET", "/healthz", headers={"Host": host}).status_code == 200


METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "NONSENSE"]


def routes(server: RunningServer) -> dict[str, set[str]]:
    paths = server.rest("GET", "/openapi.json").json()["paths"]
    return {path: {method.upper() for method in methods} for path, methods in paths.items()}


def test_wrong_methods(server: RunningServer, owner: Session) -> None:
    """On every route: what it does not have is refused by name."""
    fill = {
        "m": MODEL,
        "index": "0",
        "name": "bias",
        "hook_id": "h",
        "snapshot": "t1-v1-e0-1",
        "worker": "owner",
    }
    with untouched(server, MODEL), httpx.Client(base_url=f"http://{server.http}", trust_env=False) as client:
        for path, known in routes(server).items():
            for method in set(METHODS) - known:
                answer = client.request(method, path.format(**fill).replace(":path", ""))
                assert answer.status_code == 405, (method, path, answer.text)
                assert answer.headers["allow"].split(", ") == sorted(known)
                if method != "HEAD":
                    assert answer.json()["code"] == "method_not_allowed"


PATHS = [
    "/",
    "/v1/",
    "/v2/models",
    f"{ROOT}/nothing",
    f"{ROOT}x/..",
    f"/v1/models/../models/{MODEL}/export/..",
    "/v1/models/%2e%2e/export",
    "/v1/models/..%2f..%2fetc",
    "/v1/models/%2Fetc%2Fpasswd",
    "/v1/models/a%00b",
    "/v1/models/%ff%fe",
    f"/v1/models/{'x' * 5000}",
    f"{ROOT}/param-groups/%2e%2e",
    f"{ROOT}/param-groups/1%2F..",
    f"{ROOT}/param-groups/99999999999999999999999",
    f"{ROOT}/param-groups/-1",
    f"{ROOT}/parameters/..%2f..%2fidentity.json",
    f"{ROOT}/parameters/{'x' * 2000}",
    f"{ROOT}/hooks/..",
    f"{ROOT}/hooks/%2e%2e%2f",
    f"{ROOT}/workers/..%2f",
    f"{ROOT}/snapshots/..",
    f"{ROOT}/snapshots/%2e%2e",
    f"{ROOT}/snapshots/..%2f..%2f..",
    f"{ROOT}/snapshots/t1-v1-e0-1%2f..%2f..",
    f"{ROOT}/snapshots/t1-v1-e0-1%00",
    f"{ROOT}/snapshots/t1-v1-e0-1%0a",
    f"{ROOT}/snapshots/tmp-0123/content",
    f"{ROOT}/snapshots/identity.json/content",
    f"{ROOT}/snapshots/t1-v1-e0-1/content?format=../x",
    f"{ROOT}/export?format=",
]


@pytest.mark.parametrize("method", ["GET", "DELETE", "POST"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:60])
def test_paths_that_lead_nowhere(method: str, path: str, server: RunningServer, owner: Session) -> None:
    files = sorted((server.data / "models" / MODEL).rglob("*"))
    with untouched(server, MODEL):
        status, problem = raw_request(server, method, path)
    assert status in (404, 405, 422)
    known = ("unknown_", "method_not_allowed", "invalid_settings", "unsupported_format")
    assert problem["code"].startswith(known)
    assert sorted((server.data / "models" / MODEL).rglob("*")) == files
    assert "internal error" not in server.log.read_text()


HOOKS: dict[str, tuple[Any, str]] = {
    "unknown": ({"name": "os.system", "point": "step_pre"}, "invalid_hook"),
    "a path": ({"name": "../clip_grad_norm", "point": "step_pre"}, "invalid_hook"),
    "no name": ({"point": "step_pre"}, "invalid_settings"),
    "another point": ({"name": "clip_grad_norm", "point": "step_post"}, "invalid_hook"),
    "no such point": ({"name": "json_log", "point": "always"}, "invalid_hook"),
    "no settings": ({"name": "clip_grad_norm", "point": "step_pre"}, "invalid_hook"),
    "wrong settings": (
        {"name": "clip_grad_norm", "point": "step_pre", "settings": {"max_norm": -1}},
        "invalid_hook",
    ),
    "more settings": (
        {"name": "clip_grad_norm", "point": "step_pre", "settings": {"max_norm": 1, "p": 2}},
        "invalid_hook",
    ),
    "settings of another kind": (
        {"name": "finite_guard", "point": "step_pre", "settings": [1]},
        "invalid_settings",
    ),
    "another action": (
        {"name": "finite_guard", "point": "step_pre", "settings": {"action": "no"}},
        "invalid_hook",
    ),
    "more fields": ({"name": "json_log", "point": "step_pre", "code": "import os"}, "invalid_settings"),
    "prepend of another kind": (
        {"name": "json_log", "point": "step_pre", "prepend": "at once"},
        "invalid_settings",
    ),
    "never": ({"name": "json_log", "point": "step_post", "settings": {"every": 0}}, "invalid_hook"),
    "prepend as a number": ({"name": "json_log", "point": "step_pre", "prepend": 0}, "invalid_settings"),
    "prepend as words": ({"name": "json_log", "point": "step_pre", "prepend": "yes"}, "invalid_settings"),
    "a number as words": (
        {"name": "clip_grad_norm", "point": "step_pre", "settings": {"max_norm": "1e3"}},
        "invalid_hook",
    ),
    "half a character for a metric": (
        {
            "name": "lr_scheduler",
            "point": "step_post",
            "settings": {"scheduler": "ReduceLROnPlateau", "metric": "\ud800"},
        },
        "invalid_text",
    ),
    "half a character for an argument": (
        {
            "name": "lr_scheduler",
            "point": "step_post",
            "settings": {"scheduler": "StepLR", "arguments": {"\udfff": 1}},
        },
        "invalid_text",
    ),
    "a control character for a mode": (
        {
            "name": "lr_scheduler",
            "point": "step_post",
            "settings": {"scheduler": "ReduceLROnPlateau", "arguments": {"mode": "mi\u0000n"}},
        },
        "invalid_text",
    ),
    "settings without end": (
        {"name": "json_log", "point": "step_pre", "settings": {"every": [1] * 10_000}},
        "invalid_settings",
    ),
    "no object": ([], "invalid_settings"),
}


@pytest.mark.parametrize("case", HOOKS)
def test_bad_hook(case: str, server: RunningServer, owner: Session) -> None:
    body, code = HOOKS[case]
    assert_refused(server, 422, code, "POST", f"{ROOT}/hooks", json.dumps(body).encode(), JSON)


def test_a_hook_without_a_finite_norm(server: RunningServer, owner: Session) -> None:
    for norm in ("NaN", "Infinity", "1e999"):
        body = f'{{"name": "clip_grad_norm", "point": "step_pre", "settings": {{"max_norm": {norm}}}}}'
        assert_refused(server, 422, "invalid_settings", "POST", f"{ROOT}/hooks", body.encode(), JSON)


QUERIES = ["hold=yes", "hold=1", "hold=", "hold=True", "hold=true%00", "hold=false&hold=maybe"]


@pytest.mark.parametrize("query", QUERIES)
def test_a_flag_is_true_or_false(query: str, server: RunningServer, owner: Session) -> None:
    assert_refused(server, 422, "invalid_settings", "PATCH", f"{GROUP}?{query}", b'{"lr": 0.5}', JSON)


NUMBERS = ["1.0", "%201", "1_0", "%2B1", "-1", "1e1", "", "99999999999999999999", "%D9%A1"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "path", ["/parameters?limit=", "/workers?limit=", "/events?after=", "/param-groups/"]
)
def test_a_whole_number_is_digits(path: str, number: str, server: RunningServer, owner: Session) -> None:
    got, problem = raw_request(server, "GET", f"{ROOT}{path}{number}")
    assert (got, problem["code"]) in [
        (422, "invalid_settings"),
        (404, "unknown_group"),
        (404, "unknown_route"),
    ]


CONDITIONS = {
    "the tag": ("{}", 200),
    "one of a list": ('"1-9999", {} , "x,y"', 200),
    "any": ("*", 200),
    "another": ('"1-9999"', 412),
    "a list of others": ('"1-9999", "1-9998"', 412),
    "a weak one": ("W/{}", 412),
    "without its quotes": ("1-1", 412),
    "inside another": ('"a{}"', 412),
    "nothing": ("", 412),
}


@pytest.mark.parametrize("case", CONDITIONS)
def test_an_edit_under_a_condition(case: str, server: RunningServer, owner: Session) -> None:
    condition, status = CONDITIONS[case]
    etag = server.rest("GET", GROUP).headers["etag"]
    headers = {"If-Match": condition.format(etag)}
    assert server.rest("PATCH", GROUP, json={"lr": 1.0}, headers=headers).status_code == status


def test_several_conditions_are_one_list(server: RunningServer, owner: Session) -> None:
    etag = server.rest("GET", GROUP).headers["etag"]
    for headers, status in (
        ([("If-Match", '"1-9999"'), ("If-Match", etag)], 200),
        ([("If-Match", '"1-9999"'), ("If-Match", '"1-9998"')], 412),
    ):
        assert server.rest("PATCH", GROUP, json={"lr": 1.0}, headers=headers).status_code == status


@pytest.mark.parametrize("origin", ["http://elsewhere.example", "null", "http://127.0.0.1:1"])
def test_a_foreign_page_changes_nothing(server: RunningServer, model_name: str, origin: str) -> None:
    """What a browser sends for a page without asking first: a plain POST, with the page's origin."""
    server.connect(model_name).create({"w": np.zeros(2, np.float32)})
    path = f"/v1/models/{model_name}/snapshots"
    before = server.rest("GET", path).json()["snapshots"]
    refused = server.rest("POST", path, headers={"Origin": origin, "Content-Type": "text/plain"})
    assert (refused.status_code, refused.json()["code"]) == (403, "host_not_allowed")
    assert server.rest("GET", path).json()["snapshots"] == before
    own = server.rest("POST", path, headers={"Origin": f"http://{server.http}"})
    assert own.status_code == 201
