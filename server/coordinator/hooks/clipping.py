"""Clipping, in torch's terms and in Keras's: by the norm over all gradients, by each parameter's norm, by value.

A clip by the norm over all gradients needs no pass of its own, as long as nothing before it has changed single elements: the
gate knows the norm, and the factor goes into the step.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from pushstep.optim.ops.norms import keras_global_factor, torch_factor
from pushstep.proto.types_pb2 import ClipByNorm, GradientOperation

from ..gate import Nonfinite
from ..groups import LARGEST
from ..settings import Settings
from .hook import Hook, Point, StepContext

# Beyond these a float64 holds neither the powers nor their root; "inf" is another matter.
SMALLEST_NORM_TYPE: Final = 0.01
LARGEST_NORM_TYPE: Final = 1000.0


class Clipping(Hook):
    """Base of the four."""

    kind = "transform"
    points: ClassVar[frozenset[Point]] = frozenset({Point.STEP_PRE})


class ByGlobalNorm(Clipping):
    """Base of those that multiply all gradients by one factor."""

    @abstractmethod
    def factor(self, norm: float) -> float:
        """The factor at a norm."""

    @abstractmethod
    def operation(self) -> GradientOperation:
        """The same, where the norm is not known yet."""

    def step_pre(self, context: StepContext) -> None:
        """Multiply the step's factor by the clip factor. What earlier hooks have done counts towards the norm."""
        if context.operations:
            context.operations.append(self.operation())
        else:
            context.factor *= self.factor(context.gradient_norm * abs(context.factor))


class ClipGradNormSettings(Settings):
    """How far to clip."""

    max_norm: float = Field(gt=0, description="the largest norm that a push's gradient may keep")
    norm_type: Annotated[float, Field(ge=SMALLEST_NORM_TYPE, le=LARGEST_NORM_TYPE)] | Literal["inf"] = Field(
        2.0, description='the power of the norm; "inf": the largest magnitude'
    )
    error_if_nonfinite: bool = Field(
        False,
        description="reject pushes whose gradients are not finite, whatever the model's `nonfinite` says",
    )


class ClipGradNorm(ByGlobalNorm):
    """torch.nn.utils.clip_grad_norm_: all gradients times min(1, max_norm / (norm + 1e-6)), by the norm over all of them.

    The norm is a float64 one, taken in a fixed order.
    """

    name: ClassVar[str] = "clip_grad_norm"
    settings_type: ClassVar[type[Settings]] = ClipGradNormSettings
    settings: ClipGradNormSettings

    def factor(self, norm: float) -> float:
        """torch's formula."""
        return torch_factor(norm, self.settings.max_norm)

    def operation(self) -> GradientOperation:
        """The same."""
        settings = self.settings
        if settings.norm_type == 2:
            return GradientOperation(clip_grad_norm=settings.max_norm)
        norm = ClipByNorm(max_norm=settings.max_norm, norm_type=float(settings.norm_type))
        return GradientOperation(clip_by_norm=norm)

    def step_pre(self, context: StepContext) -> None:
        """The L2 norm is known; another one is taken where the step is."""
        if self.settings.norm_type == 2:
            super().step_pre(context)
        else:
            context.operations.append(self.operation())

    def nonfinite(self) -> Nonfinite | None:
        """As torch raises, the gate rejects."""
        return Nonfinite.REJECT if self.settings.error_if_nonfinite else None


class GlobalClipnormSettings(Settings):
    """How far to clip."""

    global_clipnorm: float = Field(
        gt=0, description="the largest L2 norm that all gradients together may keep"
    )


class GlobalClipnorm(ByGlobalNorm):
    """Keras's global_clipnorm: all gradients times c / max(norm, c), by the norm over all of them. NaN if that is not finite."""

    name: ClassVar[str] = "global_clipnorm"
    settings_type: ClassVar[type[Settings]] = GlobalClipnormSettings
    settings: GlobalClipnormSettings

    def factor(self, norm: float) -> float:
        """Keras's formula."""
        return keras_global_factor(norm, self.settings.global_clipnorm)

    def operation(self) -> GradientOperation:
        """The same."""
        return GradientOperation(global_clipnorm=self.settings.global_clipnorm)


class ClipnormSettings(Settings):
    """How far to clip."""

    clipnorm: float = Field(gt=0, description="the largest L2 norm that each parameter's gradient may keep")


class Clipnorm(Clipping):
    """Keras's clipnorm: each parameter's gradient times c / max(norm, c), by its own norm.

    Of a row-sparse gradient the norm is over its rows, duplicates summed.
    """

    name: ClassVar[str] = "clipnorm"
    settings_type: ClassVar[type[Settings]] = ClipnormSettings
    settings: ClipnormSettings

    def step_pre(self, context: StepContext) -> None:
        """Have it done."""
        context.operations.append(GradientOperation(clipnorm=self.settings.clipnorm))


class ClipGradValueSettings(Settings):
    """How far to clip."""

    clip_value: float = Field(gt=0, le=LARGEST, description="the largest magnitude that an element may keep")


class ClipGradValue(Clipping):
    """torch.nn.utils.clip_grad_value_, and Keras's clipvalue: each element is brought between -clip_value and clip_value."""

    name: ClassVar[str] = "clip_grad_value"
    settings_type: ClassVar[type[Settings]] = ClipGradValueSettings
    settings: ClipGradValueSettings

    def step_pre(self, context: StepContext) -> None:
        """Have it done."""
        context.operations.append(GradientOperation(clip_value=self.settings.clip_value))
