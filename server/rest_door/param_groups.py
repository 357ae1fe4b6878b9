"""Param groups: shown with their ETag, changed by PATCH."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Response

from pushstep.proto.errors import StaleEtag

from ..groups import Group
from ..model import Model
from .depends import OPERATOR, ModelHere

router = APIRouter(tags=["param groups"])


def _etag(model: Model, group: Group) -> str:
    return f'"{model.timeline}-{group.revision}"'


def _show(model: Model, index: int, group: Group) -> dict[str, Any]:
    return {
        "index": index,
        "rule": group.rule.name,
        "optimizer": group.optimizer,
        **group.values,
        "params": [slot.name for slot in model.layout.slots if slot.group == index],
        "held": sorted(group.pinned),
        "scheduled_by": group.scheduled_by,
        "etag": _etag(model, group),
    }


@router.get("/models/{m}/param-groups", summary="List the param groups")
async def list_groups(model: ModelHere) -> dict[str, Any]:
    """Every group, in torch's words, as it holds from the next version on."""
    groups = [_show(model, index, group) for index, group in enumerate(model.groups.list)]
    return {"param_groups": groups, "effective_version": model.version + 1}


@router.get("/models/{m}/param-groups/{index}", summary="Show a param group")
async def show_group(model: ModelHere, index: int, response: Response) -> dict[str, Any]:
    """One group; its ETag also as a header."""
    group = model.groups.at(index, model.name)
    response.headers["ETag"] = _etag(model, group)
    return {**_show(model, index, group), "effective_version": model.version + 1}


@router.patch("/models/{m}/param-groups/{index}", summary="Change hyperparameters")
async def patch_group(
    model: ModelHere,
    index: int,
    response: Response,
    values: Annotated[
        dict[str, float | bool], Body(examples=[{"lr": 0.5}, {"weight_decay": 0.01, "maximize": False}])
    ],
    hold: Annotated[
        bool, Query(description="hold these fields against workers' edits; false lets them go again")
    ] = True,
    if_match: Annotated[str | None, Header()] = None,
) -> dict[str, Any]:
    """All of it or nothing. The reply's `effective_version` is the first version stepped with the new values."""
    await model.try_group(index, values)
    group = model.groups.at(index, model.name)
    if if_match is not None and if_match not in ("*", _etag(model, group)):
        raise StaleEtag(what=f"param group {index}", etag=_etag(model, group))
    group, version = model.patch_group(index, values, hold, OPERATOR)
    response.headers["ETag"] = _etag(model, group)
    return {**_show(model, index, group), "effective_version": version}
