"""Mistakes in rounds: when they close, what they are made of, and who is late for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from pushstep.server.coordinator.decision import Reduce
from pushstep.server.coordinator.pending import PendingPushes
from pushstep.server.coordinator.policies.policy import Move, View
from pushstep.server.coordinator.policies.synchronous import COMPLETE, TIMEOUT, OpenRound, SyncPolicy
from pushstep.server.coordinator.receipts import Receipts

Patch = pytest.MonkeyPatch


def time_out_counts_twice(patch: Patch) -> None:
    """What a round that timed out has added up is in the next one again."""
    end = SyncPolicy._end

    def careless(self: SyncPolicy, open_round: Any, ended_by: str, why: str) -> list[Move]:
        if ended_by == TIMEOUT:
            self._queue.extend(open_round.pushes.values())
        return end(self, open_round, ended_by, why)

    patch.setattr(SyncPolicy, "_end", careless)


def left_behind_stays(patch: Patch) -> None:
    """A push whose worker has joined anew stays in the round."""
    patch.setattr(SyncPolicy, "drop", lambda self, pending: None)


def mean_is_over_members(patch: Patch) -> None:
    """The sum is divided by the number of members instead of by the contributors' weight."""
    combine = PendingPushes._combine
    members: list[int] = []

    def counting(self: PendingPushes, reduce: Reduce, now_s: float) -> None:
        members.append(len(self.sessions.members()))
        combine(self, reduce, now_s)

    patch.setattr(PendingPushes, "_combine", counting)
    patch.setattr(Reduce, "divisor", property(lambda self: float(members[-1] or 1) if self.mean else 1.0))


def rounds_follow_the_settings(patch: Patch) -> None:
    """A round that is added up again, without somebody, is reduced as the policy says by then."""
    combine = PendingPushes._combine

    def forgetful(self: PendingPushes, reduce: Reduce, now_s: float) -> None:
        if isinstance(self.policy, SyncPolicy):
            reduce = replace(reduce, mean=self.policy.settings.reduce == "mean")
        combine(self, reduce, now_s)

    patch.setattr(PendingPushes, "_combine", forgetful)


def rounds_are_signed_by_the_next(patch: Patch) -> None:
    """The receipts of a round name the policy of when its sum was there."""
    of_step = Receipts.of_step
    reduced = PendingPushes.reduced

    def forgetful(self: PendingPushes, reduce: Reduce, *result: Any) -> None:
        with Patch.context() as meanwhile:
            meanwhile.setattr(
                Receipts,
                "of_step",
                lambda receipts, order, written, _, now_s: of_step(
                    receipts, order, written, self.policy.name, now_s
                ),
            )
            reduced(self, reduce, *result)

    patch.setattr(PendingPushes, "reduced", forgetful)


def rounds_close_one_too_early(patch: Patch) -> None:
    """A round does not wait for the last one that it expects."""
    closed_by = SyncPolicy._closed_by

    def hasty(self: SyncPolicy, open_round: OpenRound, view: View) -> tuple[str, str]:
        present = {worker.name for worker in view.members}
        missing = (open_round.expected & present) - open_round.pushes.keys()
        return (COMPLETE, "") if len(missing) == 1 else closed_by(self, open_round, view)

    patch.setattr(SyncPolicy, "_closed_by", hasty)


def time_outs_come_too_early(patch: Patch) -> None:
    """A round waits for half of its time-out."""
    deadline_s = SyncPolicy.deadline_s

    def early(self: SyncPolicy) -> float | None:
        end_s = deadline_s(self)
        return None if end_s is None or self.round is None else (self.round.opened_s + end_s) / 2

    patch.setattr(SyncPolicy, "deadline_s", early)


def quorums_count_everybody_but_one(patch: Patch) -> None:
    """One less than the quorum is enough."""
    closed_by = SyncPolicy._closed_by

    def early(self: SyncPolicy, open_round: OpenRound, view: View) -> tuple[str, str]:
        settings, quorum = self.settings, self.settings.quorum
        if quorum is None or quorum == 1:
            return closed_by(self, open_round, view)
        self.settings = settings.model_copy(update={"quorum": quorum - 1})
        try:
            return closed_by(self, open_round, view)
        finally:
            self.settings = settings

    patch.setattr(SyncPolicy, "_closed_by", early)


def time_outs_are_ignored(patch: Patch) -> None:
    """A round waits for its last member, however long."""
    patch.setattr(SyncPolicy, "deadline_s", lambda self: None)


def late_is_counted(patch: Patch) -> None:
    """A push of an earlier round is part of this one although late ones are dropped."""

    def none(self: SyncPolicy, since: int) -> Sequence[Move]:
        return []

    patch.setattr(SyncPolicy, "_turn_away_late", none)


def busy_is_ignored(patch: Patch) -> None:
    """A round is closed while the one before it is still being added up."""
    review = SyncPolicy.review
    patch.setattr(
        SyncPolicy,
        "review",
        lambda self, view: review(self, replace(view, busy=False)),
    )


def everybody_is_late(patch: Patch) -> None:
    """Who knows of the last round's version is late, too."""
    turn_away = SyncPolicy._turn_away_late
    patch.setattr(SyncPolicy, "_turn_away_late", lambda self, since: turn_away(self, since + 1))
