"""What the commands that call a server share: its address, the credentials, how answers and errors are shown.

`operates` gives a command these options, and passes a `Door` as its first argument. A command asks, and shows the
answer: as a table for people, and with --json as the server sent it, on one line. The exit status is one of `Exit`.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from pushstep.proto.errors import PushstepError

from .access import InsecureOption, ServerOption, TlsCaOption, TokenOption, read_token, security_of
from .completion import model_names
from .failure import failed

if TYPE_CHECKING:
    from rich.console import Console

    from ..transport.security import Security
    from .rest import Answer

JsonOption = Annotated[bool, typer.Option("--json", help="The server's answer, one line of JSON.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would change; nothing does.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do it without asking.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A new value, as JSON; several times.")
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="The model's name.", autocompletion=model_names)
]
_SHARED: Final = {
    "server": (ServerOption, "localhost:7070"),
    "as_json": (JsonOption, False),
    "token": (TokenOption, None),
    "tls_ca": (TlsCaOption, None),
    "insecure": (InsecureOption, False),
}


@dataclass(frozen=True, slots=True)
class Door:
    """The operators' door of one server, and how its answers are shown."""

    server: str
    security: Security
    as_json: bool

    def stream(
        self, method: str, path: str, query: Mapping[str, Any], headers: Mapping[str, str], body: bytes = b""
    ) -> AbstractContextManager[Answer]:
        """Send a request; the answer is read in a block. Raises the error that the server answers with, or ServerUnavailable."""
        from .rest import answer_to

        texts = {
            name: json.dumps(value) if isinstance(value, bool) else str(value)
            for name, value in query.items()
            if value is not None
        }
        return answer_to(self.server, method, path, texts, headers, self.security, [body] if body else ())

    def with_token(self, token: str) -> Door:
        """The same door with another token. Raises BadParameter."""
        return replace(self, security=self.security.with_token(read_token(token)))

    def ask(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """An answer as JSON; None if it is empty. A `query` of None is left out. Raises what `stream` raises."""
        content = b"" if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        with self.stream(method, path, query, headers, content) as answer:
            got = answer.read()
        return json.loads(got) if got else None

    def all_of(self, path: str, key: str, **query: Any) -> dict[str, Any]:
        """A list with all its pages: what the first one answers, with the entries under `key` of all."""
        first = page = self.ask("GET", path, **query)
        while page["next"] is not None:
            page = self.ask("GET", path, **query, cursor=page["next"])
            first[key] += page[key]
        return {**first, "next": None}

    def show(self, answer: Any, *tables: Table, said: Sequence[str] = ()) -> None:
        """Print an answer: as JSON, or as tables and lines."""
        if self.as_json:
            typer.echo(json.dumps(answer))
            return
        for table in tables:
            table.print()
        for line in said:
            typer.echo(plain(line))

    def show_edit(self, answer: Any, said: str, *, dry_run: bool) -> None:
        """Print what an edit has led to, or would."""
        if dry_run:
            self.show(answer, *changes_of(answer), said=_facts_of(answer))
            return
        if answer is not None and "effective_version" in answer:
            said += f", from version {answer['effective_version']} on"
        self.show(answer, said=[said])


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings, as wide as the terminal. Without a terminal no line is wrapped."""

    columns: Sequence[str]
    rows: Iterable[Sequence[Any]]

    def made(self) -> Any:
        """As rich draws it."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in self.columns:
            table.add_column(column, overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(plain(value)) for value in row))
        return table

    def print(self) -> None:
        """Print it."""
        wide_console().print(self.made())


def changes_of(answer: Mapping[str, Any]) -> list[Table]:
    """What the answer to a dry run says would change, field by field; no table if nothing would."""
    before, after = (dict(leaves(answer[when])) for when in ("before", "after"))
    rows = [
        (name, before.get(name), after.get(name))
        for name in {**before, **after}
        if name not in before or name not in after or before[name] != after[name]
    ]
    return [Table(("", "now", "then"), rows)] if rows else []


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of some JSON with its path, such as settings.max_norm or param_groups.0.lr."""
    if value is None and not place:
        return  # `before` of what is made, and `after` of what is deleted
    is_list = isinstance(value, list) and any(isinstance(each, dict) for each in value)
    if not is_list and not isinstance(value, dict):
        yield place, value
        return
    for name, each in enumerate(value) if is_list else value.items():
        yield from leaves(each, f"{place}.{name}" if place else str(name))


def _facts_of(answer: Mapping[str, Any]) -> list[str]:
    """What else the answer to a dry run says."""
    facts = {name: value for name, value in answer.items() if name not in ("dry_run", "before", "after")}
    version = facts.pop("effective_version", None)
    said = "nothing was changed: this was a dry run"
    if version is not None:
        said += f"; it would hold from version {version} on"
    return [said, *(f"{name.replace('_', ' ')}: {plain(value)}" for name, value in facts.items())]


def wide_console() -> Console:
    """The terminal; where there is none, no line is broken."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in console._environ:
        console.width = 1000
    return console


def plain(value: Any) -> str:
    """A value as text of one line, in which no control character acts on a terminal."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and not any(isinstance(each, (dict, list)) for each in value):
        return ", ".join(map(plain, value)) or "-"
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(values: Mapping[str, Any]) -> str:
    """Values by name, as they are set: lr=0.1, momentum=0.9."""
    return ", ".join(f"{name}={plain(value)}" for name, value in values.items())


def pairs(given: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE as a mapping. A value that is not JSON is kept as text. Raises BadParameter."""
    found: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{each!r} is not NAME=VALUE", param_hint="--set")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def at_most_one(**asked: Any) -> None:
    """BadParameter if more than one of these options was given."""
    given = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value not in (None, False, [])]
    if len(given) > 1:
        raise typer.BadParameter(f"give only one of {' and '.join(given)}")


def confirm(question: str, *, yes: bool) -> None:
    """Ask before what cannot be undone. Aborts the command if the answer is no. BadParameter without a terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("nobody can be asked without a terminal; pass --yes", param_hint="--yes")
    typer.confirm(question, abort=True, err=True)


def operates(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function whose first argument is a Door, which is made of the shared options.

    If the function has a parameter `where`, its value replaces --server. The function itself does not get it.
    """
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in _SHARED.items()
    ]

    @wraps(command)
    def run(**given: Any) -> None:
        server, as_json, *access = (given.pop(name) for name in _SHARED)
        server = given.pop("where", None) or server
        try:
            command(Door(server, security_of(server, *access), as_json), **given)
        except (PushstepError, OSError) as error:
            raise failed(error, as_json=as_json) from error

    keywords = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    run.__signature__ = inspect.Signature([*keywords, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in (*keywords, *shared)}
    return run
