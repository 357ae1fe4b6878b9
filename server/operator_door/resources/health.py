"""Health: whether the process is alive, and whether the server takes work."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from ..depends import ViewHere

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="The process is alive")
async def healthz() -> dict[str, str]:
    """Answers as long as the event loop runs."""
    return {"status": "ok"}


@router.get("/readyz", summary="The server takes work")
async def readyz(view: ViewHere) -> JSONResponse:
    """200 from when the models are loaded until the server drains, else 503.

    Of a job of several ranks: while all of them are ready. `ranks_not_ready` says what the others do.
    """
    unready = view.unready
    answer: dict[str, Any] = {"ready": not unready}
    if view.world > 1:
        answer["ranks_not_ready"] = {str(rank): state for rank, state in unready.items()}
    return JSONResponse(answer, 503 if unready else 200)
