"""torch's LR schedulers, by name, one step per applied version.

The scheduler is torch's own object over a stand-in optimizer that has the groups' learning rates and nothing else,
so every number is torch's. While the hook is installed it holds the lr of its groups: worker edits of it are ignored,
and an operator's PATCH is refused with this hook's id. Schedulers made of callables cannot be written as JSON and are
not offered.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, Field, RootModel, create_model
from torch.optim import lr_scheduler

from pushstep.proto.errors import HeldByHook, InvalidHook, InvalidHyperparameter
from pushstep.proto.wire.hyperparameters import Values
from pushstep.proto.wire.layout import MAX_GROUPS

from ..groups import ParamGroups
from ..settings import Settings, Text, Whole
from .hook import Hook, Point, StepContext
from .schedulers import KINDS


class Scheduled(Settings):
    """The fields that every scheduler has beside torch's arguments."""

    groups: list[Whole] | None = Field(
        None, max_length=MAX_GROUPS, description="indices of param groups; all of them if left out"
    )
    metric: Text = Field("loss", description="of ReduceLROnPlateau: the metric, as pushes report it")


if TYPE_CHECKING:
    OneOfThem = Any
else:
    _ALL = [create_model(name, __base__=(kind, Scheduled)) for name, kind in KINDS.items()]
    OneOfThem = Annotated[reduce(or_, _ALL), Field(discriminator="scheduler")]


class LRSchedulerSettings(RootModel[OneOfThem]):
    """A scheduler by its name, with its arguments and the groups that it schedules."""


class _StandIn(torch.optim.Optimizer):
    """The part of an optimizer that schedulers use: groups with an lr, and nothing to step.

    A real optimizer calls torch's own constructor, which imports torch's compiler and takes seconds. This one does not.
    """

    def __init__(self, lrs: Iterable[float]) -> None:
        self.defaults: dict[str, Any] = {}
        self.state: Any = {}
        self.param_groups = [{"params": [], "lr": lr} for lr in lrs]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Does nothing."""


class LRScheduler(Hook):
    """Sets the lr of its groups at every version."""

    name: ClassVar[str] = "lr_scheduler"
    kind = "transform"
    points: ClassVar[frozenset[Point]] = frozenset({Point.STEP_POST})
    settings_type: ClassVar[type[BaseModel]] = LRSchedulerSettings

    def install(self, groups: ParamGroups, model: str) -> None:
        """Build the scheduler from the groups' current lr. Some schedulers change it at once (warm-ups).

        InvalidHook, HeldByHook if another hook schedules one of the groups, or UnknownGroup.
        """
        self._choose(groups, model, len(groups.list))
        try:
            # torch checks some arguments only at the first step, so one step is tried on a scheduler of its own
            self._stand_in, self._scheduler = self._built(groups)
            self._values(groups)
            if self._try_step():
                self._values(groups)
            self._stand_in, self._scheduler = self._built(groups)
            self._heard = False
            self._write(groups)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InvalidHook(problem=f"{self._scheduled.scheduler}: {error}") from error
        self.reclaim(groups)

    def _choose(self, groups: ParamGroups, model: str, count: int) -> None:
        """The groups that it schedules: those of its settings, or the first `count`. Raises what `install` raises."""
        settings = self._scheduled
        self._indices = list(range(count)) if settings.groups is None else list(settings.groups)
        if not self._indices or len(set(self._indices)) != len(self._indices):
            raise InvalidHook(problem="groups must name each param group at most once, and at least one")
        for index in self._indices:
            group = groups.at(index, model)
            if group.scheduled_by is not None:
                raise HeldByHook(field="lr", group=index, hook=group.scheduled_by)

    def remove(self, groups: ParamGroups) -> None:
        """Release the groups. Their lr stays as it is."""
        for index in self._indices:
            groups.list[index].scheduled_by = None

    def reclaim(self, groups: ParamGroups) -> None:
        """Hold the groups again. Their lr has not changed."""
        for index in self._indices:
            groups.list[index].scheduled_by = self.hook_id

    def merged(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Another scheduler takes none of this one's arguments."""
        settings = super().merged(changes)
        if settings["scheduler"] != self._scheduled.scheduler and "arguments" not in changes:
            del settings["arguments"]
        return settings

    def step_post(self, context: StepContext, groups: ParamGroups) -> None:
        """Take one scheduler step."""
        metric = context.metrics.get(self._scheduled.metric)
        self._heard = self._heard or metric is not None
        if self._advance(metric):
            self._write(groups)

    def missing_metric(self) -> str | None:
        """The unreported metric of a ReduceLROnPlateau, which does nothing without it; else None."""
        waits = isinstance(self._scheduler, lr_scheduler.ReduceLROnPlateau) and not self._heard
        return self._scheduled.metric if waits else None

    def _try_step(self) -> bool:
        """Take one step. False if the scheduler is past its last one already."""
        try:
            return self._advance(0.0)
        except ValueError:
            return False

    def _built(self, groups: ParamGroups) -> tuple[torch.optim.Optimizer, Any]:
        stand_in = _StandIn(float(groups.list[index].values["lr"]) for index in self._indices)
        return stand_in, self._scheduled.build(stand_in)

    def _advance(self, metric: float | None) -> bool:
        self._stand_in.step()
        if not isinstance(self._scheduler, lr_scheduler.ReduceLROnPlateau):
            self._scheduler.step()
        elif metric is None:
            return False
        else:
            self._scheduler.step(metric)
        return True

    def state(self) -> dict[str, Any]:
        """torch's state of the scheduler, and the numbers of its groups with the lr that it has set."""
        return {
            "scheduler": _to_json(self._scheduler.state_dict()),
            "groups": [
                {k: v for k, v in group.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
                for group in self._stand_in.param_groups
            ],
        }

    def resume(self, state: Mapping[str, Any], groups: ParamGroups, model: str) -> None:
        """Go on from a snapshot. No step is tried, and no lr written: past its last one a scheduler leaves the lr alone.

        Groups that were added after it was installed are not its own.
        """
        self._choose(groups, model, len(state["groups"]))
        self._heard = False
        self._stand_in, self._scheduler = self._built(groups)
        self._scheduler.load_state_dict(_from_json(state["scheduler"]))
        for group, saved in zip(self._stand_in.param_groups, state["groups"], strict=True):
            group.update(saved)
        self.reclaim(groups)

    @property
    def _scheduled(self) -> Any:
        """The settings: a `schedulers.Scheduler` that is `Scheduled`."""
        if not isinstance(self.settings, LRSchedulerSettings):
            raise TypeError(f"settings are {type(self.settings).__name__}")
        return self.settings.root

    def _write(self, groups: ParamGroups) -> None:
        """Write the scheduler's lr to all of its groups or none. ValueError if a rule refuses one."""
        groups.write(self._values(groups))

    def _values(self, groups: ParamGroups) -> dict[int, Values]:
        """The groups' values with the scheduler's lr. ValueError if a rule refuses one."""
        pairs = list(zip(self._indices, self._stand_in.param_groups, strict=True))
        try:
            return {index: groups.list[index].changed({"lr": float(group["lr"])}) for index, group in pairs}
        except InvalidHyperparameter as error:
            raise ValueError(error.message) from error


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        # pairs, since MultiStepLR keeps a Counter of integers, which JSON would turn into texts
        return {"pairs": [[_to_json(key), _to_json(entry)] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_to_json(entry) for entry in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        pairs = {_from_json(key): _from_json(entry) for key, entry in value["pairs"]}
        return collections.Counter(pairs) if pairs and all(isinstance(key, int) for key in pairs) else pairs
    if isinstance(value, list):
        return [_from_json(entry) for entry in value]
    return value
