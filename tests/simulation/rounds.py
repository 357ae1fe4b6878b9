"""When a round may close, and what it is from there on until it has its version."""

from __future__ import annotations

from collections.abc import Iterable

from pushstep.server.coordinator.decision import Reduce, Resolve
from pushstep.server.coordinator.policies.policy import Policy
from pushstep.server.coordinator.policies.synchronous import SyncSettings
from pushstep.server.coordinator.push import PendingPush
from pushstep.server.coordinator.worker import Worker


class Awaited:
    """Who has been there for how long, and since when a push waits for a round to close.

    A round opens with the first such push, or later. So whoever was there before it is expected in that round.
    """

    def __init__(self) -> None:
        self._there_since_s: dict[tuple[str, int], float] = {}
        self._waits_since_s: float | None = None

    def note(self, members: Iterable[Worker], now_s: float, *, waits: bool) -> None:
        """Something has happened. `waits`: a push waits that is in no closed round."""
        known = self._there_since_s
        present = [(worker.name, worker.epoch) for worker in members]
        self._there_since_s = {who: known.get(who, now_s) for who in present}
        if not waits:
            self._waits_since_s = None
        elif self._waits_since_s is None:
            self._waits_since_s = now_s

    def close(
        self, settings: SyncSettings, handed_in: set[str], members: Iterable[Worker], now_s: float
    ) -> list[str]:
        """A round of these workers is closed. Returns for whom it should have waited."""
        since_s = now_s if self._waits_since_s is None else self._waits_since_s
        self._waits_since_s = None
        if settings.quorum is not None and len(handed_in) >= settings.quorum:
            return []
        if settings.timeout_s is not None and now_s >= since_s + settings.timeout_s:
            return []
        there_since_s = self._there_since_s
        return [
            worker.name
            for worker in members
            if worker.name not in handed_in
            and there_since_s.get((worker.name, worker.epoch), now_s) < since_s
        ]


class ClosedRound:
    """A round that has no version yet. It stays what it was closed as, whatever an operator has changed since."""

    def __init__(self, policy: Policy, reduce: Reduce) -> None:
        self.policy = policy
        self.mean = reduce.mean
        self.pushes, self.skips = list(reduce.pushes), list(reduce.skips)
        # somebody was dropped, and it has to be added up again
        self.changed = False

    def goes_on(self, resolve: Resolve) -> bool:
        """Note what became of a push. False if there is no round any more: nothing is left, or it is refused whole."""
        if not self.holds(resolve.pending):
            return True
        self.pushes, self.skips = (
            [pending for pending in held if pending is not resolve.pending]
            for held in (self.pushes, self.skips)
        )
        self.changed = True
        return resolve.decided is None and bool(self.pushes)

    def is_added_again(self, reduce: Reduce) -> bool:
        """Note that it is. False if it need not be, or if that is not what is left of it."""
        needs, self.changed = self.changed, False
        left = self.pushes, self.skips, self.mean
        return needs and left == (list(reduce.pushes), list(reduce.skips), reduce.mean)

    def holds(self, pending: PendingPush) -> bool:
        """Whether it is a push of this round."""
        return pending in (*self.pushes, *self.skips)


class Lateness:
    """Which versions rounds have made, by the policy that closed them, and which version who knows of.

    And which policies have let late pushes in.
    """

    def __init__(self) -> None:
        # the version in the last receipt, by timeline, worker and epoch
        self._told: dict[tuple[int, str, int], int] = {}
        self._made: list[tuple[Policy, int]] = []
        # a round that is open keeps late pushes when its policy lets no more in
        self._lets_in: list[Policy] = []

    def told(self, pending: PendingPush, version: int) -> None:
        """The sender of a push got its receipt."""
        self._told[pending.key[:3]] = version

    def known_to(self, pending: PendingPush) -> int:
        """The newest version that the sender of a push knew of."""
        return max(pending.header.base_version, self._told.get(pending.key[:3], 0))

    def note(self, policy: Policy) -> None:
        """A policy is in force, with the settings that it has."""
        carries = isinstance(policy.settings, SyncSettings) and policy.settings.late == "carry"
        if carries and not self.is_let_in(policy):
            self._lets_in.append(policy)

    def is_let_in(self, policy: Policy) -> bool:
        """Whether a late push may be in a round of this policy."""
        return any(known is policy for known in self._lets_in)

    def made(self, policy: Policy, version: int) -> None:
        """A round has made a version."""
        self._made.append((policy, version))

    def since(self, policy: Policy) -> int:
        """The version of the policy's last round. Who knew only of earlier ones is late."""
        return max((version for known, version in self._made if known is policy), default=0)
