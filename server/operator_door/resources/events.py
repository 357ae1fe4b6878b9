"""Events: who changed what in a model, and after which version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ..depends import ModelHere
from ..queries import Offset

router = APIRouter(tags=["events"])


@router.get("/models/{m}/events", summary="List the last events")
async def list_events(model: ModelHere, after: Offset = 0) -> dict[str, Any]:
    """The events with an id above `after`, oldest first."""
    return {"events": [event for event in model.events if event["id"] > after]}
