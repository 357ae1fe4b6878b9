"""Links of the description: which answer names what another route takes. Who reads it, person or tool, finds the next call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

_M: Final = "/v1/models/{m}"
_HOOK, _SNAPSHOT, _WORKER = (
    f"{_M}/hooks/{{hook_id}}",
    f"{_M}/snapshots/{{snapshot}}",
    f"{_M}/workers/{{worker}}",
)
_GROUP: Final = f"{_M}/param-groups/{{index}}"
_ETAG: Final = {"if-match": "$response.header.ETag"}

Target = tuple[str, str, Mapping[str, str]]


def _each(places: Sequence[tuple[str, str]], **names: str) -> list[Target]:
    return [(method, path, names) for method, path in places]


_OF_HOOK: Final = [("get", _HOOK), ("patch", _HOOK), ("delete", _HOOK)]
_OF_SNAPSHOT: Final = [
    ("get", _SNAPSHOT),
    ("get", f"{_SNAPSHOT}/content"),
    ("post", f"{_SNAPSHOT}/restore"),
    ("delete", _SNAPSHOT),
]
_OF_WORKER: Final = [
    ("get", _WORKER),
    ("post", f"{_WORKER}/quarantine"),
    ("post", f"{_WORKER}/release"),
    ("delete", _WORKER),
]
_OF_MODEL: Final = [
    ("get", f"{_M}{part}") for part in ("", "/param-groups", "/workers", "/snapshots", "/events")
]
# By method, path and status of an answer: the routes that take something of it, and which parameter takes what.
LINKS: Final[Mapping[tuple[str, str, str], Sequence[Target]]] = {
    ("get", "/v1/models", "200"): _each(_OF_MODEL, m="$response.body#/models/0/name"),
    ("post", "/v1/models", "201"): _each(_OF_MODEL, m="$response.body#/name"),
    ("get", f"{_M}/param-groups", "200"): _each(
        [("get", _GROUP), ("patch", _GROUP)], index="$response.body#/param_groups/0/index"
    ),
    ("post", f"{_M}/param-groups", "201"): _each(
        [("get", _GROUP), ("patch", _GROUP)], index="$response.body#/index"
    ),
    ("get", _GROUP, "200"): [("patch", _GROUP, {"index": "$request.path.index", **_ETAG})],
    ("get", f"{_M}/parameters", "200"): _each(
        [("get", f"{_M}/parameters/{{name}}")], name="$response.body#/parameters/0/name"
    ),
    ("get", f"{_M}/hooks", "200"): _each(_OF_HOOK, hook_id="$response.body#/hooks/0/id"),
    ("post", f"{_M}/hooks", "201"): _each(_OF_HOOK, hook_id="$response.body#/id"),
    ("get", f"{_M}/snapshots", "200"): _each(_OF_SNAPSHOT, snapshot="$response.body#/snapshots/0/id"),
    ("post", f"{_M}/snapshots", "201"): _each(_OF_SNAPSHOT, snapshot="$response.body#/id"),
    ("get", f"{_M}/workers", "200"): _each(_OF_WORKER, worker="$response.body#/workers/0/name"),
    ("get", f"{_M}/policy", "200"): [("patch", f"{_M}/policy", _ETAG)],
    ("get", f"{_M}/gate", "200"): [("patch", f"{_M}/gate", _ETAG)],
    ("get", f"{_M}/durability", "200"): [("patch", f"{_M}/durability", _ETAG)],
}


def add_links(paths: Mapping[str, Mapping[str, dict[str, Any]]]) -> None:
    """Enter the links into the operations of a description."""
    for (method, path, status), targets in LINKS.items():
        answer = paths[path][method]["responses"][status]
        for other_method, other_path, names in targets:
            target = paths[other_path][other_method]["operationId"]
            of_model = {"m": "$request.path.m"} if "{m}" in path else {}
            answer.setdefault("links", {})[target] = {
                "operationId": target,
                "parameters": {**of_model, **names},
            }
