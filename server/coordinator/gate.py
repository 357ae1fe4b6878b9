"""The gate of one model: decides about non-finite values and outlying norms; sets the quarantine limit.

The running estimate of a model's gradient norms has two exponentially weighted means: of the norms' logarithms, and of
their distance from the first mean. Only pushes that were let in feed it, so one wild gradient cannot raise the limit for
the next. No push is an outlier before `norm_warmup` pushes were let in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from pydantic import Field

from pushstep.proto.errors import NonfiniteGradient, NormOutlier

from ..staging.gradient import StagedPush
from .settings import Positive, Settings
from .settings import read as read_settings

# Weight of the newest push. With 0.05 the estimate follows falling norms, and a push has hardly any weight after 100 more.
WEIGHT: Final = 0.05
# Lower limit of a deviation, in ln. Without it, where norms hardly vary, the first one that differs is an outlier.
LEAST_DEVIATION: Final = 0.1


class Nonfinite(StrEnum):
    """What becomes of a gradient with NaN or infinity."""

    REJECT = "reject"
    SKIP = "skip"
    APPLY = "apply"


class GateSettings(Settings):
    """A model's gate."""

    nonfinite: Nonfinite = Field(
        default=Nonfinite.REJECT,
        description="of a gradient with NaN or infinity: reject it with an error that names the parameter, skip it (the push counts "
        "and no parameter moves), or apply it as torch does; a finite_guard hook overrides this",
    )
    norm_outlier: float | None = Field(
        default=None,
        gt=0,
        description="reject a gradient whose log-norm is this many deviations above the running mean; null: never",
    )
    norm_warmup: Positive = Field(
        default=50, description="accepted pushes before anything is called an outlier"
    )
    quarantine_after: Positive | None = Field(
        default=20,
        description="refused pushes of one worker in a row before it is quarantined; null: never",
    )


def read(changes: Mapping[str, Any], current: GateSettings) -> GateSettings:
    """Return `current` with `changes` applied. InvalidSettings if the result is not valid."""
    return read_settings(GateSettings, {**current.model_dump(mode="json"), **changes}, "gate")


class Gate:
    """One model's gate: its settings, and the running estimate of the norms that it let in."""

    def __init__(self, settings: GateSettings | None = None) -> None:
        self.settings = settings or GateSettings()
        self.seen = 0
        self._mean = 0.0
        self._deviation = 0.0

    def decide(self, push: StagedPush, wish: Nonfinite | None) -> bool:
        """True to go on to the policy, False to skip; NonfiniteGradient or NormOutlier to reject.

        `wish`: a hook's choice, which overrides the `nonfinite` setting.
        """
        if not decide(push, self.nonfinite(wish)):
            return False
        norm = push.norm
        limit = self.limit()
        if limit is not None and norm > limit:
            usual = math.exp(self._mean)
            raise NormOutlier(norm=f"{norm:.6g}", usual=f"{usual:.6g}", limit=f"{limit:.6g}")
        self._learn(norm)
        return True

    def nonfinite(self, wish: Nonfinite | None) -> Nonfinite:
        """What becomes of a non-finite gradient: `wish`, or else the setting."""
        return wish or self.settings.nonfinite

    def limit(self) -> float | None:
        """The largest norm that is let in now; None without a limit."""
        if self.settings.norm_outlier is None or self.seen < self.settings.norm_warmup:
            return None
        exponent = self._mean + self.settings.norm_outlier * max(self._deviation, LEAST_DEVIATION)
        return math.exp(min(exponent, 700.0))  # a larger exponent overflows a float64

    def _learn(self, norm: float) -> None:
        if not 0 < norm < math.inf:
            return
        self.seen += 1
        weight = max(WEIGHT, 1 / self.seen)  # a plain mean over the first 20 norms
        distance = math.log(norm) - self._mean if self.seen > 1 else 0.0
        self._mean = math.log(norm) if self.seen == 1 else self._mean + weight * distance
        self._deviation += weight * (abs(distance) - self._deviation)

    def dump(self) -> dict[str, Any]:
        """Settings and estimate as JSON."""
        estimate = {"seen": self.seen, "mean": self._mean, "deviation": self._deviation}
        return {**self.settings.model_dump(mode="json"), "norms": estimate}

    @classmethod
    def parsed(cls, dumped: Mapping[str, Any]) -> Gate:
        """The gate that `dump` wrote."""
        settings = dict(dumped)
        norms = settings.pop("norms")
        gate = cls(read(settings, GateSettings()))
        gate.seen, gate._mean, gate._deviation = norms["seen"], norms["mean"], norms["deviation"]
        return gate


def decide(push: StagedPush, nonfinite: Nonfinite) -> bool:
    """True to apply, False to skip; NonfiniteGradient to reject."""
    if push.nonfinite_parameter is None or nonfinite is Nonfinite.APPLY:
        return True
    if nonfinite is Nonfinite.SKIP:
        return False
    raise NonfiniteGradient(parameter=push.nonfinite_parameter)
