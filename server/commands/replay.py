"""`pushstep replay`: makes a model of a version again, from a snapshot and the journal behind it, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..arenas.arenas_copy import ArenasCopy
    from .data_folder import DataFolder


def replay(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A server's data folder, or one model's in it.")
    ],
    model: Annotated[str | None, typer.Option(help="Which model; not needed if there is one.")] = None,
    to: Annotated[int | None, typer.Option(min=0, help="The version; the last one unless given.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors", help="Write the parameters there.")
    ] = None,
    snapshots: Annotated[
        str | None, typer.Option(metavar="URL", help="Where the server keeps its snapshots, if not in DIR.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Replay a stopped server's journal over a snapshot, with the server's own kernels. Nothing in DIR is written."""
    # not needed for --help
    import json

    from pushstep.proto.errors import PushstepError

    from ..process.folder_lock import DataFolderLocked
    from .data_folder import NoDataFolder, opened
    from .failure import failed

    try:
        with opened(folder, snapshots) as data:
            name = _one(data, model)
            if out is not None and out.resolve().is_relative_to(data.path.resolve()):
                raise typer.BadParameter("nothing is written into DIR", param_hint="--out")
            facts = _replayed(data, name, to, out, quiet=as_json)
    except (NoDataFolder, DataFolderLocked, ValueError) as error:
        raise failed("replay", error, 2, as_json=as_json) from error
    except (PushstepError, OSError) as error:
        raise failed("replay", error, 1, as_json=as_json) from error
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        typer.echo(f"{key:13} {value:.3f}" if isinstance(value, float) else f"{key:13} {value}")


def _one(data: DataFolder, model: str | None) -> str:
    if model is None and len(data.models) == 1:
        return data.models[0]
    if model not in data.models:
        raise typer.BadParameter(f"there are {', '.join(data.models) or 'none'}", param_hint="--model")
    return model


def _replayed(
    data: DataFolder, name: str, to: int | None, out: Path | None, *, quiet: bool
) -> dict[str, Any]:
    from functools import partial

    from pushstep.proto.errors import ModelNotLoaded, VersionNotKept

    from ..models.replay import held_at
    from .progress import shown

    catalog = data.catalog()
    catalog.device.open()
    store = catalog.folder(name)
    identity = store.read_identity(True)
    if identity is None:
        raise ModelNotLoaded(model=name, problem="identity.json is missing")
    scratch = partial(catalog.loaded_from, name=name, uid=identity.uid)
    with shown(None, quiet=quiet) as told:
        found = held_at(
            store,
            identity.uid,
            identity.made_of,
            to,
            scratch,
            reached=lambda version: told(f"{name}: version {version}"),
        )
    if found is None or (to is not None and found.copy.version != to):
        raise VersionNotKept(model=name, version="0" if to is None else to)
    if out is not None:
        _write(found.facts, found.copy, out)
    return {
        "model": name,
        "version": found.copy.version,
        "timeline": found.copy.timeline,
        "snapshot": found.facts["id"],
        "records": found.records,
        "seconds": found.seconds,
        "records_per_s": found.records / found.seconds if found.seconds else 0.0,
        "digest": _digest(found.copy),
    }


def _write(facts: dict[str, Any], copy: ArenasCopy, out: Path) -> None:
    """Write a checkpoint, whole or not at all. StorageFailed, DiskFull."""
    import os

    from ..storage import files
    from ..storage.checkpoints import labels_of, parameters_by_name
    from ..storage.tensor_file import write_tensors

    new = out.with_name(f".{out.name}-{os.getpid()}")
    parameters = parameters_by_name(copy)
    try:
        write_tensors(new, parameters, labels_of(facts))
        os.replace(new, out)
    except OSError as error:
        new.unlink(missing_ok=True)
        need_bytes = sum(tensor.nbytes for tensor in parameters.values())
        raise files.refusal(str(out), error, out.parent, need_bytes) from error


def _digest(copy: ArenasCopy) -> str:
    """The xxh3-128 of all parameters and state: equal for models that are equal to the bit."""
    import torch
    import xxhash

    digest = xxhash.xxh3_128()
    for parameters, states in zip(copy.parameters, copy.states, strict=True):
        for _, flat in sorted({"": parameters, **states}.items()):
            digest.update(flat.detach().cpu().view(torch.uint8).numpy().data)
    digest.update(repr(copy.steps).encode())
    return digest.hexdigest()
