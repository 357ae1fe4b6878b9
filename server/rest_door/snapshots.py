"""Snapshots: taken, listed, downloaded, restored, deleted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse

from ..export import check_format
from ..threads import DISK, READS
from .depends import OPERATOR, CatalogHere, ModelHere
from .export import file_response

router = APIRouter(tags=["snapshots"])
SHOWN = ("id", "timeline", "version", "edit", "created", "automatic", "digest", "files", "damaged")


def _show(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: manifest[key] for key in SHOWN if key in manifest}


@router.get("/models/{m}/snapshots", summary="List the snapshots")
async def list_snapshots(model: ModelHere, catalog: CatalogHere) -> dict[str, Any]:
    """Newest first; a damaged one says what is wrong with it."""
    found = await READS.run(catalog.snapshots(model.name).manifests)
    return {"snapshots": [_show(manifest) for manifest in found]}


@router.post("/models/{m}/snapshots", status_code=201, summary="Take a snapshot")
async def take_snapshot(m: str, catalog: CatalogHere) -> dict[str, Any]:
    """The whole model at its version of now, on the disk when this answers."""
    return _show(await catalog.snapshot(m, OPERATOR))


@router.get("/models/{m}/snapshots/{snapshot}", summary="Show a snapshot")
async def show_snapshot(model: ModelHere, snapshot: str, catalog: CatalogHere) -> dict[str, Any]:
    """Its manifest, after every byte of it was verified."""
    manifest, _ = await READS.run(catalog.snapshots(model.name).read, snapshot)
    return {**_show(manifest), "verified": True}


@router.delete("/models/{m}/snapshots/{snapshot}", status_code=204, summary="Delete a snapshot")
async def delete_snapshot(model: ModelHere, snapshot: str, catalog: CatalogHere) -> Response:
    """For good."""
    await DISK.run(catalog.snapshots(model.name).delete, snapshot)
    model.record("snapshot_deleted", OPERATOR, snapshot=snapshot)
    return Response(status_code=204)


@router.post("/models/{m}/snapshots/{snapshot}/restore", summary="Restore a snapshot")
async def restore_snapshot(m: str, snapshot: str, catalog: CatalogHere) -> dict[str, Any]:
    """Bring everything but the worker table back, on a new timeline. Workers are told and go on from there."""
    version = await catalog.restore(m, snapshot, OPERATOR)
    model = catalog.get(m)
    return {"id": snapshot, "timeline": model.timeline, "effective_version": version}


@router.get("/models/{m}/snapshots/{snapshot}/content", summary="Download a snapshot as a checkpoint")
async def snapshot_content(
    model: ModelHere,
    snapshot: str,
    catalog: CatalogHere,
    format: Annotated[str, Query(description="safetensors or torch")] = "safetensors",
) -> FileResponse:
    """The same files as an export, of the snapshot's version."""
    check_format(format)
    facts, copy = await READS.run(catalog.snapshots(model.name).read, snapshot)
    return await file_response(facts, copy, format, catalog, f"{model.name}-{snapshot}")
