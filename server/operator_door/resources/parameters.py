"""Parameters: their names, shapes and statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from operator import attrgetter
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query
from torch import Tensor

from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Slot

from ...arenas.statistics import statistics
from ...models.model import Model
from ...parts.shard import whole_of
from ...process.memory import copy_of
from ...process.threads import READS
from ..answers.pages import Cursor, key_in, page_of
from ..depends import LooksHere, ModelHere
from ..numbers import finite_values
from ..queries import Index

router = APIRouter(tags=["parameters"])
# A look copies them in the writer thread: 16 MB of each float32 state, some milliseconds.
LOOK_ELEMENTS: Final = 4 << 20
LOOK_BLOCK: Final = 1024


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
        "row_sparse": here.index in model.arenas.row_changed,
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
    slot = model.layout.slot(name, model.name)
    arenas = model.arenas

    def copy() -> tuple[dict[str, int], dict[str, Tensor]]:
        views = {"value": arenas.view(slot), **{s: arenas.view(slot, s) for s in arenas.state_names(slot)}}
        copied = {name: copy_of(_looked_at(view), f"a look at {slot.name!r}") for name, view in views.items()}
        return {"version": arenas.version, "timeline": arenas.timeline}, copied

    async def copied() -> tuple[dict[str, int], dict[str, Tensor]]:
        # the writer thread only copies: the statistics are computed in another one
        at, tensors = await model.writer.submit(copy)
        await model.recorder.until_shown(at["version"])
        return at, tensors

    async with looks.shared((model.uid, model.timeline, model.version, slot.index), copied) as (at, tensors):
        shown = await READS.run(_statistics, tensors, math.prod(slot.shape))
        looked_at = tensors["value"].numel()
    return {**_show(slot, model), **at, "statistics": shown, "looked_at": looked_at}


def _looked_at(tensor: Tensor) -> Tensor:
    """All of a tensor, or of a large one at most LOOK_ELEMENTS, in blocks at equal distances."""
    every = -(-tensor.numel() // LOOK_ELEMENTS)
    if every <= 1:
        return tensor
    flat = tensor.reshape(-1)
    blocks = flat.numel() // (every * LOOK_BLOCK)
    return flat[: blocks * every * LOOK_BLOCK].view(blocks, every * LOOK_BLOCK)[:, :LOOK_BLOCK]


def _statistics(tensors: Mapping[str, Tensor], elements: int) -> dict[str, dict[str, float | None]]:
    shown = {name: dict(statistics(tensor)) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        norm = shown[name]["norm"]
        if norm is not None and tensor.numel() < elements:  # of a sample
            shown[name]["norm"] = norm * math.sqrt(elements / tensor.numel())
    return {name: finite_values(values) for name, values in shown.items()}
