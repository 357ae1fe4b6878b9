"""What every hook is: a name, a kind, the points where it may be installed, settings, and what it does there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel

from ..settings import Settings

if TYPE_CHECKING:
    from ..gate import Nonfinite
    from ..groups import ParamGroups


class Point(StrEnum):
    """torch's six hook points, in torch's words."""

    STEP_PRE = "step_pre"
    STEP_POST = "step_post"
    STATE_DICT_PRE = "state_dict_pre"
    STATE_DICT_POST = "state_dict_post"
    LOAD_STATE_DICT_PRE = "load_state_dict_pre"
    LOAD_STATE_DICT_POST = "load_state_dict_post"


@dataclass(slots=True)
class StepContext:
    """One step as its hooks see it. Only transforms before the step write here, and only `factor`."""

    worker: str
    base_version: int
    # the version that the step makes
    version: int
    staleness: int
    # L2 norm over all parameters of the gradient as it came
    gradient_norm: float
    metrics: Mapping[str, float]
    # multiplies every gradient before anything else
    factor: float = 1.0


class Hook:
    """Base of every hook. `settings` has been validated; `hook_id` names it over REST."""

    name: ClassVar[str]
    kind: ClassVar[Literal["transform", "guard", "observer"]]
    points: ClassVar[frozenset[Point]]
    settings_type: ClassVar[type[BaseModel]] = Settings

    def __init__(self, hook_id: str, point: Point, settings: BaseModel) -> None:
        self.hook_id = hook_id
        self.point = point
        self.settings = settings
        # pushes or events on which an observer failed; it never fails a step
        self.failures = 0

    def install(self, groups: ParamGroups, model: str) -> None:
        """Take hold of what the hook holds. A named error, and nothing held, if it cannot."""

    def remove(self, groups: ParamGroups) -> None:
        """Let go of it."""

    def step_pre(self, context: StepContext) -> None:
        """Before a step: a transform may change `context.factor`, a guard may raise RejectedByHook."""

    def step_post(self, context: StepContext, groups: ParamGroups) -> None:
        """After a step's ticket was written, so what changes here holds from the next version."""

    def observe(self, event: Mapping[str, Any]) -> None:
        """Of an observer, at its point; in a thread of the observers' own."""

    def nonfinite(self) -> Nonfinite | None:
        """What the hook wants done with non-finite gradients, if that is its business."""
        return None

    def missing_metric(self) -> str | None:
        """A metric that it has waited for since it was installed, and no push has reported."""
        return None

    def state(self) -> dict[str, Any]:
        """What a snapshot must hold for the hook to go on where it was, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any], groups: ParamGroups) -> None:
        """Go on from what `state` returned."""
