"""GET /metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from .exposition import OPEN_METRICS, PLAIN, Exposition

router = APIRouter(tags=["metrics"])
PATH: Final = "/metrics"
# Answers of parts up to this size need no room in the readers' budget: when that is full, somebody has to see it.
PART_BYTES: Final = 64 << 10
_TEXT: Final = {"schema": {"type": "string"}}
_ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "All metrics", "content": {PLAIN: _TEXT, OPEN_METRICS: _TEXT}}
}


@router.get(PATH, summary="Show the metrics", response_class=Response, responses=_ANSWERS)
async def show_metrics(request: Request) -> Response:
    """What Prometheus scrapes, in its text format, or in OpenMetrics for those who accept that."""
    exposition: Exposition = request.app.state.exposition
    text, kind = await exposition.text(request.headers.get("accept", ""))
    return StreamingResponse(_parts(text), headers={"content-type": kind})


async def _parts(text: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(text), PART_BYTES):
        yield text[at : at + PART_BYTES]
