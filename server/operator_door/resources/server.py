"""The server itself: which one this is, the address of the workers' door, how full it is and what it can carry."""

from __future__ import annotations

from importlib.metadata import version as installed_version
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from ...access.caller import CALLER
from ...capacity.capacity import carried, shown, usage
from ...capacity.rates import Measured
from ..depends import CatalogHere

router = APIRouter(tags=["server"])
MOST_EVERY_S = 1e6


@router.get("", summary="Which server this is")
async def root(request: Request) -> dict[str, Any]:
    """The server's version, the address that workers connect to, and whose token this is.

    `caller` has the token's name, its role, and the patterns of the only models that it is for, if it is not for all. It is
    null where the server has no tokens, and everyone may do everything.
    """
    caller = CALLER.get()
    return {
        "version": installed_version("pushstep"),
        "grpc": request.app.state.grpc_address,
        "caller": None
        if caller is None
        else {"name": caller.name, "role": caller.role, "models": list(caller.models)},
    }


@router.get("/capacity", summary="Show how full the server is, and what it carries")
async def show_capacity(
    request: Request,
    catalog: CatalogHere,
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
    """
    found = None if model is None else catalog.get(model)
    measured: Measured = request.app.state.rates
    rates = await measured.rates()
    answer = {**usage(catalog), "rates": shown(rates, catalog)}
    return answer if found is None else {**answer, "model": carried(found, catalog, rates, push_every_s)}
