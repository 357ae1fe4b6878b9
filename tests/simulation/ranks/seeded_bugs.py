"""Mistakes that several ranks must not make, each put into the running code, for the simulated runs to find.

The table at the end says of each what the runs say when they find it, and a seed that does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest

from pushstep.proto.errors import PushstepError
from pushstep.proto.training_pb2 import PushCommit
from pushstep.server.coordinator.push import Key, PendingPush
from pushstep.server.parts.arrival import Arrival
from pushstep.server.parts.exact import ExactAnswer
from pushstep.server.parts.shard import Goal
from pushstep.server.ranks import zero as zero_module
from pushstep.server.ranks.follower import Follower, HeldPart
from pushstep.server.ranks.leader import RankLeader

Patch = pytest.MonkeyPatch


def tickets_come_before_all_have_staged(patch: Patch) -> None:
    """A push is decided on as soon as rank 0 has its own part."""

    async def hasty(self: RankLeader, pending: PendingPush, commit: PushCommit) -> None:
        """It does not gather."""

    patch.setattr(RankLeader, "gather", hasty)


def a_version_is_published_mixed(patch: Patch) -> None:
    """A rank answers with what it holds when it gets round to it, under the version that it was asked for."""
    after_step = ExactAnswer.after_step

    def kept_back(self: ExactAnswer, arenas: Any, written: Any) -> None:
        after_step(self, arenas, written)
        published = self.published
        if published is not None and published.version > 1:
            self.published = replace(published, version=published.version - 1)

    patch.setattr(ExactAnswer, "after_step", kept_back)


def a_retry_reaches_one_rank_twice(patch: Patch) -> None:
    """A part that comes again is added to the one that is held."""
    hold = Follower.hold

    def twice(
        self: Follower, part: HeldPart, fault: PushstepError | None, blocks: dict[int, list[float]]
    ) -> HeldPart:
        known = self.held(part.identity)
        if known is not None and known.push is not None and part.push is not None:
            known.push = replace(known.push, parts=[*known.push.parts, *part.push.parts])
        return hold(self, part, fault, blocks)

    patch.setattr(Follower, "hold", twice)


def manifests_come_before_the_files(patch: Patch) -> None:
    """Rank 0 writes its snapshot's manifest while the other ranks still write theirs."""
    snapshot = RankLeader.snapshot

    def unwaited(self: RankLeader, *, automatic: bool) -> Any:
        snapshot(self, automatic=automatic)

        async def nothing() -> list[dict[str, Any]]:
            return []

        return nothing()

    patch.setattr(RankLeader, "snapshot", unwaited)


def a_rank_comes_back_one_version_behind(patch: Patch) -> None:
    """Ranks that differ by one version go on as they are."""
    goal_of = zero_module.goal_of

    def lenient(name: str, own: Any, theirs: Any) -> Goal:
        goal = goal_of(name, own, theirs)
        versions = [own.version, *(models[name].version for models in theirs.values() if name in models)]
        return Goal() if goal.version is not None and max(versions) - min(versions) == 1 else goal

    patch.setattr(zero_module, "goal_of", lenient)


def answers_come_before_all_have_stepped(patch: Patch) -> None:
    """A push is acknowledged when rank 0 has taken its step."""
    patch.setattr(RankLeader, "when_all", lambda self, version, *, safe, then: then())


def senders_that_went_are_remembered(patch: Patch) -> None:
    """Rank 0 keeps in mind a push that was waited for in vain, and of which nothing came to any rank."""
    arrived = RankLeader._arrived

    async def kept(self: RankLeader, key: Key, promised: dict[int, int]) -> Arrival:
        arrival = self._arrival(key)
        try:
            return await arrived(self, key, promised)
        finally:
            self._arrivals.setdefault(key, arrival)
            arrival.waiting += not arrival.staged

    patch.setattr(RankLeader, "_arrived", kept)


def dropped_parts_are_kept(patch: Patch) -> None:
    """A rank does not forget the part of a push that came to nothing."""
    patch.setattr(Follower, "drop", lambda self, order: None)


def tickets_overtake(patch: Patch) -> None:
    """A rank leaves a ticket to a thread, and takes the next one meanwhile."""
    ticket = Follower.ticket

    def later(self: Follower, order: Any) -> None:
        delay_s = 0.02 * (int(order.ticket.version) % 2)
        asyncio.get_running_loop().call_later(delay_s, ticket, self, order)

    patch.setattr(Follower, "ticket", later)


@dataclass(frozen=True)
class Bug:
    """A mistake, what the runs say when they find it, and the seeds among which one does."""

    put_in: Callable[[Patch], None]
    says: str
    seeds: Sequence[int] = range(60)

    def __str__(self) -> str:
        return self.put_in.__name__


BUGS: Final = (
    Bug(tickets_come_before_all_have_staged, "is not what the pushes make", range(3)),
    Bug(a_version_is_published_mixed, "mixes versions", range(3)),
    Bug(a_retry_reaches_one_rank_twice, "is not what the pushes make", range(20)),
    Bug(manifests_come_before_the_files, "before rank .'s files", range(5, 25)),
    Bug(a_rank_comes_back_one_version_behind, "come back at different versions"),
    Bug(answers_come_before_all_have_stepped, "is told before rank", range(2, 20)),
    Bug(dropped_parts_are_kept, "still holds|bytes set aside", range(50, 70)),
    Bug(senders_that_went_are_remembered, "rank 0 still waits for", (1407, 1524)),
    Bug(tickets_overtake, "is at version|is not what the pushes make", range(3)),
)
