"""Checkpoints and the state_dict, as they are now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from ..arena import ArenasCopy
from ..catalog import Catalog
from ..export import check_format, describe_state, write
from ..threads import READS
from .depends import CatalogHere, ExportsHere, ModelHere

router = APIRouter(tags=["export"])
SUFFIX = {"safetensors": "safetensors", "torch": "pt"}


@router.get("/models/{m}/export", summary="Download a checkpoint")
async def export(
    model: ModelHere,
    catalog: CatalogHere,
    exports: ExportsHere,
    format: Annotated[str, Query(description="safetensors or torch")] = "safetensors",
) -> FileResponse:
    """`safetensors`: parameters by name. `torch`: {"model", "optimizer"}, for torch.load(weights_only=True)."""
    check_format(format)
    async with exports.copy_of(model) as (facts, copy):
        return await file_response(facts, copy, format, catalog, f"{model.name}-v{copy.version}")


@router.get("/models/{m}/state-dict", summary="Show the state_dict")
async def show_state_dict(model: ModelHere, exports: ExportsHere) -> dict[str, Any]:
    """torch's shape, with each state's shape and norm in place of its elements."""
    async with exports.copy_of(model) as (facts, copy):
        optimizers = await READS.run(describe_state, facts, copy)
        return {"version": copy.version, "timeline": copy.timeline, "optimizers": optimizers}


async def file_response(
    facts: Mapping[str, Any], copy: ArenasCopy, form: str, catalog: Catalog, name: str
) -> FileResponse:
    """A checkpoint as a download; its temporary file goes when the last byte is sent."""
    path = await READS.run(write, facts, copy, form, catalog.config.data)
    return FileResponse(
        path,
        media_type="application/octet-stream",
        filename=f"{name}.{SUFFIX[form]}",
        headers={"X-Pushstep-Version": str(copy.version), "X-Pushstep-Timeline": str(copy.timeline)},
        background=BackgroundTask(path.unlink, missing_ok=True),
    )
