"""Param groups: shown with their ETag, changed by PATCH."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge
from itertools import islice
from operator import attrgetter
from typing import Annotated, Any, Final

from fastapi import APIRouter, Body, Header, Query, Response
from pydantic import StrictBool

from pushstep.proto.wire.layout import Layout, Slot

from ...coordinator.groups import Group
from ...coordinator.settings import Number, Text
from ...models.edits import Edits
from ...models.model import Model
from ..depends import OPERATOR, ModelHere
from ..header_fields import require_match
from ..queries import Flag, Index

router = APIRouter(tags=["param groups"])
# Names shown of each group. GET .../parameters lists all.
PARAMS_SHOWN: Final = 1000


def _etag(model: Model, group: Group) -> str:
    return f'"{model.timeline}-{group.revision}"'


def _slots(layout: Layout, group: int) -> Iterator[Slot]:
    """A group's parameters in the manifest's order, merged from its arenas (one per dtype)."""
    arenas = layout.arenas_of_group[group]
    return merge(*(arena.slots for arena in arenas), key=attrgetter("index"))


def _show(model: Model, index: int, group: Group) -> dict[str, Any]:
    return {
        "index": index,
        "rule": group.rule.name,
        "optimizer": group.optimizer,
        **group.values,
        "params": [slot.name for slot in islice(_slots(model.layout, index), PARAMS_SHOWN)],
        "params_total": sum(len(arena.slots) for arena in model.layout.arenas_of_group[index]),
        "held": sorted(group.pinned),
        "scheduled_by": group.scheduled_by,
        "etag": _etag(model, group),
    }


@router.get("/models/{m}/param-groups", summary="List the param groups")
async def list_groups(model: ModelHere) -> dict[str, Any]:
    """Every group with torch's keys and values, as it holds from the next version on."""
    groups = [_show(model, index, group) for index, group in enumerate(model.groups.list)]
    return {"param_groups": groups, "effective_version": model.version + 1}


@router.get("/models/{m}/param-groups/{index}", summary="Show a param group")
async def show_group(model: ModelHere, index: Index, response: Response) -> dict[str, Any]:
    """One group. Its ETag is also a header."""
    group = model.groups.at(index, model.name)
    response.headers["ETag"] = _etag(model, group)
    return {**_show(model, index, group), "effective_version": model.version + 1}


@router.patch("/models/{m}/param-groups/{index}", summary="Change hyperparameters")
async def patch_group(
    model: ModelHere,
    index: Index,
    response: Response,
    values: Annotated[
        dict[Text, Number | StrictBool],
        Body(examples=[{"lr": 0.5}, {"weight_decay": 0.01, "maximize": False}]),
    ],
    hold: Annotated[
        Flag, Query(description="hold these fields against workers' edits; false lets them go again")
    ] = True,
    if_match: Annotated[list[str] | None, Header()] = None,
) -> dict[str, Any]:
    """All changes are made, or none.

    The reply's `effective_version` is the first version stepped with the new values.
    """
    await Edits(model).try_group(index, values)
    group = model.groups.at(index, model.name)
    require_match(if_match, _etag(model, group), f"param group {index}")
    group, version = Edits(model).patch_group(index, values, hold, OPERATOR)
    await model.recorder.until_safe()
    response.headers["ETag"] = _etag(model, group)
    return {**_show(model, index, group), "effective_version": version}
