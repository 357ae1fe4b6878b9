"""torch's LR schedulers, by name, one step per applied version.

The scheduler is torch's own object over a stand-in optimizer that has the groups' learning rates and nothing else,
so every number is torch's. While installed it holds the lr of its groups: worker edits are ignored, an operator's
PATCH is refused naming this hook. Schedulers made of callables cannot be named and are not offered.
"""

from __future__ import annotations

import collections
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final

import torch
from pydantic import Field, field_validator
from torch.optim import lr_scheduler

from pushstep.proto.errors import HeldByHook, InvalidHook, InvalidHyperparameter
from pushstep.proto.layout import MAX_GROUPS

from ..groups import ParamGroups
from ..settings import Settings, Text, Whole
from .hook import Hook, Point, StepContext

SCHEDULERS: Final = (
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LinearLR",
    "MultiStepLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
)
CALLABLE_ARGUMENTS: Final = frozenset({"optimizer", "scale_fn", "lr_lambda"})
MAX_NESTING: Final = 4
# Each takes its part of every step. And whole numbers without end are powers without end: torch computes them exactly.
MAX_SCHEDULERS: Final = 32
MAX_LIST: Final = 1000
LARGEST_NUMBER: Final = 1e12


class LRSchedulerSettings(Settings):
    """Which scheduler, with which of its arguments, over which groups."""

    scheduler: Text = Field(description=f"one of torch.optim.lr_scheduler: {', '.join(SCHEDULERS)}")
    arguments: dict[Text, Any] = Field(
        default_factory=dict,
        description="torch's keyword arguments, numbers up to 1e12; `schedulers` of SequentialLR and ChainedScheduler is a "
        'list of {"scheduler": name, "arguments": {...}}',
    )
    groups: list[Whole] | None = Field(
        None, max_length=MAX_GROUPS, description="indices of param groups; all of them if left out"
    )
    metric: Text = Field("loss", description="of ReduceLROnPlateau: the metric, as pushes report it")

    @field_validator("arguments")
    @classmethod
    def _arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        _check_arguments(arguments)
        return arguments


def _check_arguments(arguments: Any) -> None:
    """ValueError if any number, list or the number of schedulers is beyond its limit."""
    schedulers, level = 0, [arguments]
    for _ in range(2 * MAX_NESTING + 3):  # a list, and a scheduler in it, for each
        below: list[Any] = []
        for value in level:
            if isinstance(value, (int, float)) and not abs(value) <= LARGEST_NUMBER:
                raise ValueError(f"numbers are from -{LARGEST_NUMBER:g} to {LARGEST_NUMBER:g}")
            if isinstance(value, list):
                schedulers += sum(isinstance(entry, dict) for entry in value)
                if len(value) > MAX_LIST or schedulers > MAX_SCHEDULERS:
                    raise ValueError(
                        f"a list has at most {MAX_LIST} entries, and {MAX_SCHEDULERS} schedulers"
                    )
                below += value
            if isinstance(value, dict):
                below += value.values()
        level = below
    if level:
        raise ValueError(f"schedulers are nested more than {MAX_NESTING} deep")


class _StandIn(torch.optim.Optimizer):
    """An optimizer as far as schedulers look at one: groups with an lr, and nothing to step.

    torch's own constructor imports its compiler, for seconds, and a real optimizer has that constructor.
    """

    def __init__(self, lrs: Iterable[float]) -> None:
        self.defaults: dict[str, Any] = {}
        self.state: Any = {}
        self.param_groups = [{"params": [], "lr": lr} for lr in lrs]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


class LRScheduler(Hook):
    """Sets the lr of its groups at every version."""

    name: ClassVar[str] = "lr_scheduler"
    kind = "transform"
    points: ClassVar[frozenset[Point]] = frozenset({Point.STEP_POST})
    settings_type: ClassVar[type[Settings]] = LRSchedulerSettings

    def install(self, groups: ParamGroups, model: str) -> None:
        """Build the scheduler from the groups' lr of now; some change it at once (warm-ups)."""
        settings = self._settings
        self._indices = list(range(len(groups.list))) if settings.groups is None else list(settings.groups)
        if not self._indices or len(set(self._indices)) != len(self._indices):
            raise InvalidHook(problem="groups must name each param group at most once, and at least one")
        for index in self._indices:
            group = groups.at(index, model)
            if group.scheduled_by is not None:
                raise HeldByHook(field="lr", group=index, hook=group.scheduled_by)
        try:
            # torch looks at some arguments at the first step only: one is tried, on a scheduler for that
            self._stand_in, self._scheduler = self._built(groups)
            self._advance(0.0)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise InvalidHook(problem=f"{settings.scheduler}: {error}") from error
        except ValueError:
            pass  # it is past its last step already
        self._stand_in, self._scheduler = self._built(groups)
        self._heard = False
        try:
            self._write(groups)
        except (TypeError, ValueError) as error:
            raise InvalidHook(problem=f"{settings.scheduler}: {error}") from error
        for index in self._indices:
            groups.list[index].scheduled_by = self.hook_id

    def remove(self, groups: ParamGroups) -> None:
        """Leave the lr where it is and let the groups go."""
        for index in self._indices:
            groups.list[index].scheduled_by = None

    def step_post(self, context: StepContext, groups: ParamGroups) -> None:
        """One scheduler step."""
        metric = context.metrics.get(self._settings.metric)
        self._heard = self._heard or metric is not None
        if self._advance(metric):
            self._write(groups)

    def missing_metric(self) -> str | None:
        """Of ReduceLROnPlateau, which does nothing without it."""
        waits = isinstance(self._scheduler, lr_scheduler.ReduceLROnPlateau) and not self._heard
        return self._settings.metric if waits else None

    def _built(self, groups: ParamGroups) -> tuple[torch.optim.Optimizer, Any]:
        stand_in = _StandIn(float(groups.list[index].values["lr"]) for index in self._indices)
        return stand_in, build(self._settings.scheduler, self._settings.arguments, stand_in)

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
        """torch's state of the scheduler, and the lr it has set."""
        return {
            "scheduler": _to_json(self._scheduler.state_dict()),
            "groups": [
                {k: v for k, v in group.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
                for group in self._stand_in.param_groups
            ],
        }

    def load_state(self, state: Mapping[str, Any], groups: ParamGroups) -> None:
        """Go on from a snapshot."""
        self._scheduler.load_state_dict(_from_json(state["scheduler"]))
        for group, saved in zip(self._stand_in.param_groups, state["groups"], strict=True):
            group.update(saved)
        self._write(groups)

    @property
    def _settings(self) -> LRSchedulerSettings:
        if not isinstance(self.settings, LRSchedulerSettings):
            raise TypeError(f"settings are {type(self.settings).__name__}")
        return self.settings

    def _write(self, groups: ParamGroups) -> None:
        """Hand the scheduler's lr to the groups, all or none; ValueError if a rule refuses one."""
        pairs = list(zip(self._indices, self._stand_in.param_groups, strict=True))
        try:
            values = {index: groups.list[index].changed({"lr": float(group["lr"])}) for index, group in pairs}
        except InvalidHyperparameter as error:
            raise ValueError(error.message) from error
        groups.write(values)


def build(name: str, arguments: Mapping[str, Any], optimizer: torch.optim.Optimizer, depth: int = 0) -> Any:
    """A torch scheduler from its name and keyword arguments. InvalidHook, with torch's reason, if there is none."""
    if name not in SCHEDULERS or depth > MAX_NESTING:
        raise InvalidHook(problem=f"no scheduler {name!r} here; known are {', '.join(SCHEDULERS)}")
    kind = getattr(lr_scheduler, name)
    parameters = inspect.signature(kind.__init__).parameters
    known = parameters.keys() - {"self"} - CALLABLE_ARGUMENTS
    unknown = set(arguments) - known
    if unknown:
        raise InvalidHook(
            problem=f"{name} takes {', '.join(sorted(known))}; not {', '.join(sorted(unknown))}"
        )
    # a factor of 7 would be multiplied with itself in whole numbers, to any length
    keywords = {
        key: _as_floats(value) if "float" in str(parameters[key].annotation) else value
        for key, value in arguments.items()
    }
    if name in ("CyclicLR", "OneCycleLR"):
        keywords.setdefault("cycle_momentum", False)  # neither rule has a momentum to cycle
    try:
        if "schedulers" in keywords:
            keywords["schedulers"] = [
                build(entry["scheduler"], entry.get("arguments", {}), optimizer, depth + 1)
                for entry in keywords["schedulers"]
            ]
        if name == "ChainedScheduler":
            return kind(**keywords)
        return kind(optimizer, **keywords)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise InvalidHook(problem=f"{name}: {error}") from error


def _as_floats(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_floats(entry) for entry in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        # MultiStepLR keeps a Counter of integers
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
