"""Parameters: their names, shapes and statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from operator import attrgetter
from typing import Annotated, Any

from fastapi import APIRouter, Query
from torch import Tensor

from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Slot

from ...arenas.statistics import statistics
from ...models.copies import looked
from ...models.model import Model
from ...parts.looks import VALUE
from ...parts.shard import whole_of
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
        **_taken(slot, model),
    }


def _taken(slot: Slot, model: Model) -> dict[str, Any]:
    """What steps have done to it. Of a parameter of which nothing lies in this rank that is not known here."""
    here = slot if model.shard is None else model.layout.by_name.get(slot.name)
    if here is None:
        return {"row_sparse": None, "steps": None}
    return {
        "row_sparse": here.index in model.arenas.row_changes.versions,
        "steps": int(model.arenas.steps[here.index]),
    }


@router.get("/models/{m}/parameters", summary="List the parameters")
async def list_parameters(
    model: ModelHere,
    limit: Annotated[Index, Query(ge=1, le=10_000)] = 1000,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """The parameters in manifest order, a page at a time."""
    slots, behind = whole_of(model).slots, key_in(cursor, "parameters", int)
    rest = islice(slots, 0 if behind is None else min(max(0, behind + 1), len(slots)), None)
    shown, more = page_of(rest, limit, "parameters", attrgetter("index"))
    return {
        "parameters": [_show(slot, model) for slot in shown],
        "total": len(slots),
        "next": more,
    }


@router.get("/models/{m}/parameters/{name:path}", summary="Show a parameter in numbers")
async def show_parameter(model: ModelHere, name: str, looks: LooksHere) -> dict[str, Any]:
    """Statistics of the parameter's values and states at one version.

    Of a large parameter only `looked_at` elements are looked at, in blocks spread over it, since steps wait meanwhile: the
    statistics are of those, and the norm is estimated from theirs.
    """
    slot = whole_of(model).slot(name, model.name)
    async with looks.shared(
        (model.uid, model.timeline, model.version, slot.index), lambda: looked(model, slot)
    ) as found:
        shown = await READS.run(_statistics, found.tensors, math.prod(slot.shape))
    return {
        **_show(slot, model),
        "row_sparse": found.row_sparse,
        "steps": found.steps,
        "version": found.version,
        "timeline": found.timeline,
        "statistics": shown,
        "looked_at": found.tensors[VALUE].numel(),
    }


def _statistics(tensors: Mapping[str, Tensor], elements: int) -> dict[str, dict[str, float | None]]:
    shown = {name: dict(statistics(tensor)) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        norm = shown[name]["norm"]
        if norm is not None and tensor.numel() < elements:  # of a sample
            shown[name]["norm"] = norm * math.sqrt(elements / tensor.numel())
    return {name: finite_values(values) for name, values in shown.items()}
