"""Health: whether the process is alive, and whether the server takes work."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from ..depends import CatalogHere

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="The process is alive")
async def healthz() -> dict[str, str]:
    """Answers as long as the event loop runs."""
    return {"status": "ok"}


@router.get("/readyz", summary="The server takes work")
async def readyz(catalog: CatalogHere) -> JSONResponse:
    """200 from when the models are loaded until the server drains, else 503."""
    return JSONResponse({"ready": catalog.ready}, 200 if catalog.ready else 503)
