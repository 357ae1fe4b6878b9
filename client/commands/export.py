"""`pushstep export`: brings a model, or a snapshot of it, from a server into a file or folder."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .access import InsecureOption, ServerOption, TlsCaOption, TokenOption, security_of

if TYPE_CHECKING:
    from ..transport.security import Security


class Format(StrEnum):
    """What an export may be."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"
    DCP = "dcp"


def export(
    out: Annotated[Path, typer.Argument(help="The file to write; for dcp, a folder that is not there yet.")],
    model: Annotated[str, typer.Option(help="The model's name.")],
    server: ServerOption = "localhost:7070",
    form: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.SAFETENSORS,
    snapshot: Annotated[str | None, typer.Option(help="A snapshot's id, in place of the model now.")] = None,
    state: Annotated[
        bool, typer.Option("--state", help="In a safetensors file, the optimizer's state, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    token: TokenOption = None,
    tls_ca: TlsCaOption = None,
    insecure: InsecureOption = False,
) -> None:
    """Write a model's parameters, and its optimizer's state, as a checkpoint that other programs load."""
    # not needed for --help
    from pushstep.proto.errors import PushstepError

    if form is Format.DCP and out.exists():
        raise typer.BadParameter(f"{out} is there already", param_hint="OUT")
    if not out.absolute().parent.is_dir():
        raise typer.BadParameter(f"{out.absolute().parent} is no folder", param_hint="OUT")
    try:
        security = security_of(server, token, tls_ca, insecure)
        facts = _exported(out, model, server, form, snapshot, state, as_json, security)
    except (PushstepError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"{out}: {model} at version {facts['version']} of timeline {facts['timeline']}")


def _exported(
    out: Path,
    model: str,
    server: str,
    form: Format,
    snapshot: str | None,
    state: bool,
    quiet: bool,
    security: Security,
) -> dict[str, Any]:
    """Write the export, complete and verified, or nothing. What it is."""
    import hashlib
    import tempfile

    from pushstep.proto.errors import DigestMismatch

    from .rest import answer_to, blocks_of, digest_field, model_path, shown

    parts = ("export",) if snapshot is None else ("snapshots", snapshot, "content")
    of_torch = form is Format.TORCH
    query = {"format": "torch" if of_torch else "safetensors"}
    if form is Format.DCP or (state and not of_torch):
        query["state"] = "true"
    wants = {"Want-Repr-Digest": "sha-256=1"}
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as folder:
        path, digest, size_bytes = Path(folder) / "content", hashlib.sha256(), 0
        with (
            answer_to(server, "GET", model_path(model, *parts), query, wants, security) as answer,
            path.open("wb") as file,
        ):
            for block in shown(blocks_of(answer), out.name, answer.length, quiet=quiet):
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
