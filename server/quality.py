"""What the gate lets through to the policy, as one model is set: non-finite values, outlying norms, and quarantine.

The running estimate of a model's gradient norms is an exponentially weighted mean of their logarithms and of the
distance from it. Only pushes that were let in feed it, so one wild gradient cannot make room for the next. Below
`norm_warmup` pushes nothing is called an outlier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from pydantic import Field

from pushstep.proto.errors import NormOutlier

from . import gate
from .gate import Nonfinite
from .settings import Positive, Settings
from .settings import read as read_settings
from .staging import StagedPush

# A push in twenty: the estimate follows a training whose norms fall, and forgets within a hundred pushes.
WEIGHT: Final = 0.05
# Norms that hardly vary would make an outlier of the first that does: less than this in ln is never one deviation.
LEAST_DEVIATION: Final = 0.1


class QualitySettings(Settings):
    """A model's gate."""

    nonfinite: Nonfinite = Field(
        default=Nonfinite.REJECT,
        description="of a gradient with NaN or infinity: reject it by name, skip it (it counts and moves nothing), or "
        "apply it as torch does; a finite_guard hook overrides this",
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


def read(changes: Mapping[str, Any], current: QualitySettings) -> QualitySettings:
    """`current` with changes. InvalidSettings if they cannot be."""
    return read_settings(QualitySettings, {**current.model_dump(mode="json"), **changes}, "gate")


class Quality:
    """One model's gate: settings, and what it has seen of norms."""

    def __init__(self, settings: QualitySettings | None = None) -> None:
        self.settings = settings or QualitySettings()
        self.seen = 0
        self._mean = 0.0
        self._deviation = 0.0

    def decide(self, push: StagedPush, wish: Nonfinite | None) -> bool:
        """True to go on, False to skip; a named error to reject. `wish`: a hook's, before the setting."""
        if not gate.decide(push, self.nonfinite(wish)):
            return False
        norm = push.norm
        limit = self.limit()
        if limit is not None and norm > limit:
            usual = math.exp(self._mean)
            raise NormOutlier(norm=f"{norm:.6g}", usual=f"{usual:.6g}", limit=f"{limit:.6g}")
        self._learn(norm)
        return True

    def nonfinite(self, wish: Nonfinite | None) -> Nonfinite:
        """What becomes of a non-finite gradient."""
        return wish or self.settings.nonfinite

    def limit(self) -> float | None:
        """The largest norm let in now; None while any is."""
        if self.settings.norm_outlier is None or self.seen < self.settings.norm_warmup:
            return None
        exponent = self._mean + self.settings.norm_outlier * max(self._deviation, LEAST_DEVIATION)
        return math.exp(min(exponent, 700.0))  # beyond it a float64 overflows

    def _learn(self, norm: float) -> None:
        if not 0 < norm < math.inf:
            return
        self.seen += 1
        weight = max(WEIGHT, 1 / self.seen)  # a plain mean, until there is enough to forget
        distance = math.log(norm) - self._mean if self.seen > 1 else 0.0
        self._mean = math.log(norm) if self.seen == 1 else self._mean + weight * distance
        self._deviation += weight * (abs(distance) - self._deviation)

    def dump(self) -> dict[str, Any]:
        """Settings and estimate as JSON."""
        estimate = {"seen": self.seen, "mean": self._mean, "deviation": self._deviation}
        return {**self.settings.model_dump(mode="json"), "norms": estimate}

    @classmethod
    def parsed(cls, dumped: Mapping[str, Any]) -> Quality:
        """The gate that `dump` wrote."""
        settings = dict(dumped)
        norms = settings.pop("norms")
        gate = cls(read(settings, QualitySettings()))
        gate.seen, gate._mean, gate._deviation = norms["seen"], norms["mean"], norms["deviation"]
        return gate
