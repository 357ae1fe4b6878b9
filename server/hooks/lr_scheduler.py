"""torch's LR schedulers, by name, one step per applied version.

The scheduler is torch's own object over a stand-in optimizer that has the groups' learning rates and nothing else,
so every number is torch's. While installed it holds the lr of its groups: worker edits are ignored, an operator's
PATCH is refused naming this hook. Schedulers made of callables cannot be named and are not offered.
"""

from __future__ import annotations

import collections
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import torch
from pydantic import Field
from torch.optim import lr_scheduler

from pushstep.proto.errors import HeldByHook, InvalidHook, InvalidHyperparameter

from ..groups import ParamGroups
from .hook import Hook, Point, Settings, StepContext

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


class LRSchedulerSettings(Settings):
    """Which scheduler, with which of its arguments, over which groups."""

    scheduler: str = Field(description=f"one of torch.optim.lr_scheduler: {', '.join(SCHEDULERS)}")
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="torch's keyword arguments; `schedulers` of SequentialLR and ChainedScheduler is a list of "
        '{"scheduler": name, "arguments": {...}}',
    )
    groups: list[int] | None = Field(None, description="indices of param groups; all of them if left out")
    metric: str = Field("loss", description="of ReduceLROnPlateau: the metric, as pushes report it")


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
        stand_in = torch.optim.SGD(
            [{"params": [torch.zeros(())], "lr": groups.list[i].values["lr"]} for i in self._indices], lr=0.0
        )
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
    known = set(inspect.signature(kind.__init__).parameters) - {"self"} - CALLABLE_ARGUMENTS
    unknown = set(arguments) - known
    if unknown:
        raise InvalidHook(
            problem=f"{name} takes {', '.join(sorted(known))}; not {', '.join(sorted(unknown))}"
        )
    keywords = dict(arguments)
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
