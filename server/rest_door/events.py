"""Events: who did what to a model, after which version."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from .depends import ModelHere

router = APIRouter(tags=["events"])


@router.get("/models/{m}/events", summary="List the last events")
async def list_events(model: ModelHere, after: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
    """Oldest first, those with an id above `after`."""
    return {"events": [event for event in model.events if event["id"] > after]}
