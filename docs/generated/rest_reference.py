"""The page of the operators' door, from the description that is committed beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from words import anchored, block, cell, slug, table

_FILE = Path(__file__).resolve().parents[2] / "server" / "operator_door" / "openapi.json"
_HEAD = """# REST

The operators' door, as `/openapi.json` of a running server describes it. With tokens, a request says who it is by `Authorization: Bearer TOKEN`; the role is the least that may
ask. An error is `application/problem+json` (RFC 9457) with a `code` of the [catalogue](errors.md). Lists come a page at a time, and a change takes `dry_run=true` and
`If-Match`.

"""
# What any route may answer: said once, in the head of the page's last section.
_ALWAYS = ("400", "401", "403", "408", "429", "500", "503")


def page() -> str:
    """The page."""
    described = json.loads(_FILE.read_text())
    routes = [
        (method.upper(), path, operation)
        for path, operations in described["paths"].items()
        for method, operation in operations.items()
    ]
    tags = list(dict.fromkeys(operation["tags"][0] for _, _, operation in routes))
    made = _HEAD + table(
        ["route", "role", "what it does"],
        (
            [f"[`{method} {path}`](#{route_anchor(method, path)})", operation["x-role"], operation["summary"]]
            for method, path, operation in routes
        ),
    )
    for tag in tags:
        made += f"## {tag.capitalize()}\n\n"
        made += "".join(
            _route(described, method, path, operation)
            for method, path, operation in routes
            if operation["tags"][0] == tag
        )
    return made + _schemas(described) + _always(described)


def route_anchor(method: str, path: str) -> str:
    """get-v1-models-m"""
    return slug(f"{method} {path}")


def _route(described: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    made = anchored(3, f"`{method} {path}`", route_anchor(method, path))
    made += f"{operation['summary']}. Role: {operation['x-role']}.\n\n"
    if said := operation.get("description"):
        made += f"{said}\n\n"
    if parameters := operation.get("parameters"):
        made += table(
            ["parameter", "in", "takes", "default", "what it is"],
            (
                [
                    f"`{each['name']}`" + (", required" if each.get("required") else ""),
                    each["in"],
                    _kind(each["schema"]),
                    _default(each["schema"]),
                    each.get("description", ""),
                ]
                for each in parameters
            ),
        )
    if body := operation.get("requestBody"):
        made += _body(body["content"])
    return made + _answers(operation)


def _body(contents: dict[str, Any]) -> str:
    made = ""
    for kind, content in contents.items():
        schema = content["schema"]
        made += f"Body, `{kind}`: {_kind(schema)}.\n\n"
        for example in [*schema.get("examples", ()), *([content["example"]] if "example" in content else ())]:
            made += block(example)
    return made


def _answers(operation: dict[str, Any]) -> str:
    made = ""
    for status, answer in operation["responses"].items():
        if "$ref" in answer:
            continue
        contents = answer.get("content", {})
        made += f"Answer {status}"
        made += f", `{'`, `'.join(contents)}`" if contents else ""
        made += ":\n\n" if any("example" in each for each in contents.values()) else ".\n\n"
        made += "".join(block(content["example"]) for content in contents.values() if "example" in content)
    problems = [
        status
        for status, answer in operation["responses"].items()
        if "$ref" in answer and status not in _ALWAYS
    ]
    return made + (
        f"Problems: {', '.join(problems)}, and those of [every route](#problems).\n\n" if problems else ""
    )


def _kind(schema: dict[str, Any]) -> str:
    """A schema in few words; what has a name is a link to its table."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{_short(name)}](#{slug(name)})"
    for many in ("anyOf", "oneOf"):
        if many in schema:
            kinds = [_kind(each) for each in schema[many] if each.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "")
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    words = {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "object": "object",
    }
    if schema.get("format") == "binary":
        return "a file"
    return " ".join([words.get(kind, "any"), *_bounds(schema)])


def _bounds(schema: dict[str, Any]) -> list[str]:
    words = {
        "minimum": "from", "ge": "from", "exclusiveMinimum": "above", "maximum": "to", "le": "to",
        "exclusiveMaximum": "below", "minLength": "of at least", "maxLength": "of at most",
    }  # fmt: skip
    return [
        f"{word} {schema[name]:,}" + (" characters" if "Length" in name else "")
        for name, word in words.items()
        if name in schema
    ]


def _default(schema: dict[str, Any]) -> str:
    return f"`{json.dumps(schema['default'])}`" if schema.get("default") not in (None, "") else ""


def _short(name: str) -> str:
    return name.rsplit("__", 1)[-1]


def _schemas(described: dict[str, Any]) -> str:
    made = "## Bodies\n\n"
    for name, schema in described["components"]["schemas"].items():
        made += anchored(3, f"`{_short(name)}`", slug(name))
        if said := schema.get("description"):
            made += f"{said}\n\n"
        required = schema.get("required", ())
        if fields := schema.get("properties"):
            made += table(
                ["field", "takes", "default", "what it is"],
                (
                    [
                        f"`{field}`" + (", required" if field in required else ""),
                        _kind(of),
                        _default(of),
                        of.get("description", ""),
                    ]
                    for field, of in fields.items()
                ),
            )
        elif not said or "anyOf" in schema or "oneOf" in schema:
            made += f"{cell(_kind(schema))}\n\n"
    return made


def _always(described: dict[str, Any]) -> str:
    made = "## Problems\n\nA problem's `code` says what is wrong; these are the codes of each status.\n\n"
    rows = []
    for status, answer in described["components"]["responses"].items():
        [content] = answer["content"].values()
        codes = ", ".join(f"[`{code}`](errors.md#{code})" for code in content.get("examples", {}))
        rows.append(
            [status + (", of every route" if status in _ALWAYS else ""), answer["description"], codes]
        )
    return made + table(["status", "what it is called", "codes"], rows)
