"""torch's LR schedulers as settings: each has torch's name, its arguments, and the range of each number.

The names and defaults are torch's. Arguments that JSON cannot hold are left out (callables, the optimizer). So are
arguments without a meaning here: momentum, which neither rule has, and `last_epoch`, which a snapshot keeps.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field, model_validator
from torch.optim import Optimizer, lr_scheduler

from ..settings import Settings

# Each scheduler takes time at every step.
MAX_SCHEDULERS: Final = 32
MAX_NESTING: Final = 4
MAX_LIST: Final = 1000
# torch computes powers of whole numbers exactly: without a limit such a power could be of any size.
LARGEST: Final = 1e12

Steps = Annotated[int, Field(ge=0, le=int(LARGEST))]
Period = Annotated[int, Field(ge=1, le=int(LARGEST))]
Number = Annotated[float, Field(ge=0, le=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]
Divisor = Annotated[float, Field(gt=0, le=LARGEST)]
PerGroup = Number | Annotated[list[Number], Field(max_length=MAX_LIST)]
Milestones = Annotated[list[Steps], Field(max_length=MAX_LIST)]


class Scheduler(Settings):
    """Base of all schedulers: a name in `scheduler`, and torch's keyword arguments in `arguments`."""

    def build(self, optimizer: Optimizer) -> Any:
        """Build torch's own object. Raises what torch raises if the arguments contradict each other."""
        return self.kind()(optimizer, **self.keywords(optimizer))

    def kind(self) -> Any:
        """torch's class."""
        return getattr(lr_scheduler, self.name())

    @classmethod
    def name(cls) -> str:
        """torch's name."""
        return str(get_args(cls.model_fields["scheduler"].annotation)[0])

    def keywords(self, optimizer: Optimizer) -> dict[str, Any]:
        """The arguments as torch takes them."""
        arguments: Settings = self.arguments  # type: ignore[attr-defined]
        return {name: getattr(arguments, name) for name in arguments.model_fields_set}


class ConstantLRArguments(Settings):
    """torch.optim.lr_scheduler.ConstantLR."""

    factor: Share = 1 / 3
    total_iters: Steps = 5


class CosineAnnealingLRArguments(Settings):
    """torch.optim.lr_scheduler.CosineAnnealingLR."""

    T_max: Period
    eta_min: Number = 0.0


class CosineAnnealingWarmRestartsArguments(Settings):
    """torch.optim.lr_scheduler.CosineAnnealingWarmRestarts."""

    T_0: Period
    T_mult: Annotated[int, Field(ge=1, le=1000)] = 1
    eta_min: Number = 0.0


class CyclicLRArguments(Settings):
    """torch.optim.lr_scheduler.CyclicLR."""

    base_lr: PerGroup
    max_lr: PerGroup
    step_size_up: Period = 2000
    step_size_down: Period | None = None
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: Number = 1.0
    scale_mode: Literal["cycle", "iterations"] = "cycle"


class ExponentialLRArguments(Settings):
    """torch.optim.lr_scheduler.ExponentialLR."""

    gamma: Number


class LinearLRArguments(Settings):
    """torch.optim.lr_scheduler.LinearLR."""

    start_factor: Annotated[float, Field(gt=0, le=1)] = 1 / 3
    end_factor: Share = 1.0
    total_iters: Period = 5


class MultiStepLRArguments(Settings):
    """torch.optim.lr_scheduler.MultiStepLR."""

    milestones: Milestones
    gamma: Number = 0.1


class OneCycleLRArguments(Settings):
    """torch.optim.lr_scheduler.OneCycleLR."""

    max_lr: PerGroup
    total_steps: Period | None = None
    epochs: Period | None = None
    steps_per_epoch: Period | None = None
    pct_start: Share = 0.3
    anneal_strategy: Literal["cos", "linear"] = "cos"
    div_factor: Divisor = 25.0
    final_div_factor: Divisor = 1e4
    three_phase: bool = False


class PolynomialLRArguments(Settings):
    """torch.optim.lr_scheduler.PolynomialLR."""

    total_iters: Period = 5
    power: Annotated[float, Field(ge=0, le=1000)] = 1.0


class ReduceLROnPlateauArguments(Settings):
    """torch.optim.lr_scheduler.ReduceLROnPlateau."""

    mode: Literal["min", "max"] = "min"
    factor: Annotated[float, Field(ge=0, lt=1)] = 0.1
    patience: Steps = 10
    threshold: Number = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: Steps = 0
    min_lr: PerGroup = 0.0
    eps: Number = 1e-8


class StepLRArguments(Settings):
    """torch.optim.lr_scheduler.StepLR."""

    step_size: Period
    gamma: Number = 0.1


class ConstantLR(Scheduler):
    """lr times `factor` for the first steps."""

    scheduler: Literal["ConstantLR"]
    arguments: ConstantLRArguments = ConstantLRArguments()


class CosineAnnealingLR(Scheduler):
    """Half a cosine from the lr down to `eta_min`, and up again."""

    scheduler: Literal["CosineAnnealingLR"]
    arguments: CosineAnnealingLRArguments


class CosineAnnealingWarmRestarts(Scheduler):
    """Half a cosine down to `eta_min`. The first period has `T_0` steps, the next `T_mult` times as many."""

    scheduler: Literal["CosineAnnealingWarmRestarts"]
    arguments: CosineAnnealingWarmRestartsArguments


class CyclicLR(Scheduler):
    """Between `base_lr` and `max_lr`, up and down."""

    scheduler: Literal["CyclicLR"]
    arguments: CyclicLRArguments

    def keywords(self, optimizer: Optimizer) -> dict[str, Any]:
        """Without momentum: neither rule has one to cycle."""
        return {**super().keywords(optimizer), "cycle_momentum": False}


class ExponentialLR(Scheduler):
    """lr times `gamma` at each step."""

    scheduler: Literal["ExponentialLR"]
    arguments: ExponentialLRArguments


class LinearLR(Scheduler):
    """From lr times `start_factor` to lr times `end_factor` in `total_iters` steps."""

    scheduler: Literal["LinearLR"]
    arguments: LinearLRArguments = LinearLRArguments()


class MultiStepLR(Scheduler):
    """lr times `gamma` at each milestone."""

    scheduler: Literal["MultiStepLR"]
    arguments: MultiStepLRArguments


class OneCycleLR(Scheduler):
    """Up to `max_lr` and down again, once."""

    scheduler: Literal["OneCycleLR"]
    arguments: OneCycleLRArguments

    def keywords(self, optimizer: Optimizer) -> dict[str, Any]:
        """Without momentum: neither rule has one to cycle."""
        return {**super().keywords(optimizer), "cycle_momentum": False}


class PolynomialLR(Scheduler):
    """Down to 0 in `total_iters` steps, by a power."""

    scheduler: Literal["PolynomialLR"]
    arguments: PolynomialLRArguments = PolynomialLRArguments()


class ReduceLROnPlateau(Scheduler):
    """lr times `factor` when the metric has stopped getting better."""

    scheduler: Literal["ReduceLROnPlateau"]
    arguments: ReduceLROnPlateauArguments = ReduceLROnPlateauArguments()


class StepLR(Scheduler):
    """lr times `gamma` after each `step_size` steps."""

    scheduler: Literal["StepLR"]
    arguments: StepLRArguments


class SequentialLR(Scheduler):
    """One scheduler after the other, changed at the milestones."""

    scheduler: Literal["SequentialLR"]
    arguments: SequentialLRArguments

    def keywords(self, optimizer: Optimizer) -> dict[str, Any]:
        """The arguments with torch's schedulers in place of their settings."""
        made = [inner.build(optimizer) for inner in self.arguments.schedulers]
        return {"schedulers": made, "milestones": self.arguments.milestones}


class ChainedScheduler(Scheduler):
    """Every scheduler at each step, one on top of the other."""

    scheduler: Literal["ChainedScheduler"]
    arguments: ChainedSchedulerArguments

    def build(self, optimizer: Optimizer) -> Any:
        """Build torch's own object, which takes the optimizer from its schedulers."""
        return self.kind()([inner.build(optimizer) for inner in self.arguments.schedulers])


Kind = (
    ChainedScheduler
    | ConstantLR
    | CosineAnnealingLR
    | CosineAnnealingWarmRestarts
    | CyclicLR
    | ExponentialLR
    | LinearLR
    | MultiStepLR
    | OneCycleLR
    | PolynomialLR
    | ReduceLROnPlateau
    | SequentialLR
    | StepLR
)
Inner = Annotated[
    list[Annotated[Kind, Field(discriminator="scheduler")]], Field(min_length=1, max_length=MAX_SCHEDULERS)
]


class SequentialLRArguments(Settings):
    """torch.optim.lr_scheduler.SequentialLR."""

    schedulers: Inner
    milestones: Milestones

    @model_validator(mode="after")
    def _check(self) -> SequentialLRArguments:
        check_nesting(self.schedulers)
        return self


class ChainedSchedulerArguments(Settings):
    """torch.optim.lr_scheduler.ChainedScheduler."""

    schedulers: Inner

    @model_validator(mode="after")
    def _check(self) -> ChainedSchedulerArguments:
        check_nesting(self.schedulers)
        return self


def check_nesting(schedulers: list[Any]) -> None:
    """ValueError if there are too many schedulers, or they are nested too deep."""
    count, level = 0, list(schedulers)
    for _ in range(MAX_NESTING):
        count += len(level)
        level = [inner for each in level for inner in getattr(each.arguments, "schedulers", ())]
    if level or count > MAX_SCHEDULERS:
        raise ValueError(f"at most {MAX_SCHEDULERS} schedulers, nested at most {MAX_NESTING} deep")


for _kind in (SequentialLR, ChainedScheduler, SequentialLRArguments, ChainedSchedulerArguments):
    _kind.model_rebuild()
KINDS: Final[dict[str, type[Scheduler]]] = {kind.name(): kind for kind in get_args(Kind)}
