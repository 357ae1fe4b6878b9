"""Clipping by global norm: torch.nn.utils.clip_grad_norm_ over all of a push's gradients."""

from __future__ import annotations

import math
from typing import ClassVar, Final

from pydantic import Field

from ..settings import Settings
from .hook import Hook, Point, StepContext

EPSILON: Final = 1e-6  # torch's, in the denominator


class ClipGradNormSettings(Settings):
    """How far to clip."""

    max_norm: float = Field(gt=0, description="the largest L2 norm that a push's gradient may keep")


class ClipGradNorm(Hook):
    """factor = min(1, max_norm / (norm + 1e-6)), torch's formula with a float64 norm taken in a fixed order.

    The factor goes into the step's own pass over the gradient; no second pass is made.
    """

    name: ClassVar[str] = "clip_grad_norm"
    kind = "transform"
    points: ClassVar[frozenset[Point]] = frozenset({Point.STEP_PRE})
    settings_type: ClassVar[type[Settings]] = ClipGradNormSettings

    def step_pre(self, context: StepContext) -> None:
        """Multiply the step's factor by the clip factor. Earlier hooks' factors count towards the norm."""
        if not isinstance(self.settings, ClipGradNormSettings):
            raise TypeError(f"settings are {type(self.settings).__name__}")
        norm = context.gradient_norm * abs(context.factor)
        clip = self.settings.max_norm / (norm + EPSILON)
        # a NaN norm keeps its NaN, as torch's clamp does
        context.factor *= clip if math.isnan(clip) else min(1.0, clip)
