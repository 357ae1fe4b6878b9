"""The policy and the gate of a model: when a push is applied, and which pushes are let in."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Response

from ...coordinator import gate as gates
from ...coordinator.commits import GATE, POLICY
from ...coordinator.policies import catalogue as policies
from ...models.edits import Edits
from ...models.events import OPERATOR
from ...models.model import Model
from ..answers.dry_run import DryRun, would
from ..answers.etags import IfMatch, require_known, tag
from ..depends import EditedModel, ModelHere

router = APIRouter(tags=["policy"])


def _policy(model: Model) -> dict[str, Any]:
    return model.coordinator.policy.settings.model_dump(mode="json")


def _gate(model: Model) -> dict[str, Any]:
    gate = model.coordinator.gate
    limit = gate.limit()
    return {**gate.settings.model_dump(mode="json"), "norms_seen": gate.seen, "norm_limit": limit}


@router.get("/models/{m}/policy", summary="Show when pushes are applied")
async def show_policy(model: ModelHere, response: Response) -> dict[str, Any]:
    """The policy in force, with all its settings."""
    tag(response, model, POLICY)
    return {**_policy(model), "effective_version": model.version + 1}


@router.patch("/models/{m}/policy", summary="Change when pushes are applied")
async def change_policy(
    model: EditedModel,
    response: Response,
    settings: Annotated[
        dict[str, Any],
        Body(
            examples=[
                {"policy": "async", "scale": True, "max_staleness": 8},
                {"policy": "bounded", "bound": 3},
                {"policy": "sync", "reduce": "mean", "min_workers": 4, "quorum": 3, "late": "carry"},
            ]
        ),
    ],
    dry_run: DryRun = False,
    if_match: IfMatch = None,
) -> Any:
    """A setting that is left out stays as it is, or gets its default if the policy is another one.

    No push is lost. An open round closes: at its quorum with a step, otherwise its pushes are decided by the new
    policy.
    """
    wanted = policies.read(settings, model.coordinator.policy.settings)
    model.require_gradients_fit(wanted, model.sessions.live_count())
    require_known(if_match, model, POLICY)
    if dry_run:
        after = wanted.model_dump(mode="json")
        return would(_policy(model), after, effective_version=model.version + 1)
    version = Edits(model).set_policy(wanted, OPERATOR)
    await model.recorder.until_safe()
    tag(response, model, POLICY)
    return {**_policy(model), "effective_version": version}


@router.get("/models/{m}/gate", summary="Show which pushes are let in")
async def show_gate(model: ModelHere, response: Response) -> dict[str, Any]:
    """The gate's settings, how many norms it has seen, and the largest norm that it lets in (null: any)."""
    tag(response, model, GATE)
    return {**_gate(model), "effective_version": model.version + 1}


@router.patch("/models/{m}/gate", summary="Change which pushes are let in")
async def change_gate(
    model: EditedModel,
    response: Response,
    settings: Annotated[
        dict[str, Any], Body(examples=[{"norm_outlier": 6.0}, {"nonfinite": "skip", "quarantine_after": 5}])
    ],
    dry_run: DryRun = False,
    if_match: IfMatch = None,
) -> Any:
    """A setting that is left out stays as it is."""
    wanted = gates.read(settings, model.coordinator.gate.settings)
    require_known(if_match, model, GATE)
    if dry_run:
        before = _gate(model)
        after = {**before, **wanted.model_dump(mode="json")}
        return would(before, after, effective_version=model.version + 1)
    version = Edits(model).set_gate(wanted, OPERATOR)
    await model.recorder.until_safe()
    tag(response, model, GATE)
    return {**_gate(model), "effective_version": version}
