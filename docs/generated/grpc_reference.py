"""The page of the workers' door, from the `.proto` files: comments and all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from words import anchored, cell, table

from pushstep.server.access.table import RPCS

_FOLDER = Path(__file__).resolve().parents[2] / "proto"
_FILES = ("training.proto", "types.proto", "limits.proto", "journal.proto")
_SERVICE = "pushstep.v1.TrainingService"
_HEAD = """# gRPC

The workers' door speaks `pushstep.v1`. Its `.proto` files are in the folder `proto` of the repository and in the installed package, and a running server answers
reflection. `docs/examples` has a client made of them alone, in another language. An error's status carries a `google.rpc.ErrorInfo` whose `reason` is a
code of the [catalogue](errors.md). A name in the column "limit" is what a server refuses beyond.

"""
_OPEN = re.compile(r"^(service|message|enum|oneof) (\w+) \{(\})?$")
_RPC = re.compile(r"^rpc (\w+)\((stream )?([\w.]+)\) returns \((stream )?([\w.]+)\);$")
_FIELD = re.compile(r"^((?:optional |repeated )?(?:map<[\w, .]+>|[\w.]+)) (\w+) = (\d+)(?: \[(.*)\])?;$")
_VALUE = re.compile(r"^(\w+) = (\d+);$")


@dataclass
class _Noun:
    """A message, an enum or the service: its comment, and its rows."""

    kind: str
    name: str
    comment: str
    rows: list[list[str]] = field(default_factory=list)


def page() -> str:
    """The page."""
    found = {file: list(_read((_FOLDER / file).read_text())) for file in _FILES}
    nouns = {noun.name for each in found.values() for noun in each}
    made = _HEAD
    for file, each in found.items():
        made += f"## {file}\n\n"
        for noun in each:
            made += anchored(3, f"`{noun.name}`", noun.name.lower())
            made += f"{noun.comment}\n\n" if noun.comment else ""
            made += _rows(noun, nouns)
    return made


def _rows(noun: _Noun, nouns: set[str]) -> str:
    if not noun.rows:
        return "" if noun.comment else "It has no fields.\n\n"
    if noun.kind == "service":
        return "".join(
            anchored(4, f"`{name}`", name.lower() + "-rpc")
            + f"{_linked(taken, nouns)} → {_linked(given, nouns)}. Role: {RPCS[f'/{_SERVICE}/{name}'].value}.\n\n{comment}\n\n"
            for name, taken, given, comment in noun.rows
        )
    if noun.kind == "enum":
        return table(["value", "number", "what it means"], ([f"`{n}`", v, c] for n, v, c in noun.rows))
    return table(
        ["field", "number", "type", "limit", "what it is"],
        ([f"`{n}`", v, _linked(kind, nouns), limit, c] for n, v, kind, limit, c in noun.rows),
    )


def _linked(kind: str, nouns: set[str]) -> str:
    return re.sub(
        r"\w+", lambda word: f"[{word[0]}](#{word[0].lower()})" if word[0] in nouns else word[0], kind
    )


def _read(text: str) -> Iterator[_Noun]:
    """The nouns of a file. ValueError for a line that is none of what these files have."""
    comment: list[str] = []
    noun: _Noun | None = None
    choice = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("//"):
            comment.append(line.removeprefix("//").strip())
            continue
        said, comment = "\n".join(comment), []
        if opened := _OPEN.match(line):
            if opened[1] == "oneof":
                choice = opened[2]
                continue
            noun = _Noun(opened[1], opened[2], said)
            if opened[3]:
                yield noun
                noun = None
        elif line == "}" and choice:
            choice = ""
        elif line == "}" and noun is not None:
            yield noun
            noun = None
        elif noun is not None and line and not line.startswith("reserved"):
            noun.rows.append(_row(line, cell(said), choice, number))
        elif (
            line == "}"
            or line.startswith(("syntax", "package", "import", "extend", "Limit limit", "reserved"))
            or not line
        ):
            continue
        else:
            raise ValueError(f"line {number} is not understood: {line!r}")


def _row(line: str, comment: str, choice: str, number: int) -> list[str]:
    if rpc := _RPC.match(line):
        return [rpc[1], (rpc[2] or "") + rpc[3], (rpc[4] or "") + rpc[5], comment]
    if value := _VALUE.match(line):
        return [value[1], value[2], comment]
    if found := _FIELD.match(line):
        one_of = f"One of `{choice}`. " if choice else ""
        return [found[2], found[3], found[1], _limit(found[4] or ""), one_of + comment]
    raise ValueError(f"line {number} is not understood: {line!r}")


def _limit(options: str) -> str:
    """(limit).bytes = 100, or (limit) = {bytes: 200, count: 64}, in words."""
    pairs = re.findall(r"(\w+)(?:: | = )([\w.+-]+)", options.replace("(limit).", "").replace("(limit) =", ""))
    units = {"bytes": "{} bytes", "count": "{} entries", "least": "from {}", "most": "to {}"}
    return ", ".join(
        units[name].format(f"{int(value):,}" if value.isdigit() else value)
        for name, value in pairs
        if name in units
    )
