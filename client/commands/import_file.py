"""`pushstep import`: brings a safetensors file into a model, or makes a model of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pushstep.proto.errors import InvalidFile

from .completion import model_names
from .door import Door, operates

_LENGTH_BYTES = 8


@operates
def import_file(
    door: Door,
    file: Annotated[
        Path, typer.Argument(help="A safetensors file, such as an export.", exists=True, dir_okay=False)
    ],
    model: Annotated[str, typer.Option(help="The model's name.", autocompletion=model_names)],
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
) -> None:
    """Replace a model's values by a file's, or make a new model. Everything is checked before anything is replaced."""
    chosen = {"weights_only": weights_only, "keep_state": keep_state, "partial": partial}
    if create and any(chosen.values()):
        raise typer.BadParameter("a new model takes the whole file", param_hint="--create")
    if groups is not None and not create:
        raise typer.BadParameter("only a new model takes them: --create", param_hint="--groups")
    query = {name: "true" for name, value in chosen.items() if value}
    told = _sent(door, file, model, _text_of(groups), query, create=create)
    if create:
        said = f"{model}: made of {file}, {told['parameters']} parameters in {told['groups']} groups"
    else:
        state = told["state"].replace("_", " ")
        said = (
            f"{model}: {told['parameters']} parameters replaced, state {state}, timeline {told['timeline']}"
        )
    door.show({"model": model, **told}, said=[said])


def _text_of(groups: str | None) -> str | None:
    """What --groups names. BadParameter."""
    if groups is None or not groups.startswith("@"):
        return groups
    try:
        return Path(groups[1:]).read_text()
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is no text"
        raise typer.BadParameter(f"cannot read {groups[1:]}: {problem}", param_hint="--groups") from None


def _sent(
    door: Door, path: Path, model: str, groups: str | None, query: dict[str, str], *, create: bool
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
    body = shown(_blocks(path, head, start), path.name, total_bytes, quiet=door.as_json)
    with answer_to(door.server, method, where, query, headers, door.security, body) as answer:
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
    """A head with these groups in its metadata, and the length of the head that it replaces. InvalidFile."""
    from pushstep.proto.wire.tensor_names import GROUPS

    if groups is None:
        return b"", 0
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > path.stat().st_size:
            raise InvalidFile(problem=f"{path} is no safetensors file")
        text = file.read(length)
    try:
        header = json.loads(text)
        header["__metadata__"] = {**header.get("__metadata__", {}), GROUPS: groups}
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidFile(problem=f"{path} is no safetensors file") from error
    made = json.dumps(header, separators=(",", ":")).encode()
    made += b" " * (-len(made) % _LENGTH_BYTES)
    return len(made).to_bytes(_LENGTH_BYTES, "little") + made, _LENGTH_BYTES + length
