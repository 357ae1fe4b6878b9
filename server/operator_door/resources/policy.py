"""The policy and the gate of a model: when a push is applied, and which pushes are let in."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body

from ...coordinator import admission as admission
from ...coordinator.policies import catalogue as policies
from ...models.edits import Edits
from ...models.model import Model
from ..depends import OPERATOR, ModelHere

router = APIRouter(tags=["policy"])


def _policy(model: Model) -> dict[str, Any]:
    return model.coordinator.policy.settings.model_dump(mode="json")


def _gate(model: Model) -> dict[str, Any]:
    gate = model.coordinator.admission
    limit = gate.limit()
    return {**gate.settings.model_dump(mode="json"), "norms_seen": gate.seen, "norm_limit": limit}


@router.get("/models/{m}/policy", summary="Show when pushes are applied")
async def show_policy(model: ModelHere) -> dict[str, Any]:
    """The policy in force, with all its settings."""
    return {**_policy(model), "effective_version": model.version + 1}


@router.patch("/models/{m}/policy", summary="Change when pushes are applied")
async def change_policy(
    model: ModelHere,
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
) -> dict[str, Any]:
    """A setting that is left out stays as it is, or gets its default if the policy is another one.

    No push is lost. An open round closes: at its quorum with a step, otherwise its pushes are decided by the new
    policy.
    """
    version = Edits(model).set_policy(policies.read(settings, model.coordinator.policy.settings), OPERATOR)
    await model.recorder.until_safe()
    return {**_policy(model), "effective_version": version}


@router.get("/models/{m}/gate", summary="Show which pushes are let in")
async def show_gate(model: ModelHere) -> dict[str, Any]:
    """The gate's settings, how many norms it has seen, and the largest norm that it lets in (null: any)."""
    return {**_gate(model), "effective_version": model.version + 1}


@router.patch("/models/{m}/gate", summary="Change which pushes are let in")
async def change_gate(
    model: ModelHere,
    settings: Annotated[
        dict[str, Any], Body(examples=[{"norm_outlier": 6.0}, {"nonfinite": "skip", "quarantine_after": 5}])
    ],
) -> dict[str, Any]:
    """A setting that is left out stays as it is."""
    version = Edits(model).set_gate(admission.read(settings, model.coordinator.admission.settings), OPERATOR)
    await model.recorder.until_safe()
    return {**_gate(model), "effective_version": version}
