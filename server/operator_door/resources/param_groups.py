"""Param groups: shown with their ETag, changed by PATCH."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from heapq import merge
from itertools import islice
from operator import attrgetter
from typing import Annotated, Any, Final

from fastapi import APIRouter, Body, Query, Request, Response
from pydantic import StrictBool

from pushstep.proto.errors import InvalidHyperparameter, InvalidSettings
from pushstep.proto.wire.layout import Layout, Slot

from ...coordinator.commits import GROUPS, of_group
from ...coordinator.groups import Group, OperatorEdit
from ...coordinator.settings import Number, Text, read_json
from ...imports.incoming_file import IncomingFile
from ...imports.new_groups import Addition, NewGroups, addition_of
from ...models.edits import Edits
from ...models.events import OPERATOR
from ...models.model import Model
from ...parts.shard import whole_of
from ...process.threads import READS
from ..answers.dry_run import DRY_RUN_ANSWER, DryRun, would
from ..answers.etags import IfMatch, etag_of, require_known, tag
from ..answers.pages import Cursor, key_in, page_of
from ..depends import CatalogHere, EditedModel, ModelHere, received
from ..header_fields import is_json
from ..openapi import FILE_OR_JSON_BODY
from ..queries import Flag, Index

router = APIRouter(tags=["param groups"])
# Names shown of each group. GET .../parameters lists all.
PARAMS_SHOWN: Final = 1000
MOST_SHOWN: Final = 100


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
        "params": [slot.name for slot in islice(_slots(whole_of(model), index), PARAMS_SHOWN)],
        "params_total": sum(len(arena.slots) for arena in whole_of(model).arenas_of_group[index]),
        "held": sorted(group.pinned),
        "scheduled_by": group.scheduled_by,
        "frozen": group.frozen,
        "etag": etag_of(model, of_group(index)),
    }


@router.get("/models/{m}/param-groups", summary="List the param groups")
async def list_groups(
    model: ModelHere,
    response: Response,
    limit: Annotated[Index, Query(ge=1, le=MOST_SHOWN)] = MOST_SHOWN,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """Every group with torch's keys and values, as it holds from the next version on, a page at a time."""
    behind = key_in(cursor, "param-groups", int)
    groups = model.groups.list
    rest = range(0 if behind is None else min(max(0, behind + 1), len(groups)), len(groups))
    indices, more = page_of(rest, limit, "param-groups", int)
    tag(response, model, GROUPS)
    return {
        "param_groups": [_show(model, index, groups[index]) for index in indices],
        "total": len(groups),
        "next": more,
        "effective_version": model.version + 1,
    }


@router.post(
    "/models/{m}/param-groups",
    status_code=201,
    summary="Add a param group with new parameters",
    openapi_extra=FILE_OR_JSON_BODY,
    responses=DRY_RUN_ANSWER,
)
async def add_group(
    request: Request,
    model: EditedModel,
    catalog: CatalogHere,
    response: Response,
    group: Annotated[
        str,
        Query(description="with a file: the param group as JSON, such as one of `groups` of POST /v1/models"),
    ] = "",
    force: Annotated[Flag, Query(description="add it also if workers are live")] = False,
    dry_run: DryRun = False,
    if_match: IfMatch = None,
) -> Any:
    """torch's `add_param_group`. The body is JSON, or a safetensors file with the values of the parameters of `group`.

    In JSON each of `params` has a `name`, a `shape`, a `dtype` and `values`: one number for all elements (by default 0), or
    each in lists as long as the shape says. What else is named is a hyperparameter. If-Match: the ETag of the list.

    The model keeps its version. Its live workers (`workers_told`) know another manifest: their next push is answered
    `manifest_changed`, and clients join again by themselves. Sessions of arrays then go on. An attached optimizer stops with
    `manifest_mismatch` until its loop adds the same group (`add_param_group`), whose values it then takes, or attaches a module
    that has the parameters. So while workers are live, this is refused as `workers_live` without `force`. A snapshot of before
    cannot be restored any more.
    """
    groups = NewGroups(catalog)
    release: Callable[[], None] = _nothing

    def check() -> None:
        require_known(if_match, model, GROUPS)

    async def work() -> Any:
        if file is None:
            addition = await READS.run(addition_of, body)
        else:
            addition = await groups.read(file, group)
        if not dry_run:
            return await groups.add(model, addition, check, OPERATOR, force=force)
        _, planned = await groups.plan(model, addition, force=force)
        check()
        return would(None, _planned(model, planned, addition), effective_version=model.version + 1)

    file: IncomingFile | None = None
    body: dict[str, Any] = {}
    if is_json(request.headers.get("content-type", "")):
        body = _mapping(read_json(await request.body()))
    else:
        file = await received(request, catalog, model.name)
        release = file.release
    done = await catalog.whole(work(), release)  # also when the caller goes away: it reads the file
    if dry_run:
        return done
    index = len(model.groups.list) - 1
    tag(response, model, of_group(index))
    return {**_show(model, index, model.groups.list[index]), **done}


def _nothing() -> None:
    """What there is to release of JSON."""


def _mapping(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise InvalidSettings(problem="group: an object is needed")
    return body


def _planned(model: Model, group: Group, addition: Addition) -> dict[str, Any]:
    return {
        "index": len(model.groups.list),
        "rule": group.rule.name,
        "optimizer": group.optimizer,
        **group.values,
        "params": list(addition.values)[:PARAMS_SHOWN],
        "params_total": len(addition.values),
    }


@router.get("/models/{m}/param-groups/{index}", summary="Show a param group")
async def show_group(model: ModelHere, index: Index, response: Response) -> dict[str, Any]:
    """One group. Its ETag is also a header."""
    group = model.groups.at(index, model.name)
    tag(response, model, of_group(index))
    return {**_show(model, index, group), "effective_version": model.version + 1}


@router.patch("/models/{m}/param-groups/{index}", summary="Change hyperparameters, freeze a group")
async def patch_group(
    model: EditedModel,
    index: Index,
    response: Response,
    values: Annotated[
        dict[Text, Number | StrictBool],
        Body(examples=[{"lr": 0.5}, {"weight_decay": 0.01, "maximize": False}, {"frozen": True}]),
    ],
    hold: Annotated[
        Flag, Query(description="hold these fields against workers' edits; false lets them go again")
    ] = True,
    dry_run: DryRun = False,
    if_match: IfMatch = None,
) -> Any:
    """All changes are made, or none. Any hyperparameter of the group's rule, and `frozen`.

    Steps leave the parameters of a frozen group and their optimizer state as they are, whatever is pushed. A value with
    which a step of what the group holds would make NaN or infinity is refused. The reply's `effective_version` is the first
    version stepped with the new values.
    """
    edit = _edit(values, hold)
    patched = await Edits(model).try_group(index, edit)
    require_known(if_match, model, of_group(index))
    if dry_run:
        before = _show(model, index, model.groups.at(index, model.name))
        after = _show(model, index, patched)
        return would(before, after, effective_version=model.version + 1)
    group, version = Edits(model).patch_group(index, edit, OPERATOR)
    await model.recorder.until_safe()
    tag(response, model, of_group(index))
    return {**_show(model, index, group), "effective_version": version}


def _edit(values: Mapping[str, float | bool], hold: bool) -> OperatorEdit:
    frozen = values.get("frozen")
    if frozen is not None and not isinstance(frozen, bool):
        raise InvalidHyperparameter(problem=f"frozen must be true or false, not {frozen!r}")
    changed = {name: value for name, value in values.items() if name != "frozen"}
    return OperatorEdit(changed, hold, frozen)
