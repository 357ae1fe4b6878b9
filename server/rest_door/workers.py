"""Workers: who they are, how far behind, and the end of one."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query

from ..model import Model
from ..worker import Worker
from .depends import OPERATOR, ModelHere
from .numbers import finite_values
from .queries import Index, Offset

router = APIRouter(tags=["workers"])
# At 10 us each, on the event loop.
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
        "in_flight": len(worker.held),
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
    """Every worker remembered, those that left included, a page at a time."""
    now_s = time.monotonic()
    under_policy = model.judge.policy.shown(model.judge.docket.view(now_s))
    workers = model.sessions.workers
    page = islice(workers.values(), offset, offset + limit)
    return {
        "workers": [_show(worker, model, now_s, under_policy) for worker in page],
        "total": len(workers),
    }


@router.post("/models/{m}/workers/{worker}/release", summary="Let a worker out of quarantine")
async def release_worker(model: ModelHere, worker: str) -> dict[str, Any]:
    """Its pushes are read again from now on."""
    return {"name": worker, "effective_version": model.release(worker, OPERATOR)}


@router.delete("/models/{m}/workers/{worker}", summary="Evict a worker")
async def evict_worker(model: ModelHere, worker: str) -> dict[str, Any]:
    """Fence it at once; its receipts are kept, and it may join again by hand."""
    return {"name": worker, "effective_version": model.evict(worker, OPERATOR)}
