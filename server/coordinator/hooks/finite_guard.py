"""The finite guard: sets what becomes of gradients with NaN or infinity, while the hook is installed."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..gate import Nonfinite
from ..settings import Settings
from .hook import Hook, Point


class FiniteGuardSettings(Settings):
    """What replaces the model's `nonfinite` setting."""

    action: Nonfinite = Field(
        Nonfinite.REJECT,
        description="reject: a named error; skip: the push counts and moves nothing; apply: as torch does",
    )


class FiniteGuard(Hook):
    """Overrides the model's `nonfinite` setting. Only the gate makes the decision."""

    name: ClassVar[str] = "finite_guard"
    kind = "guard"
    points: ClassVar[frozenset[Point]] = frozenset({Point.STEP_PRE})
    settings_type: ClassVar[type[Settings]] = FiniteGuardSettings

    def nonfinite(self) -> Nonfinite | None:
        """The action that the operator chose."""
        return self.settings.action if isinstance(self.settings, FiniteGuardSettings) else None
