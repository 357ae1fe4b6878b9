"""`pushstep import`: brings a safetensors file into a model, or makes a model of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .access import InsecureOption, ServerOption, TlsCaOption, TokenOption, security_of

if TYPE_CHECKING:
    from ..transport.security import Security

_LENGTH_BYTES = 8


def import_file(
    file: Annotated[
        Path, typer.Argument(help="A safetensors file, such as an export.", exists=True, dir_okay=False)
    ],
    model: Annotated[str, typer.Option(help="The model's name.")],
    server: ServerOption = "localhost:7070",
    create: Annotated[bool, typer.Option("--create", help="Make a new model of the file.")] = False,
    groups: Annotated[
        str | None,
        typer.Option(help="Its param groups as JSON, or @FILE with them [default: the file's own]."),
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave out the optimizer's state in the file.")
    ] = False,
    keep_state: Annotated[
        bool, typer.Option("--keep-state", help="Keep the model's optimizer state beside new weights.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="The file need not have every parameter.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    token: TokenOption = None,
    tls_ca: TlsCaOption = None,
    insecure: InsecureOption = False,
) -> None:
    """Replace a model's values by a file's, or make a new model. Everything is checked before anything is replaced."""
    # not needed for --help
    from pushstep.proto.errors import PushstepError

    chosen = {"weights_only": weights_only, "keep_state": keep_state, "partial": partial}
    if create and any(chosen.values()):
        raise typer.BadParameter("a new model takes the whole file", param_hint="--create")
    if groups is not None and not create:
        raise typer.BadParameter("only a new model takes them: --create", param_hint="--groups")
    try:
        text = Path(groups[1:]).read_text() if groups is not None and groups.startswith("@") else groups
        query = {name: "true" for name, value in chosen.items() if value}
        security = security_of(server, token, tls_ca, insecure)
        told = _sent(file, model, server, text, query, security, create=create, quiet=as_json)
    except (PushstepError, OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps({"model": model, **told}))
    elif create:
        typer.echo(f"{model}: made of {file}, {told['parameters']} parameters in {told['groups']} groups")
    else:
        state = told["state"].replace("_", " ")
        typer.echo(
            f"{model}: {told['parameters']} parameters replaced, state {state}, timeline {told['timeline']}"
        )


def _sent(
    path: Path,
    model: str,
    server: str,
    groups: str | None,
    query: dict[str, str],
    security: Security,
    *,
    create: bool,
    quiet: bool,
) -> dict[str, Any]:
    import hashlib

    from .rest import answer_to, digest_field, model_path, shown

    head, start = _head(path, groups)
    total_bytes = len(head) + path.stat().st_size - start
    digest = hashlib.sha256()
    for block in _blocks(path, head, start):
        digest.update(block)
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(total_bytes),
        "Repr-Digest": digest_field(digest.digest()),
    }
    method, where = ("POST", "/v1/models") if create else ("PUT", model_path(model, "state-dict"))
    query = {"name": model} if create else query
    body = shown(_blocks(path, head, start), path.name, total_bytes, quiet=quiet)
    with answer_to(server, method, where, query, headers, security, body) as answer:
        told: dict[str, Any] = json.loads(answer.read())
        return told


def _blocks(path: Path, head: bytes, start: int) -> Iterator[bytes]:
    """A file, with `head` in place of its first `start` bytes."""
    from .rest import BLOCK_BYTES

    yield head
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK_BYTES):
            yield block


def _head(path: Path, groups: str | None) -> tuple[bytes, int]:
    """A head with these groups in its metadata, and the length of the head that it replaces. ValueError."""
    from pushstep.proto.wire.tensor_names import GROUPS

    if groups is None:
        return b"", 0
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file")
        text = file.read(length)
    try:
        header = json.loads(text)
        header["__metadata__"] = {**header.get("__metadata__", {}), GROUPS: groups}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file") from error
    made = json.dumps(header, separators=(",", ":")).encode()
    made += b" " * (-len(made) % _LENGTH_BYTES)
    return len(made).to_bytes(_LENGTH_BYTES, "little") + made, _LENGTH_BYTES + length
