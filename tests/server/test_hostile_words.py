"""Hostile names and numbers over REST: a named error, nothing touched, and no line of the log or of an event forged."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, quote_from_bytes

import httpx
import numpy as np
import pytest

from tests.support.servers.harness import RunningServer, running_server
from tests.support.servers.operators import take_snapshot
from tests.support.workers.wire import created, state_of

FORGED = "FORGED 2026-11-30 12:00:00 WARNING pushstep: all is lost"
LONG = "x" * 10_000
CATEGORIES = 30
# One character of each of Unicode's categories, the first and the last of them, and the ends of the planes.
KINDS: dict[str, str] = {}
for character in map(chr, range(sys.maxunicode + 1)):
    KINDS.setdefault(unicodedata.category(character), character)
    if len(KINDS) == CATEGORIES:
        break
UNICODE = (
    "".join(character for kind, character in KINDS.items() if kind != "Cs")
    + "\uffff\U0001f600\U0010ffff\u202e"
)
NAMES = {
    "a newline": f"a\n{FORGED}",
    "a carriage return": f"a\r\n{FORGED}",
    "other ends of lines": f"a\u2028{FORGED}\x85{FORGED}\x0b\x0c",
    "a terminal's words": "\x1b[2J\x1b]0;title\x07",
    "NUL": "a\0b",
    "a folder above": "..",
    "many above": "../../../../etc/passwd",
    "an absolute path": "/etc/passwd",
    "backslashes": "..\\..\\windows",
    "a dot": ".",
    "slashes": "a//b/",
    "spaces": "   ",
    "a percent": "%2e%2e%2f%00",
    "quotes": "'\"`$(reboot);{}<script>",
    "a template": "{model!r:>99999999}",
    "all of Unicode": UNICODE,
    "10,000 characters": LONG,
    "10,000 wide ones": "\U0001f600" * 2500,
    "every category": "".join(KINDS[kind] for kind in sorted(KINDS) if kind != "Cs"),
}
BYTES = {"no UTF-8": b"a\xff\xfe", "half a character": b"\xf0\x9f\x98", "a surrogate": b"\xed\xa0\x80"}
QUOTED = {**{key: quote(name, safe="") for key, name in NAMES.items()}}
QUOTED |= {key: quote_from_bytes(name, safe="") for key, name in BYTES.items()}
M = "/v1/models/m"
# Every place of a request that takes a name.
PLACES = [
    ("GET", "/v1/models/{}", None),
    ("DELETE", "/v1/models/{}", None),
    ("POST", "/v1/models?name={}", b"x"),
    ("GET", "/v1/capacity?model={}", None),
    ("PATCH", M + "/param-groups/{}", b'{"lr": 1.0}'),
    ("GET", M + "/parameters/{}", None),
    ("GET", M + "/parameters?cursor={}", None),
    ("GET", M + "/workers/{}", None),
    ("DELETE", M + "/workers/{}", None),
    ("POST", M + "/workers/{}/quarantine", None),
    ("POST", M + "/workers/{}/release", None),
    ("GET", M + "/hooks/{}", None),
    ("DELETE", M + "/hooks/{}", None),
    ("GET", M + "/snapshots/{}", None),
    ("DELETE", M + "/snapshots/{}", None),
    ("POST", M + "/snapshots/{}/restore", None),
    ("GET", M + "/snapshots/{}/content", None),
    ("GET", M + "/export?format={}", None),
    ("GET", M + "/events?kind={}", None),
    ("GET", M + "/events?actor={}&worker={}", None),
    ("DELETE", M + "/workers/owner?dry_run={}", None),
]
# The same in bodies; NAME is replaced.
BODIES: list[tuple[str, str, Any]] = [
    ("PATCH", "/param-groups/0", {"NAME": 1.0}),
    ("POST", "/hooks", {"name": "NAME", "point": "step_pre"}),
    ("POST", "/hooks", {"name": "json_log", "point": "NAME"}),
    ("POST", "/hooks", {"name": "json_log", "point": "step_post", "settings": {"NAME": 1}}),
    ("PATCH", "/policy", {"policy": "NAME"}),
    ("PATCH", "/gate", {"nonfinite": "NAME"}),
    ("PATCH", "/durability", {"level": "NAME"}),
    ("POST", "/restore", {"version": "NAME"}),
    ("POST", "/param-groups?force=true", {"rule": "NAME", "params": [{"name": "p", "shape": [1]}]}),
    ("POST", "/param-groups?force=true", {"rule": "adagrad", "NAME": 1, "params": [{"name": "p", "shape": [1]}]}),
]  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("words") / "data", "--snapshot-every-s", "100000") as server:
        created(server, "m")
        take_snapshot(server, "m")
        yield server


@pytest.fixture(scope="module")
def rest(served: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{served.http}", timeout=20, trust_env=False) as client:
        yield client


def all_of(server: RunningServer) -> Any:
    found: dict[str, Any] = state_of(server, "m")
    for path in ("/policy", "/gate", "/durability", "/snapshots", "/events"):
        found[path] = server.rest("GET", M + path).content
    found["models"] = [model["name"] for model in server.rest("GET", "/v1/models").json()["models"]]
    return found


def require_named(answer: httpx.Response, what: Any) -> None:
    """Refused by name, or, of a filter, answered with nothing."""
    assert answer.status_code < 500, (what, answer.text[:500])
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/problem+json", what
        assert answer.json()["code"], what
        assert len(answer.content) < 20_000, what
    else:
        assert answer.request.method == "GET", (what, answer.text[:500])
        assert "kind=" in str(answer.request.url) or "actor=" in str(answer.request.url), what


@pytest.mark.parametrize("quoted", QUOTED.values(), ids=QUOTED)
def test_a_hostile_name_in_an_address(quoted: str, served: RunningServer, rest: httpx.Client) -> None:
    before = all_of(served)
    for method, path, body in PLACES:
        if quoted in (".", "%2E", "..", "%2E%2E") and "?" not in path:
            continue  # clients take such a segment out of the path
        address = path.replace("{}", quoted)
        raw = httpx.URL(f"http://{served.http}").copy_with(raw_path=address.encode())
        try:
            answer = rest.request(method, raw, content=body, headers={"content-type": "application/json"})
        except httpx.RemoteProtocolError:
            continue  # longer than a request's head may be: the connection ends
        require_named(answer, (method, path))
    assert all_of(served) == before


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_hostile_name_in_a_body(name: str, served: RunningServer, rest: httpx.Client) -> None:
    before = all_of(served)
    for method, path, body in BODIES:
        text = json.dumps(body).replace('"NAME"', json.dumps(name))
        answer = rest.request(method, M + path, content=text, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, (path, answer.text[:300])
        require_named(answer, path)
    assert all_of(served) == before


NUMBERS = ["1e308", "-1e308", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "9223372036854775808"]
NUMBERS += [
    "-9223372036854775809",
    "-0.0",
    "1e-400",
    "5e-324",
    "-1",
    "9" * 400,
    "1.5",
    "true",
    "null",
    '"1"',
    "[]",
]
FIELDS: list[tuple[str, str, str]] = [
    *(("PATCH", "/param-groups/0", name) for name in ("lr", "lr_decay", "weight_decay", "eps")),
    *(("PATCH", "/param-groups/1", name) for name in ("lr", "rho", "eps", "weight_decay", "maximize", "frozen")),
    ("PATCH", "/policy", "max_staleness"),
    *(("PATCH", "/gate", name) for name in ("norm_outlier", "norm_warmup", "quarantine_after")),
    *(("PATCH", "/durability", name) for name in ("snapshot_every_s", "keep")),
    ("POST", "/restore", "version"),
]  # fmt: skip
ONES = {"table": np.ones((5, 3), np.float32), "weight": np.ones((4, 2), np.float32)}


@pytest.mark.parametrize("number", NUMBERS, ids=[number[:20] for number in NUMBERS])
def test_a_hostile_number_is_refused_or_harmless(
    number: str, served: RunningServer, rest: httpx.Client
) -> None:
    """What is refused changes nothing; what is accepted, steps go on with."""
    name = f"n{NUMBERS.index(number)}"
    session = created(served, name)
    with httpx.Client(base_url=f"http://{served.http}", trust_env=False) as client:
        for method, path, field in FIELDS:
            before = state_of(served, name)
            content = f'{{"{field}": {number}}}'
            answer = client.request(
                method, path, content=content, headers={"content-type": "application/json"}
            )
            if answer.status_code != 200:
                require_named(answer, (path, field))
                assert state_of(served, name) == before, (path, field)
            elif path != "/restore":
                assert session.push(ONES).outcome is not None, (path, field)
        assert client.get(f"/v1/models/{name}").json()["failed"] is None
    session.close()


def test_no_line_is_forged(served: RunningServer, rest: httpx.Client) -> None:
    log = served.log.read_text()
    assert "Traceback" not in log
    assert not [line for line in log.splitlines() if line.startswith("FORGED")]
    lines = rest.get(f"{M}/events", headers={"accept": "application/json"}).text.splitlines()
    assert len(lines) == 1
