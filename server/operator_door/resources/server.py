"""The server itself: which one this is, how full it is and what it can carry, and the ranks of its job."""

from __future__ import annotations

from importlib.metadata import version as installed_version
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request

from ...access.caller import CALLER, may_use
from ...capacity.capacity import carried, shown, usage
from ...reports.shown import capacity_shown, carriers, model_shown, rank_shown, rates_of, skew
from ..answers.pages import Cursor, key_in, page_of
from ..depends import CatalogHere, ViewHere
from ..queries import Index

router = APIRouter(tags=["server"])
MOST_EVERY_S: Final = 1e6
MOST_SHOWN: Final = 100


@router.get("", summary="Which server this is")
async def root(request: Request, view: ViewHere) -> dict[str, Any]:
    """The server's version, the address that workers connect to, of how many ranks its job is, and whose token this is.

    `caller` has the token's name, its role, and the patterns of the only models that it is for, if it is not for all. It is
    null where the server has no tokens, and everyone may do everything.
    """
    caller = CALLER.get()
    return {
        "version": installed_version("pushstep"),
        "grpc": request.app.state.grpc_address,
        "ranks": view.world,
        "caller": None
        if caller is None
        else {"name": caller.name, "role": caller.role, "models": list(caller.models)},
    }


@router.get("/capacity", summary="Show how full the server is, and what it carries")
async def show_capacity(
    catalog: CatalogHere,
    view: ViewHere,
    model: Annotated[
        str | None, Query(max_length=100, description="also say how many workers of this model it carries")
    ] = None,
    push_every_s: Annotated[
        float,
        Query(gt=0, le=MOST_EVERY_S, allow_inf_nan=False, description="in which each worker sends one push"),
    ] = 1.0,
) -> dict[str, Any]:
    """The limits, how much of them is in use, rates of this host, and the workers of a model that they are enough for.

    Rates are measured on this host, on memory of their own and outside of every writer, at most once in five minutes:
    `ingest_bytes_per_s`, of pushes' bodies put in their place with digest and norms (the network comes on top);
    `step_elements_per_s`, of each rule's kernel over float32; `snapshot_bytes_per_s`, of the last snapshot that was written
    (null before the first).

    Of a model, `workers` is the lowest of these `bounds`. `rate`: push_every_s / max(push_bytes / ingest_bytes_per_s, step_s),
    since one push is taken in while another is stepped; `step_s` is of the model's last step, or before it elements /
    step_elements_per_s. `staging`: the limit of staging_bytes / what a push takes of it, so many may be under way at once.
    `table`: workers that the server remembers. More than that are not refused for the first two: they wait.

    Of a job of several ranks, what stands at the top is rank 0's, and `shards` has the same of each rank, measured on its own
    host (`rates` null while it has not answered). Each takes its part of every push, so a model's bound is the lowest of all
    ranks, and `bound_rank` says whose it is.
    """
    found = None if model is None else catalog.get(model)
    rates = await view.measured.rates()
    rows = await view.look_with_rates() if view.world > 1 else ()
    answer: dict[str, Any] = {**usage(catalog), "rates": shown(rates, catalog)}
    if rows:
        answer["shards"] = [capacity_shown(row, rates_of(row, rates)) for row in rows]
    if found is not None:
        answer["model"] = carried(found, catalog, carriers(found, catalog, rows, rates), push_every_s)
    return answer


@router.get("/shards", summary="Show the ranks of a job, and where models lie")
async def show_shards(
    catalog: CatalogHere,
    view: ViewHere,
    limit: Annotated[Index, Query(ge=1, le=MOST_SHOWN)] = MOST_SHOWN,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """The ranks of this server's job, asked just now, and the models that the caller may use, a page at a time.

    A server alone is one rank, so programs need not tell the two apart. `state` is `awaited` until a rank's link is open, then
    `starting`, `serving`, `silent` (nothing was heard of it for 10 s), or `stopping`. A rank that does not answer within a
    second is shown as it last answered, `figures_age_s` ago; what it has never said is null. `versions_behind` is the most
    that it is behind the newest ticket, of any model. `seconds` are steps taken and records appended since the start, and the
    time that they took: two looks give the mean between them.

    `skew` is the largest over the mean of the ranks, 1 where all are equal: of the bytes that ranks hold, and of each model's.
    A model's `map_version` is what workers name; it changes when a rank has another address.
    """
    rows = await view.look()
    behind = key_in(cursor, "shards", str)
    names = sorted(name for name in catalog.models if (behind is None or name > behind) and may_use(name))
    shown, more = page_of(names, limit, "shards", str)
    held = [row.figures.held_bytes for row in rows if row.figures is not None]
    return {
        "world": view.world,
        "ready": not view.unready,
        "skew": skew(held),
        "ranks": [rank_shown(row) for row in rows],
        "models": [model_shown(catalog.models[name], view.world) for name in shown],
        "next": more,
    }
