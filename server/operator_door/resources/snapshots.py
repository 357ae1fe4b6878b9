"""Snapshots: taken, listed, downloaded, restored, deleted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from ...arenas.arena import ArenasCopy
from ...models.catalog import Catalog
from ...process.threads import DISK, READS, STORE, Threads
from ...storage.checkpoints import Checkpoint, Content, write
from ..depends import OPERATOR, CatalogHere, CopiesHere, DownloadsHere, ModelHere
from ..download import Download
from .export import Format, State, download

router = APIRouter(tags=["snapshots"])
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
async def list_snapshots(model: ModelHere, catalog: CatalogHere) -> dict[str, Any]:
    """The snapshots, newest first. A damaged one says what is wrong with it."""
    return {"snapshots": await _readers(catalog).run(catalog.snapshots(model.name).manifests, _show)}


@router.post("/models/{m}/snapshots", status_code=201, summary="Take a snapshot")
async def take_snapshot(m: str, catalog: CatalogHere) -> dict[str, Any]:
    """Saves the whole model at its current version. The snapshot is on the disk when this answers."""
    return _show(await catalog.snapshot(m, OPERATOR))


@router.get("/models/{m}/snapshots/{snapshot}", summary="Show a snapshot")
async def show_snapshot(model: ModelHere, snapshot: str, catalog: CatalogHere) -> dict[str, Any]:
    """The snapshot's manifest, after every byte of the snapshot was verified."""
    manifest = await _readers(catalog).run(catalog.snapshots(model.name).verified, snapshot)
    return {**_show(manifest), "verified": True}


@router.delete("/models/{m}/snapshots/{snapshot}", status_code=204, summary="Delete a snapshot")
async def delete_snapshot(model: ModelHere, snapshot: str, catalog: CatalogHere) -> Response:
    """Deletes the snapshot for good."""
    await _writers(catalog).run(catalog.snapshots(model.name).delete, snapshot)
    model.record("snapshot_deleted", OPERATOR, snapshot=snapshot)
    return Response(status_code=204)


@router.post("/models/{m}/snapshots/{snapshot}/restore", summary="Restore a snapshot")
async def restore_snapshot(m: str, snapshot: str, catalog: CatalogHere) -> dict[str, Any]:
    """Brings back everything but the worker table, on a new timeline.

    Workers are told, and go on from there.
    """
    version = await catalog.restore(m, snapshot, OPERATOR)
    model = catalog.get(m)
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
) -> Download:
    """The same files as an export, of the snapshot's version. A Range is answered with a part."""
    content = Content(format, state)

    async def read() -> tuple[dict[str, Any], ArenasCopy]:
        return await _readers(catalog).run(catalog.snapshots(model.name).read, snapshot)

    async def written() -> Checkpoint:
        async with copies.shared((model.uid, snapshot), read) as (facts, copy):
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
