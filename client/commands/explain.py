"""`pushstep explain`: what the code of an error means, and what to do: the entry of the troubleshooting page.

The page lies in the package beside the catalogue. No server is asked, and no torch imported.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from typing import Annotated

import typer

from pushstep.proto.errors import CATALOGUE, PushstepError

from .door import JsonOption, Table, wide_console

_ENTRY = re.compile(r"^### (\w+)\n\n(.*?)\n\n\*\*Do:\*\* (.*?)(?=\n#|\Z)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


@dataclass(frozen=True, slots=True)
class Entry:
    """What the page says of a code."""

    meaning: str
    do: str


def entries() -> dict[str, Entry]:
    """The page's entries, by code."""
    page = files("pushstep.proto.errors").joinpath("troubleshooting.md").read_text(encoding="utf-8")
    return {code: Entry(_plain(meaning), _plain(do)) for code, meaning, do in _ENTRY.findall(page)}


def _plain(text: str) -> str:
    """A paragraph on one line; of a link its words."""
    return _LINK.sub(r"\1", " ".join(text.split()))


def codes(incomplete: str) -> list[str]:
    """The codes that begin so, for completion."""
    return sorted(code for code in CATALOGUE if code.startswith(incomplete))


def explain(
    code: Annotated[
        str | None,
        typer.Argument(
            metavar="[CODE]", help="An error's code; all if it is left out.", autocompletion=codes
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what an error means and what to do: `pushstep explain manifest_mismatch`."""
    known = entries()
    if code is None:
        if as_json:
            typer.echo(json.dumps([_facts(CATALOGUE[each], known[each]) for each in sorted(CATALOGUE)]))
        else:
            rows = [(each, _first_line(CATALOGUE[each])) for each in sorted(CATALOGUE)]
            Table(("code", "what it is"), rows).print()
        return
    kind = CATALOGUE.get(code)
    if kind is None:
        near = get_close_matches(code, CATALOGUE, 3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ": `pushstep explain` lists them"
        raise typer.BadParameter(f"no error has the code {code!r}{meant}", param_hint="CODE")
    facts = _facts(kind, known[code])
    if as_json:
        typer.echo(json.dumps(facts))
        return
    crosses = (
        f" over gRPC {facts['grpc']}, over HTTP {facts['http']}" if facts["http"] else " raised by the client"
    )
    console = wide_console()
    for line in (f"{code}: {facts['class']},{crosses}", "", known[code].meaning, "", f"Do: {known[code].do}"):
        console.print(line, markup=False, highlight=False)


def _facts(kind: type[PushstepError], entry: Entry) -> dict[str, str | int | None]:
    # what only the client raises has no status
    crosses = bool(kind.http_status)
    return {
        "code": kind.code,
        "class": kind.__name__,
        "grpc": kind.grpc_status.name if crosses else None,
        "http": kind.http_status if crosses else None,
        "meaning": entry.meaning,
        "do": entry.do,
    }


def _first_line(kind: type[PushstepError]) -> str:
    return (kind.__doc__ or "").splitlines()[0]
