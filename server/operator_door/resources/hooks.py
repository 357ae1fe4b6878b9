"""Hooks: the catalogue, and the installed hooks: listed, added, changed, ordered, removed."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from ...coordinator.commits import HOOKS, of_hook
from ...coordinator.hooks.catalogue import CATALOGUE
from ...coordinator.hooks.chain import MAX_HOOKS, HookChain
from ...coordinator.hooks.hook import Hook
from ...coordinator.settings import Text, Whole
from ...models.edits import HookEdits
from ...models.events import OPERATOR
from ..answers.dry_run import DRY_RUN_ANSWER, DryRun, would
from ..answers.etags import IfMatch, require_known, tag
from ..answers.pages import Cursor, cursor_of, key_in
from ..depends import CatalogHere, EditedModel, ModelHere
from ..queries import Index

router = APIRouter(tags=["hooks"])


class NewHook(BaseModel):
    """A hook to install."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Text = Field(description="a name of the catalogue")
    point: Text = Field(description="one of torch's six points, where the hook may be installed")
    settings: dict[str, Any] = Field(default_factory=dict)
    prepend: bool = Field(False, description="before the hooks that are there, as torch's `prepend`")


class HookChange(BaseModel):
    """A change of an installed hook."""

    model_config = ConfigDict(extra="forbid", strict=True)

    settings: dict[str, Any] = Field(
        default_factory=dict, description="those that change; the others stay as they are"
    )
    position: Whole | None = Field(None, description="its place among all hooks, from 0; left out: as it is")


def _show(hook: Hook) -> dict[str, Any]:
    return {
        "id": hook.hook_id,
        "name": hook.name,
        "kind": hook.kind,
        "point": hook.point,
        "settings": hook.settings.model_dump(mode="json"),
        "failures": hook.failures,
        "dropped": hook.dropped,
    }


def _order(chain: HookChain) -> list[str]:
    return [hook.hook_id for hook in chain.list]


@router.get("/hooks", summary="List the hook catalogue")
async def list_catalogue() -> dict[str, Any]:
    """Every hook that can be installed, with its points and the schema of its settings."""
    return {
        "hooks": [
            {
                "name": kind.name,
                "kind": kind.kind,
                "points": sorted(kind.points),
                "description": (kind.__doc__ or "").strip(),
                "settings": kind.settings_type.model_json_schema(),
            }
            for _, kind in sorted(CATALOGUE.items())
        ]
    }


@router.get("/models/{m}/hooks", summary="List the installed hooks")
async def list_hooks(
    model: ModelHere,
    response: Response,
    limit: Annotated[Index, Query(ge=1, le=MAX_HOOKS)] = MAX_HOOKS,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """The installed hooks in order. Those at the same point run from first to last."""
    # the hooks may change their order between two pages: the cursor holds the ids that were shown
    seen = set(key_in(cursor, "hooks", list) or ())
    left = [hook for hook in model.hooks.list if hook.hook_id not in seen]
    shown = left[:limit]
    ids = [*seen, *(hook.hook_id for hook in shown)]
    tag(response, model, HOOKS)
    return {
        "hooks": [_show(hook) for hook in shown],
        "next": cursor_of("hooks", ids) if len(left) > limit else None,
        "dropped_events": model.observers.dropped,
        "effective_version": model.version + 1,
    }


@router.post("/models/{m}/hooks", status_code=201, summary="Install a hook", responses=DRY_RUN_ANSWER)
async def add_hook(
    model: EditedModel,
    catalog: CatalogHere,
    response: Response,
    new: Annotated[
        NewHook,
        Body(examples=[{"name": "clip_grad_norm", "point": "step_pre", "settings": {"max_norm": 1.0}}]),
    ],
    dry_run: DryRun = False,
    if_match: IfMatch = None,
) -> Any:
    """The reply's `effective_version` is the first version that the hook sees. If-Match: the ETag of the list."""
    edits = HookEdits(model, catalog.holding.promised)
    if dry_run:
        planned = edits.planned_add(new.name, new.point, new.settings, new.prepend)
        require_known(if_match, model, HOOKS)
        after = {**_show(planned.hook), "order": _order(planned.chain)}
        return would(None, after, effective_version=planned.effective_version)
    check = partial(require_known, if_match, model, HOOKS)
    edited = await edits.add(new.name, new.point, new.settings, new.prepend, OPERATOR, check)
    await model.recorder.until_safe()
    tag(response, model, of_hook(edited.hook.hook_id))
    return {**_show(edited.hook), "effective_version": edited.effective_version}


@router.get("/models/{m}/hooks/{hook_id}", summary="Show an installed hook")
async def show_hook(model: ModelHere, hook_id: str, response: Response) -> dict[str, Any]:
    """One installed hook, with its state."""
    hook = model.hooks.find(hook_id, model.name)
    tag(response, model, of_hook(hook_id))
    return {**_show(hook), "state": hook.state()}


@router.patch("/models/{m}/hooks/{hook_id}", summary="Change a hook's settings or its place")
async def change_hook(
    model: EditedModel,
    catalog: CatalogHere,
    hook_id: str,
    response: Response,
    change: Annotated[HookChange, Body(examples=[{"settings": {"max_norm": 0.5}}, {"position": 0}])],
    dry_run: DryRun = False,
    if_match: IfMatch = None,
) -> Any:
    """All changes are made, or none. A setting that is left out stays as it is.

    What a hook has gathered goes on where its settings allow it, as an average does; a scheduler begins anew from the
    present learning rates.
    """
    edits = HookEdits(model, catalog.holding.promised)
    planned = edits.planned_change(hook_id, change.settings, change.position)
    require_known(if_match, model, of_hook(hook_id))
    if dry_run:
        before = {**_show(model.hooks.find(hook_id, model.name)), "order": _order(model.hooks)}
        after = {**_show(planned.hook), "order": _order(planned.chain)}
        return would(before, after, effective_version=planned.effective_version)
    edited = edits.change(hook_id, change.settings, change.position, OPERATOR)
    await model.recorder.until_safe()
    tag(response, model, of_hook(hook_id))
    return {
        **_show(edited.hook),
        "order": _order(edited.chain),
        "effective_version": edited.effective_version,
    }


@router.delete("/models/{m}/hooks/{hook_id}", summary="Remove a hook")
async def remove_hook(
    model: EditedModel,
    catalog: CatalogHere,
    hook_id: str,
    dry_run: DryRun = False,
    if_match: IfMatch = None,
) -> Any:
    """The reply's `effective_version` is the first version without the hook."""
    hook = model.hooks.find(hook_id, model.name)
    require_known(if_match, model, of_hook(hook_id))
    if dry_run:
        return would(_show(hook), None, effective_version=model.version + 1)
    edited = HookEdits(model, catalog.holding.promised).remove(hook_id, OPERATOR)
    await model.recorder.until_safe()
    return {"id": hook_id, "effective_version": edited.effective_version}
