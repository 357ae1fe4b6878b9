"""An exponential moving average of the parameters: Keras's use_ema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from pushstep.proto.errors import InvalidHook
from pushstep.proto.types_pb2 import ParameterAverage
from pushstep.proto.wire.layout import MAX_GROUPS

from ..groups import ParamGroups
from ..settings import Positive, Settings, Whole
from .hook import Hook, Point, StepContext


class EMASettings(Settings):
    """How the averages move."""

    momentum: float = Field(
        0.99, ge=0, le=1, description="Keras's ema_momentum: how much of an average stays"
    )
    overwrite_frequency: Positive | None = Field(
        None,
        description="Keras's ema_overwrite_frequency: after so many steps the averages replace the parameters",
    )
    groups: list[Whole] | None = Field(
        None, max_length=MAX_GROUPS, description="indices of param groups; all that there are if left out"
    )


class EMA(Hook):
    """average = momentum * average + (1 - momentum) * parameter, after each step, of every parameter of its groups.

    The first step makes the average equal to the parameter. Averages are float32 (float64 of float64 parameters), count in
    --max-bytes, lie in snapshots, and are downloaded with `GET .../export?average=<id of the hook>`.
    """

    name: ClassVar[str] = "ema"
    kind = "transform"
    points: ClassVar[frozenset[Point]] = frozenset({Point.STEP_POST})
    settings_type: ClassVar[type[Settings]] = EMASettings
    settings: EMASettings

    def __init__(self, hook_id: str, point: Point, settings: EMASettings) -> None:
        super().__init__(hook_id, point, settings)
        self._groups: list[int] = []
        self._steps = 0

    def install(self, groups: ParamGroups, model: str) -> None:
        """Fix the groups. InvalidHook, UnknownGroup."""
        wanted = self.settings.groups
        found = list(range(len(groups.list))) if wanted is None else sorted(wanted)
        if not found or len(set(found)) != len(found):
            raise InvalidHook(problem="groups must name each param group at most once, and at least one")
        for index in found:
            groups.at(index, model)
        self._groups = found

    def succeed(self, before: Hook, groups: ParamGroups, model: str) -> None:
        """Keep the averages. InvalidHook for other groups."""
        if not isinstance(before, EMA) or self.settings.groups != before.settings.groups:
            raise InvalidHook(problem="the groups of averages are fixed: install another ema hook for others")
        super().succeed(before, groups, model)
        self._groups, self._steps = before._groups, before._steps

    def averages(self) -> Sequence[int]:
        """The groups that it averages."""
        return self._groups

    def step_post(self, context: StepContext, groups: ParamGroups) -> None:
        """Have the averages moved."""
        every = self.settings.overwrite_frequency
        move = ParameterAverage(
            hook=self.hook_id,
            momentum=self.settings.momentum if self._steps else 0.0,
            overwrite=every is not None and (self._steps + 1) % every == 0,
            groups=self._groups,
        )
        self._steps += 1
        context.averages.append(move)

    def state(self) -> dict[str, Any]:
        """How many steps it has averaged, and the groups."""
        return {"steps": self._steps, "groups": list(self._groups)}

    def load_state(self, state: Mapping[str, Any], groups: ParamGroups) -> None:
        """Continue from a snapshot."""
        self._steps = int(state["steps"])
        self._groups = [int(index) for index in state["groups"]]
