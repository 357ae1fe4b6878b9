"""The description in /openapi.json: FastAPI's, with each route's errors and the content of downloads.

The description is committed as `openapi.json` beside this file, for those who generate a client from it. A test fails
when it is stale. `python -m pushstep.server.operator_door` writes it anew.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel, RootModel

from pushstep.proto.errors.status import PROBLEM_TYPE

from ..access.roles import Need
from ..access.routes import need_of
from ..coordinator.gate import GateSettings
from ..coordinator.hooks.catalogue import BUILT_IN
from ..coordinator.policies.catalogue import POLICIES
from ..coordinator.settings import Settings
from ..imports.new_groups import NewGroup
from ..journal.durability import DurabilitySettings
from ..observers.catalogue import OBSERVERS
from .examples import add_examples, problems_of
from .links import add_links

FILE: Final = Path(__file__).with_name("openapi.json")
# For any request: malformed, foreign host, too slow, the server's own fault, too much at once.
_ALWAYS: Final = (400, 403, 408, 500, 503)
_WITHOUT_TOKEN: Final = (401, 429)
_OF_A_MODEL: Final = (404, 409)
_WITH_A_CONDITION: Final = 412
_NO_ROOM_ON_DISK: Final = 507
_DOWNLOADS: Final = ("/export", "/content")
_BINARY: Final = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
# `openapi_extra` of a route whose body is a file.
FILE_BODY: Final[dict[str, Any]] = {"requestBody": {"required": True, "content": _BINARY}}
# The same of a route whose body may also be JSON.
FILE_OR_JSON_BODY: Final[dict[str, Any]] = {"requestBody": {"required": True, "content": dict(_BINARY)}}
# Without a length; where a model, or something else, is in the way.
_WITH_A_FILE: Final = (409, 411)
# Routes whose body is of one of these types; which one, the body says. Every field is optional.
_SETTINGS: Final[Mapping[str, Sequence[type[Settings]]]] = {
    "/v1/models/{m}/gate": [GateSettings],
    "/v1/models/{m}/policy": list(POLICIES),
    "/v1/models/{m}/durability": [DurabilitySettings],
}
NEW_GROUP: Final = {
    "rule": "adagrad",
    "lr": 0.1,
    "params": [
        {"name": "head.weight", "shape": [2, 3], "dtype": "float32"},
        {"name": "head.bias", "shape": [2], "values": [0.5, -0.5]},
    ],
}
_PROBLEM: Final = {
    "type": "object",
    "title": "Problem",
    "description": "RFC 9457, with the catalogue's code and what fills its message.",
    "required": ["type", "title", "status", "detail", "code", "fields"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string", "description": "of the error catalogue, such as unknown_model"},
        "help": {"type": "string", "description": "where the documents say what to do"},
        "fields": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


_BEARER: Final = {
    "type": "http",
    "scheme": "bearer",
    "description": "A token of `pushstep-server --make-token`. A server without tokens asks for none.",
}


def describe(app: FastAPI) -> None:
    """Have `app.openapi()` return this description."""
    plain: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _with_problems(plain())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _with_problems(schema: dict[str, Any]) -> dict[str, Any]:
    problems: dict[str, Any] = {}
    schemas = schema["components"]["schemas"]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            need = need_of(method.upper(), path)
            operation["x-role"] = need.value
            # without a token where the server has none, as by default on loopback
            operation["security"] = [] if need is Need.OPEN else [{"bearer": []}, {}]
            for status in (
                *_statuses(path, method, operation),
                *(() if need is Need.OPEN else _WITHOUT_TOKEN),
            ):
                responses[str(status)] = {"$ref": f"#/components/responses/{status}"}
                problems[str(status)] = _problem(status)
            if path.endswith(_DOWNLOADS):
                responses["200"]["content"] = _BINARY
            if method == "patch" and path in _SETTINGS:
                references = [_component(kind, schemas) for kind in _SETTINGS[path]]
                body = operation["requestBody"]["content"]["application/json"]
                body["schema"] = {"anyOf": references, "examples": body["schema"]["examples"]}
            if (path, method) == ("/v1/models/{m}/param-groups", "post"):
                body = {"schema": _component(NewGroup, schemas), "example": NEW_GROUP}
                operation["requestBody"] = {
                    "required": True,
                    "content": {"application/json": body, **_BINARY},
                }
            if path == "/readyz":  # its 503 is an ordinary answer, not a problem
                responses["503"] = {**responses["200"], "description": "It does not yet, or not any more"}
            operation["responses"] = dict(sorted(responses.items()))
    schema["components"]["securitySchemes"] = {"bearer": _BEARER}
    add_examples(schema["paths"])
    add_links(schema["paths"])
    schema["components"]["responses"] = dict(sorted(problems.items()))
    for replaced in ("HTTPValidationError", "ValidationError"):
        schemas.pop(replaced, None)
    schemas["Problem"] = _PROBLEM
    _describe_hooks(schemas)
    return schema


def _describe_hooks(schemas: dict[str, Any]) -> None:
    """Have the body that installs a hook say what each hook of this house takes, and where it goes."""
    plain = schemas["NewHook"]
    kinds = sorted({*BUILT_IN, *OBSERVERS}, key=lambda kind: kind.name)
    choices = []
    for kind in kinds:
        settings = _component(kind.settings_type, schemas)
        if issubclass(kind.settings_type, RootModel):
            # dozens of kinds within each other: they are described, and what makes requests need not try them all
            name = kind.settings_type.__name__
            settings = {"type": "object", "description": f"one of #/components/schemas/{name}"}
        choices.append(
            {
                **plain,
                "title": kind.name,
                "description": inspect.cleandoc(kind.__doc__ or ""),
                "properties": {
                    **plain["properties"],
                    "name": {"const": kind.name},
                    "point": {"enum": sorted(kind.points)},
                    "settings": settings,
                },
                "required": ["name", "point", *(["settings"] if _has_required(settings, schemas) else [])],
            }
        )
    text = "A hook to install. Those that other packages bring are in GET /v1/hooks only."
    schemas["NewHook"] = {"title": "NewHook", "description": text, "oneOf": choices}


def _component(kind: type[BaseModel], schemas: dict[str, Any]) -> dict[str, Any]:
    """A reference to settings, which are entered with all that they refer to; empty settings are their own schema."""
    if kind is Settings:
        return {"type": "object", "additionalProperties": False, "default": {}}
    made = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(made.pop("$defs", {}))
    schemas[kind.__name__] = made
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _has_required(schema: dict[str, Any], schemas: dict[str, Any]) -> bool:
    found = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return "required" in found or "description" in schema


def _statuses(path: str, method: str, operation: dict[str, Any]) -> Iterable[int]:
    yield from _ALWAYS
    if "{m}" in path or path == "/v1/capacity":
        yield from _OF_A_MODEL
    if operation.get("parameters") or "requestBody" in operation:
        yield 422
    if "application/octet-stream" in operation.get("requestBody", {}).get("content", {}):
        yield from _WITH_A_FILE
    if method in ("post", "put", "patch", "delete"):
        yield from (413, 415, 422, _NO_ROOM_ON_DISK)
    if any(parameter["name"] == "if-match" for parameter in operation.get("parameters", ())):
        yield _WITH_A_CONDITION


def _problem(status: int) -> dict[str, Any]:
    shape = {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": problems_of(status)}
    content = {PROBLEM_TYPE: shape}
    return {"description": HTTPStatus(status).phrase, "content": content}


def as_committed(schema: dict[str, Any]) -> str:
    """The description as the text of `openapi.json`."""
    return json.dumps(schema, indent=1) + "\n"
