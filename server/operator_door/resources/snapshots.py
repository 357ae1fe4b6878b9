"""Snapshots: taken, listed, downloaded, restored, deleted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from pushstep.proto.errors import UnknownSnapshot

from ...arenas.arenas_copy import ArenasCopy
from ...models.catalog import Catalog
from ...models.copies import whole_snapshot
from ...models.events import OPERATOR
from ...process.threads import DISK, READS, STORE, Threads
from ...storage.checkpoints import Checkpoint, Content, write
from ..answers.download import Download
from ..answers.dry_run import DRY_RUN_ANSWER, DryRun, would, would_restore
from ..answers.pages import Cursor, key_in, page_of
from ..depends import CatalogHere, CopiesHere, DownloadsHere, ModelHere
from ..queries import Index
from .export import Average, Format, State, download

router = APIRouter(tags=["snapshots"])
# Each one's manifest is read and verified.
MOST_SHOWN: Final = 1000
SHOWN = (
    "id",
    "timeline",
    "version",
    "edit",
    "created",
    "automatic",
    "digest",
    "files",
    "damaged",
    "unsupported",
)


def _show(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: manifest[key] for key in SHOWN if key in manifest}


def _readers(catalog: Catalog) -> Threads:
    """Who reads snapshots: a store that does not answer holds up no other reader."""
    return READS if catalog.remote is None else STORE


def _writers(catalog: Catalog) -> Threads:
    return DISK if catalog.remote is None else STORE


@router.get("/models/{m}/snapshots", summary="List the snapshots")
async def list_snapshots(
    model: ModelHere,
    catalog: CatalogHere,
    limit: Annotated[Index, Query(ge=1, le=MOST_SHOWN)] = MOST_SHOWN,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """The snapshots, newest first. A damaged one says what is wrong with it."""
    snapshots, behind = catalog.snapshots(model.name), key_in(cursor, "snapshots", str)

    def read() -> dict[str, Any]:
        ids = snapshots.ids(older_than=behind)
        shown, more = page_of(ids, limit, "snapshots", str)
        return {"snapshots": snapshots.manifests(_show, shown), "next": more}

    return await _readers(catalog).run(read)


@router.post("/models/{m}/snapshots", status_code=201, summary="Take a snapshot", responses=DRY_RUN_ANSWER)
async def take_snapshot(model: ModelHere, catalog: CatalogHere, dry_run: DryRun = False) -> Any:
    """Saves the whole model at its current version. The snapshot is on the disk when this answers."""
    if dry_run:
        model.require_whole()
        at = {"timeline": model.timeline, "version": model.version, "edit": model.edit}
        return would(None, {**at, "automatic": False, "bytes": model.held_bytes})
    return _show(await catalog.snapshot(model.name, OPERATOR))


@router.get("/models/{m}/snapshots/{snapshot}", summary="Show a snapshot")
async def show_snapshot(model: ModelHere, snapshot: str, catalog: CatalogHere) -> dict[str, Any]:
    """The snapshot's manifest, after every byte of the snapshot was verified."""
    manifest = await _readers(catalog).run(catalog.snapshots(model.name).verified, snapshot)
    return {**_show(manifest), "verified": True}


@router.delete(
    "/models/{m}/snapshots/{snapshot}",
    status_code=204,
    summary="Delete a snapshot",
    responses=DRY_RUN_ANSWER,
)
async def delete_snapshot(
    model: ModelHere, snapshot: str, catalog: CatalogHere, dry_run: DryRun = False
) -> Response:
    """Deletes the snapshot for good."""
    if dry_run:
        shown = await _readers(catalog).run(catalog.snapshots(model.name).manifests, _show, [snapshot])
        if not shown:
            raise UnknownSnapshot(model=model.name, snapshot=snapshot)
        return would(shown[0], None)
    folder, alone = catalog.folder(model.name), catalog.alone(model.name)
    await catalog.snapshotter.delete(model, folder, alone, snapshot, OPERATOR, _writers(catalog))
    return Response(status_code=204)


@router.post("/models/{m}/snapshots/{snapshot}/restore", summary="Restore a snapshot")
async def restore_snapshot(
    model: ModelHere, snapshot: str, catalog: CatalogHere, dry_run: DryRun = False
) -> Any:
    """Brings back everything but the worker table, on a new timeline.

    Workers are told, and go on from there.
    """
    if dry_run:
        return would_restore(model, await catalog.restores.planned(model, snapshot))
    version = await catalog.restore(model.name, snapshot, OPERATOR)
    return {"id": snapshot, "timeline": model.timeline, "effective_version": version}


@router.get(
    "/models/{m}/snapshots/{snapshot}/content",
    summary="Download a snapshot as a checkpoint",
    response_class=StreamingResponse,
)
async def snapshot_content(
    request: Request,
    model: ModelHere,
    snapshot: str,
    catalog: CatalogHere,
    copies: CopiesHere,
    downloads: DownloadsHere,
    format: Format = "safetensors",
    state: State = False,
    average: Average = "",
) -> Download:
    """The same files as an export, of the snapshot's version. A Range is answered with a part."""
    content = Content(format, state, average)

    async def read() -> tuple[dict[str, Any], ArenasCopy]:
        manifest, own = await _readers(catalog).run(catalog.snapshots(model.name).read, snapshot)
        return await whole_snapshot(model, manifest, own, catalog.config.data, content)

    async def written() -> Checkpoint:
        async with copies.shared((model.uid, snapshot, model.shard and content.needs), read) as (facts, copy):
            return await READS.run(write, facts, copy, content, catalog.config.data)

    async with AsyncExitStack() as held:
        checkpoint = await held.enter_async_context(downloads.shared((model.uid, snapshot, content), written))
        # a snapshot never changes, but a deleted one may have had the same name
        sent = downloads.pins.note((f"{model.name}-{snapshot}", content), checkpoint.etag)
        fixed = sent in (None, checkpoint.etag)
        answer = await download(request, checkpoint, content, f"{model.name}-{snapshot}", is_fixed=fixed)
        answer.headers["Accept-Ranges"] = "bytes"
        answer.held = held.pop_all()
        return answer
