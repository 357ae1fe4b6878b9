"""async: every push is stepped at once, on whatever version there is. Its staleness is measured, and has consequences.

The staleness of a push is the number of versions applied since the one that its gradient was computed on. It is
accepted as it is, or scales the effective lr by 1/(1+s), never the gradient (a constant factor on the gradient
cancels in both rules); above a bound the push is `too_stale`. A bound may differ by param group, and a push that is
too stale for one of the groups that it touches is refused whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field

from pushstep.proto.layout import MAX_GROUPS
from pushstep.proto.types_pb2 import Outcome

from .candidate import Candidate
from .policy import Alone, Move, PolicySettings, TurnAway, View
from .settings import Whole
from .worker import Worker


class AsyncSettings(PolicySettings):
    """What becomes of a stale push."""

    policy: Literal["async"] = "async"
    scale: bool = Field(default=False, description="multiply the lr of a push of staleness s by 1/(1+s)")
    max_staleness: Whole | None = Field(
        default=None, description="a push of a larger staleness is not applied (too_stale); null: any is"
    )
    max_staleness_by_group: dict[Whole, Whole] = Field(
        default_factory=dict,
        max_length=MAX_GROUPS,
        description="bounds of single param groups, in place of max_staleness",
    )


class AsyncPolicy:
    """Decides each push on its own."""

    name: ClassVar[str] = "async"
    waits: ClassVar[bool] = False

    def __init__(self, settings: AsyncSettings | None = None) -> None:
        self.settings = settings or AsyncSettings()
        self._arrived: list[Candidate] = []

    def adopt(self, settings: PolicySettings) -> None:
        """Go on under other settings."""
        if isinstance(settings, AsyncSettings):
            self.settings = settings

    def admits(self, worker: Worker, ahead: int, view: View) -> bool:
        """Always."""
        return True

    def take(self, candidate: Candidate) -> None:
        """Until the review that follows."""
        self._arrived.append(candidate)

    def drop(self, candidate: Candidate) -> None:
        """Let go of it."""
        if candidate in self._arrived:
            self._arrived.remove(candidate)

    def review(self, view: View) -> list[Move]:
        """Whatever has arrived, one at a time: each makes a version, which the next one is judged at."""
        return [self._judge(self._arrived.pop(0), view.version)] if self._arrived else []

    def _judge(self, candidate: Candidate, version: int) -> Move:
        stale = version - candidate.header.base_version
        for group in candidate.push.groups if candidate.push is not None else ():
            bound = self.settings.max_staleness_by_group.get(group, self.settings.max_staleness)
            if bound is not None and stale > bound:
                note = f"staleness {stale} is above the bound {bound} of group {group}"
                return TurnAway(candidate, Outcome.OUTCOME_TOO_STALE, "too_stale", (note,))
        if not self.settings.scale or stale == 0:
            return Alone(candidate)
        return Alone(candidate, 1 / (1 + stale), (f"lr scaled by 1/{1 + stale} for staleness {stale}",))

    def consumed(self, worker: Worker) -> None:
        """Nothing depends on it."""

    def deadline_s(self) -> float | None:
        """Nothing waits."""
        return None

    def close(self, view: View) -> tuple[list[Move], list[Candidate]]:
        """Hand over what no review has seen."""
        left, self._arrived = self._arrived, []
        return [], left

    def missing(self, view: View) -> str:
        """Only a push of the same worker's may come before."""
        return "an earlier push of this worker comes first"

    def shown(self, view: View) -> Callable[[Worker], dict[str, Any]]:
        """Nothing of its own."""
        return lambda _: {}
