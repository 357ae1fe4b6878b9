"""The base class of hooks: a name, a kind, the points where it may be installed, settings, and methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from ..admission import Nonfinite
from ..groups import ParamGroups
from ..settings import Settings


class Point(StrEnum):
    """torch's six hook points, under torch's names."""

    STEP_PRE = "step_pre"
    STEP_POST = "step_post"
    STATE_DICT_PRE = "state_dict_pre"
    STATE_DICT_POST = "state_dict_post"
    LOAD_STATE_DICT_PRE = "load_state_dict_pre"
    LOAD_STATE_DICT_POST = "load_state_dict_post"


@dataclass(slots=True)
class StepContext:
    """One step as its hooks see it. Only transforms before the step may write here, and only to `factor`."""

    worker: str
    base_version: int
    # the version that the step makes
    version: int
    staleness: int
    # L2 norm over all parameters of what is stepped, before any factor
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
        # number of steps or events on which it failed; an observer's failure never fails a step
        self.failures = 0

    def install(self, groups: ParamGroups, model: str) -> None:
        """Claim what the hook controls, such as the lr of groups.

        Raises a named error, and claims nothing, if it cannot.
        """

    def remove(self, groups: ParamGroups) -> None:
        """Release what `install` claimed."""

    def step_pre(self, context: StepContext) -> None:
        """Before a step: a transform may change `context.factor`, a guard may raise RejectedByHook."""

    def step_post(self, context: StepContext, groups: ParamGroups) -> None:
        """After a step's ticket was written, so what changes here holds from the next version."""

    def observe(self, event: Mapping[str, Any]) -> str | None:
        """Of an observer: look at an event, in the observers' thread. Returns a line for the log, or None."""
        return None

    def nonfinite(self) -> Nonfinite | None:
        """What the hook wants done with non-finite gradients; None leaves it to the model's setting."""
        return None

    def missing_metric(self) -> str | None:
        """A metric that the hook needs and no push has reported since it was installed; None otherwise."""
        return None

    def state(self) -> dict[str, Any]:
        """The state that a snapshot must hold so that the hook can continue, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any], groups: ParamGroups) -> None:
        """Continue from what `state` returned."""
