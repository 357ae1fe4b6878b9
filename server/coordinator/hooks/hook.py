"""The base class of hooks: a name, a kind, the points where it may be installed, settings, and methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from pushstep.proto.types_pb2 import GradientOperation, ParameterAverage

from ..gate import Nonfinite
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
    """One step as its hooks see it. Only transforms may write here, and only to the last three fields.

    What they write goes into the step's ticket, as data: nothing of a hook runs where the step is taken, or replayed.
    """

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
    # done to every gradient after that, in order
    operations: list[GradientOperation] = field(default_factory=list)
    # taken after the step, in order
    averages: list[ParameterAverage] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Place:
    """What an observer may use where it runs."""

    model: str
    # the server's data folder
    data: Path
    # the hosts that webhooks may reach, as HOST or HOST:PORT
    webhook_hosts: Sequence[str] = ()
    # the networks that are not public and that they may reach nevertheless
    webhook_networks: Sequence[str] = ()
    # the folder with their secrets, a file each
    webhook_secrets: Path | None = None


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
        # number of events that it did not get, because it was too far behind
        self.dropped = 0

    def install(self, groups: ParamGroups, model: str) -> None:
        """Claim what the hook controls, such as the lr of groups.

        Raises a named error, and claims nothing, if it cannot.
        """

    def remove(self, groups: ParamGroups) -> None:
        """Release what `install` claimed."""

    def reclaim(self, groups: ParamGroups) -> None:
        """Claim again what `remove` has just released, as it was."""

    def merged(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The settings after some of them are changed, to be validated."""
        return {**self.settings.model_dump(mode="json"), **changes}

    def succeed(self, before: Hook, groups: ParamGroups, model: str) -> None:
        """Take the place of a hook of the same kind and id, which had other settings.

        Raises what `install` raises, and then `before` has everything that it had.
        """
        before.remove(groups)
        try:
            self.install(groups, model)
        except BaseException:
            before.reclaim(groups)
            raise
        self.failures, self.dropped = before.failures, before.dropped

    def step_pre(self, context: StepContext) -> None:
        """Before a step: a transform may change `factor` or add operations, a guard may raise RejectedByHook.

        What multiplies by something known here changes `factor` if there are no operations yet, and is one otherwise.
        """

    def step_post(self, context: StepContext, groups: ParamGroups) -> None:
        """After a step's ticket was written, so what changes here holds from the next version."""

    def averages(self) -> Sequence[int]:
        """The param groups whose parameters' averages the model keeps for this hook."""
        return ()

    def prepare(self, place: Place) -> None:
        """Raise a named error if it could not work there. Only asked when an operator installs or changes it."""

    def open(self, place: Place) -> None:
        """Of an observer: begin, in the observer's thread, before the first event."""

    def close(self) -> None:
        """Of an observer: end, in the observer's thread, after the last event."""

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

    def resume(self, state: Mapping[str, Any], groups: ParamGroups, model: str) -> None:
        """Be installed as it was when `state` returned this. The groups are those of then, and stay as they are."""
        self.install(groups, model)
        self.load_state(state, groups)

    def load_state(self, state: Mapping[str, Any], groups: ParamGroups) -> None:
        """Continue from what `state` returned."""
