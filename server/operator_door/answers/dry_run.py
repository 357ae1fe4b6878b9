"""Dry runs of edits: what an edit would change. Everything is checked as for the edit, and nothing is done."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import Query
from fastapi.responses import JSONResponse

from ...coordinator.groups import ParamGroups
from ...coordinator.hooks.chain import HookChain
from ...coordinator.policies.policy import PolicySettings
from ...models.model import Model
from ...storage.saved_state import SavedState
from ..queries import Flag

DryRun = Annotated[
    Flag, Query(description="check everything, say what would change, and change nothing; answers with 200")
]
# `responses` of a route whose edit is answered with another status than 200.
DRY_RUN_ANSWER: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "Of a dry run: what would change"}
}


def would(before: Any, after: Any, **facts: Any) -> JSONResponse:
    """The answer to a dry run: what the edit is about, as it is and as it would be; None where there is nothing."""
    return JSONResponse({"dry_run": True, "before": before, "after": after, **facts})


def held(
    timeline: int, version: int, edit: int, groups: ParamGroups, hooks: HookChain, policy: PolicySettings
) -> dict[str, Any]:
    """What a restore replaces, in short."""
    return {
        "timeline": timeline,
        "version": version,
        "edit": edit,
        "param_groups": groups.dump(),
        "hooks": [hook.hook_id for hook in hooks.list],
        "policy": policy.model_dump(mode="json"),
    }


def would_restore(model: Model, state: SavedState) -> JSONResponse:
    """The answer to a dry run of a restore to this state."""
    settings = model.coordinator.policy.settings
    before = held(model.timeline, model.version, model.edit, model.groups, model.hooks, settings)
    after = held(model.timeline + 1, state.copy.version, state.edit, state.groups, state.hooks, state.policy)
    return would(
        before, after, effective_version=state.copy.version, workers_told=model.sessions.live_count()
    )
