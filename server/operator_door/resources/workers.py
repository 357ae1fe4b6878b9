"""Workers: listed with their progress, quarantined, released, evicted."""

from __future__ import annotations

from collections.abc import Callable
from heapq import nsmallest
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query

from ...coordinator.worker import Worker, WorkerState
from ...models.edits import Edits
from ...models.events import OPERATOR
from ...models.model import Model
from ..answers.dry_run import DryRun, would
from ..answers.pages import Cursor, key_in, page_of
from ..depends import EditedModel, ModelHere
from ..numbers import finite_values
from ..queries import Index

router = APIRouter(tags=["workers"])
# Of one page. Each worker takes 10 us of the event loop.
MOST_SHOWN: Final = 2000


class _Shown:
    """Shows workers of one model as they are at one moment."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._now_s = model.clock()
        view = model.coordinator.pending_pushes.view(self._now_s)
        self._under_policy: Callable[[Worker], dict[str, Any]] = model.coordinator.policy.shown(view)

    def of(self, worker: Worker) -> dict[str, Any]:
        return {
            "name": worker.name,
            "state": worker.state,
            "lead": self._model.sessions.leads(worker),
            "epoch": worker.epoch,
            "sequence": worker.sequence,
            # after a restore the model's version may be below the worker's
            "lag": max(0, self._model.version - worker.base_version),
            "staleness": worker.staleness,
            "last_seen_s": round(self._now_s - worker.last_seen_s, 3),
            "lease_left_s": round(max(0.0, worker.lease_until_s - self._now_s), 3),
            "outcomes": worker.outcomes,
            "duplicates": worker.duplicates,
            "in_flight": len(worker.undecided),
            "refused_in_row": worker.refused_in_row,
            "quarantined": worker.quarantined,
            "quarantined_by_hand": worker.quarantined_by_hand,
            **self._under_policy(worker),
            "metrics": finite_values(worker.metrics),
        }


def _would(model: Model, worker: str, **changes: Any) -> Any:
    before = _Shown(model).of(model.sessions.known(worker))
    return would(before, {**before, **changes}, effective_version=model.version + 1)


@router.get("/models/{m}/workers", summary="List the workers")
async def list_workers(
    model: ModelHere,
    limit: Annotated[Index, Query(ge=1, le=MOST_SHOWN)] = MOST_SHOWN,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """Every worker that the server remembers, also those that left, by name, a page at a time."""
    workers, behind = model.sessions.workers, key_in(cursor, "workers", str)
    names = workers if behind is None else (name for name in workers if name > behind)
    shown, more = page_of(nsmallest(limit + 1, names), limit, "workers", str)
    at = _Shown(model)
    return {"workers": [at.of(workers[name]) for name in shown], "total": len(workers), "next": more}


@router.get("/models/{m}/workers/{worker}", summary="Show a worker")
async def show_worker(model: ModelHere, worker: str) -> dict[str, Any]:
    """One worker, as the list shows it."""
    return _Shown(model).of(model.sessions.known(worker))


@router.post("/models/{m}/workers/{worker}/quarantine", summary="Quarantine a worker")
async def quarantine_worker(model: EditedModel, worker: str, dry_run: DryRun = False) -> Any:
    """Nothing more of the worker is read, until it is released: its pushes are refused as `quarantined`.

    Those that are pending are not applied, and no round waits for it. The quarantine belongs to the worker's name: it
    lasts when the worker joins again, and when the server is started anew.
    """
    if dry_run:
        return _would(model, worker, quarantined=True, quarantined_by_hand=True, in_flight=0)
    version = Edits(model).quarantine(worker, OPERATOR)
    await model.recorder.until_safe()
    return {"name": worker, "effective_version": version}


@router.post("/models/{m}/workers/{worker}/release", summary="Let a worker out of quarantine")
async def release_worker(model: EditedModel, worker: str, dry_run: DryRun = False) -> Any:
    """The worker's pushes are read again from now on."""
    if dry_run:
        return _would(model, worker, quarantined=False, quarantined_by_hand=False, refused_in_row=0)
    version = Edits(model).release(worker, OPERATOR)
    await model.recorder.until_safe()
    return {"name": worker, "effective_version": version}


@router.delete("/models/{m}/workers/{worker}", summary="Evict a worker")
async def evict_worker(model: EditedModel, worker: str, dry_run: DryRun = False) -> Any:
    """Fences the worker at once. Its receipts are kept. A new session may join under its name."""
    if dry_run:
        return _would(model, worker, state=WorkerState.EVICTED, in_flight=0)
    version = Edits(model).evict(worker, OPERATOR)
    await model.recorder.until_safe()
    return {"name": worker, "effective_version": version}
