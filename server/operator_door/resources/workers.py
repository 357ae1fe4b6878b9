"""Workers: listed with their progress, released from quarantine, evicted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query

from ...coordinator.worker import Worker
from ...models.edits import Edits
from ...models.model import Model
from ..depends import OPERATOR, ModelHere
from ..numbers import finite_values
from ..queries import Index, Offset

router = APIRouter(tags=["workers"])
# Each takes 10 us of the event loop.
MOST_SHOWN: Final = 2000


def _show(
    worker: Worker, model: Model, now_s: float, under_policy: Callable[[Worker], dict[str, Any]]
) -> dict[str, Any]:
    return {
        "name": worker.name,
        "state": worker.state,
        "lead": model.sessions.leads(worker),
        "epoch": worker.epoch,
        "sequence": worker.sequence,
        "lag": model.version - worker.base_version,
        "staleness": worker.staleness,
        "last_seen_s": round(now_s - worker.last_seen_s, 3),
        "lease_left_s": round(max(0.0, worker.lease_until_s - now_s), 3),
        "outcomes": worker.outcomes,
        "duplicates": worker.duplicates,
        "in_flight": len(worker.undecided),
        "refused_in_row": worker.refused_in_row,
        "quarantined": worker.quarantined,
        **under_policy(worker),
        "metrics": finite_values(worker.metrics),
    }


@router.get("/models/{m}/workers", summary="List the workers")
async def list_workers(
    model: ModelHere,
    offset: Offset = 0,
    limit: Annotated[Index, Query(ge=1, le=MOST_SHOWN)] = MOST_SHOWN,
) -> dict[str, Any]:
    """Every worker that the server remembers, also those that left, a page at a time."""
    now_s = model.clock()
    under_policy = model.coordinator.policy.shown(model.coordinator.pending_pushes.view(now_s))
    workers = model.sessions.workers
    page = islice(workers.values(), offset, offset + limit)
    return {
        "workers": [_show(worker, model, now_s, under_policy) for worker in page],
        "total": len(workers),
    }


@router.post("/models/{m}/workers/{worker}/release", summary="Let a worker out of quarantine")
async def release_worker(model: ModelHere, worker: str) -> dict[str, Any]:
    """The worker's pushes are read again from now on."""
    version = Edits(model).release(worker, OPERATOR)
    await model.recorder.until_safe()
    return {"name": worker, "effective_version": version}


@router.delete("/models/{m}/workers/{worker}", summary="Evict a worker")
async def evict_worker(model: ModelHere, worker: str) -> dict[str, Any]:
    """Fences the worker at once. Its receipts are kept, and it may join again by hand."""
    version = Edits(model).evict(worker, OPERATOR)
    await model.recorder.until_safe()
    return {"name": worker, "effective_version": version}
