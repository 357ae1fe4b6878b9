"""Parameters: their names, shapes and statistics."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from operator import attrgetter
from typing import Annotated, Any

from fastapi import APIRouter, Query
from torch import Tensor

from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Slot

from ...arenas.statistics import statistics
from ...models.model import Model
from ...process.memory import copy_of
from ...process.threads import READS
from ..answers.pages import Cursor, key_in, page_of
from ..depends import LooksHere, ModelHere
from ..numbers import finite_values
from ..queries import Index

router = APIRouter(tags=["parameters"])


def _show(slot: Slot, model: Model) -> dict[str, Any]:
    return {
        "name": slot.name,
        "shape": list(slot.shape),
        "dtype": dtypes.NAMES[slot.dtype],
        "group": slot.group,
        "aliases": list(slot.aliases),
        "row_sparse": slot.index in model.arenas.row_changed,
        "steps": model.arenas.steps[slot.index],
    }


@router.get("/models/{m}/parameters", summary="List the parameters")
async def list_parameters(
    model: ModelHere,
    limit: Annotated[Index, Query(ge=1, le=10_000)] = 1000,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """The parameters in manifest order, a page at a time."""
    slots, behind = model.layout.slots, key_in(cursor, "parameters", int)
    rest = islice(slots, 0 if behind is None else min(max(0, behind + 1), len(slots)), None)
    shown, more = page_of(rest, limit, "parameters", attrgetter("index"))
    return {
        "parameters": [_show(slot, model) for slot in shown],
        "total": len(slots),
        "next": more,
    }


@router.get("/models/{m}/parameters/{name:path}", summary="Show a parameter in numbers")
async def show_parameter(model: ModelHere, name: str, looks: LooksHere) -> dict[str, Any]:
    """Statistics of the parameter's values and states at one version."""
    slot = model.layout.slot(name, model.name)
    arenas = model.arenas

    def copy() -> tuple[dict[str, int], dict[str, Tensor]]:
        views = {"value": arenas.view(slot), **{s: arenas.view(slot, s) for s in arenas.state_names(slot)}}
        copied = {name: copy_of(view, f"a look at {slot.name!r}") for name, view in views.items()}
        return {"version": arenas.version, "timeline": arenas.timeline}, copied

    async def copied() -> tuple[dict[str, int], dict[str, Tensor]]:
        # the writer thread only copies: the statistics are computed in another one
        at, tensors = await model.writer.submit(copy)
        await model.recorder.until_shown(at["version"])
        return at, tensors

    async with looks.shared((model.uid, model.timeline, model.version, slot.index), copied) as (at, tensors):
        shown = await READS.run(_statistics, tensors)
    return {**_show(slot, model), **at, "statistics": shown}


def _statistics(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, float | None]]:
    return {name: finite_values(statistics(tensor)) for name, tensor in tensors.items()}
