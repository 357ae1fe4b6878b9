"""async: every push is stepped at once, on the current version. Settings say what its staleness leads to.

The staleness s of a push is the number of versions applied since the one that its gradient was computed on. A stale
push is applied as it is, or with its effective lr scaled by 1/(1+s). The gradient is never scaled, since a constant
factor on the gradient cancels in both rules. Above a bound the push is `too_stale`. A bound may differ by param group.
A push that is too stale for one of its groups is refused whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field

from pushstep.proto.types_pb2 import OUTCOME_TOO_STALE
from pushstep.proto.wire.layout import MAX_GROUPS

from ..push import PendingPush
from ..settings import Whole
from ..worker import Worker
from .policy import Move, PolicySettings, Refuse, Single, View


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
        self._incoming: list[PendingPush] = []

    def adopt(self, settings: PolicySettings) -> None:
        """Continue under other settings."""
        if isinstance(settings, AsyncSettings):
            self.settings = settings

    def admits(self, worker: Worker, ahead: int, view: View) -> bool:
        """True: every push may send its body."""
        return True

    def take(self, pending: PendingPush) -> None:
        """Hold it until the review that follows."""
        self._incoming.append(pending)

    def drop(self, pending: PendingPush) -> None:
        """Release it."""
        if pending in self._incoming:
            self._incoming.remove(pending)

    def review(self, view: View) -> list[Move]:
        """The move for the first push that has arrived. Its version counts in the next push's staleness."""
        return [self._move(self._incoming.pop(0), view.version)] if self._incoming else []

    def _move(self, pending: PendingPush, version: int) -> Move:
        stale = version - pending.header.base_version
        settings = self.settings
        is_bound = settings.max_staleness is not None or settings.max_staleness_by_group
        for group in pending.push.groups if pending.push is not None and is_bound else ():
            bound = settings.max_staleness_by_group.get(group, settings.max_staleness)
            if bound is not None and stale > bound:
                note = f"staleness {stale} is above the bound {bound} of group {group}"
                return Refuse(pending, OUTCOME_TOO_STALE, "too_stale", (note,))
        if not settings.scale or stale == 0:
            return Single(pending)
        return Single(pending, 1 / (1 + stale), (f"lr scaled by 1/{1 + stale} for staleness {stale}",))

    def consumed(self, worker: Worker) -> None:
        """Does nothing: no decision depends on it."""

    def deadline_s(self) -> float | None:
        """None: nothing waits."""
        return None

    def close(self, view: View) -> tuple[list[Move], list[PendingPush]]:
        """Hand over the pushes that no review has seen."""
        left, self._incoming = self._incoming, []
        return [], left

    def missing(self, view: View) -> str:
        """The one possible wait: for an earlier push of the same worker."""
        return "an earlier push of this worker comes first"

    def shown(self, view: View) -> Callable[[Worker], dict[str, Any]]:
        """Nothing: there is no state per worker."""
        return lambda _: {}
