"""What else is done to gradients before a step: centralization, and noise."""

from __future__ import annotations

from typing import ClassVar, Final

from pydantic import Field

from pushstep.proto.types_pb2 import GradientNoise, GradientOperation

from ..settings import Settings, Whole
from .hook import Hook, Point, StepContext

LARGEST_STDDEV: Final = 1e12


class GradientCentralization(Hook):
    """Takes the mean of each row from it (Yong et al., 2020): g - g.mean(dim=1.., keepdim=True).

    A row is what torch's first dimension counts: an output of a Linear or Conv layer, a row of an embedding. Parameters of
    fewer than two dimensions stay as they are.
    """

    name: ClassVar[str] = "gradient_centralization"
    kind = "transform"
    points: ClassVar[frozenset[Point]] = frozenset({Point.STEP_PRE})

    def step_pre(self, context: StepContext) -> None:
        """Have it done."""
        context.operations.append(GradientOperation(centralize=True))


class GradientNoiseSettings(Settings):
    """How much noise."""

    eta: float = Field(0.01, ge=0, le=LARGEST_STDDEV, description="variance of the noise at version 0")
    gamma: float = Field(0.55, ge=0, le=10, description="the variance is eta / (1 + version)^gamma")
    seed: Whole = Field(0, description="another seed gives other noise")


class GradientNoiseHook(Hook):
    """Adds normal noise to each element (Neelakantan et al., 2015), of variance eta / (1 + version)^gamma.

    The noise follows from the seed, the version, the parameter and the element's number in it, so a replay adds the same.
    Of a row-sparse gradient only the rows that it names get noise.
    """

    name: ClassVar[str] = "gradient_noise"
    kind = "transform"
    points: ClassVar[frozenset[Point]] = frozenset({Point.STEP_PRE})
    settings_type: ClassVar[type[Settings]] = GradientNoiseSettings
    settings: GradientNoiseSettings

    def step_pre(self, context: StepContext) -> None:
        """Have it done."""
        of = self.settings
        # the version before the step, which is 0 at the first one
        stddev = (of.eta / float(context.version) ** of.gamma) ** 0.5
        noise = GradientNoise(stddev=stddev, seed=of.seed)
        context.operations.append(GradientOperation(noise=noise))
