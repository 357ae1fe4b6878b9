"""`pushstep export`: brings a model, or a snapshot of it, from a server into a file or folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .completion import model_names
from .door import Door, operates


class Format(StrEnum):
    """What an export may be."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"
    DCP = "dcp"


@operates
def export(
    door: Door,
    out: Annotated[Path, typer.Argument(help="The file to write; for dcp, a folder that is not there yet.")],
    model: Annotated[str, typer.Option(help="The model's name.", autocompletion=model_names)],
    form: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.SAFETENSORS,
    snapshot: Annotated[str | None, typer.Option(help="A snapshot's id, in place of the model now.")] = None,
    state: Annotated[
        bool, typer.Option("--state", help="In a safetensors file, the optimizer's state, too.")
    ] = False,
) -> None:
    """Write a model's parameters, and its optimizer's state, as a checkpoint that other programs load."""
    if form is Format.DCP and out.exists():
        raise typer.BadParameter(f"{out} is there already", param_hint="OUT")
    if out.is_dir():
        raise typer.BadParameter(f"{out} is a folder: name the file, too", param_hint="OUT")
    if not out.absolute().parent.is_dir():
        raise typer.BadParameter(f"{out.absolute().parent} is no folder", param_hint="OUT")
    facts = _exported(door, out, model, form, snapshot, state)
    door.show(facts, said=[f"{out}: {model} at version {facts['version']} of timeline {facts['timeline']}"])


def _exported(
    door: Door, out: Path, model: str, form: Format, snapshot: str | None, state: bool
) -> dict[str, Any]:
    """Write the export, complete and verified, or nothing. What it is."""
    import hashlib
    import tempfile

    from pushstep.proto.errors import DigestMismatch

    from .rest import digest_field, model_path, shown

    parts = ("export",) if snapshot is None else ("snapshots", snapshot, "content")
    of_torch = form is Format.TORCH
    query = {"format": "torch" if of_torch else "safetensors"}
    if form is Format.DCP or (state and not of_torch):
        query["state"] = "true"
    wants = {"Want-Repr-Digest": "sha-256=1"}
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as folder:
        path, digest, size_bytes = Path(folder) / "content", hashlib.sha256(), 0
        with (
            door.stream("GET", model_path(model, *parts), query, wants) as answer,
            path.open("wb") as file,
        ):
            for block in shown(answer.blocks(), out.name, answer.length, quiet=door.as_json):
                file.write(block)
                digest.update(block)
                size_bytes += len(block)
        expected = answer.headers["Repr-Digest"]
        if digest_field(digest.digest()) != expected:
            raise DigestMismatch(got=digest_field(digest.digest()), expected=expected)
        if form is Format.DCP:
            from .dcp import write_dcp

            write_dcp(path, Path(folder) / "dcp")
            path = Path(folder) / "dcp"
        path.replace(out)
    return {
        "model": model,
        "timeline": int(answer.headers["X-Pushstep-Timeline"]),
        "version": int(answer.headers["X-Pushstep-Version"]),
        "format": form.value,
        "path": str(out),
        "bytes": size_bytes,
    }
