"""Mistakes that the service must not make, each put into the running code, for the tests to find.

The table at the end says of each what the tests say when they find it, and which of them are held to that. Whoever
changes a check, or the simulator, learns here whether it still catches what it is there for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pytest

from pushstep.client import Outcome
from pushstep.client.gradients.compression import Compression
from pushstep.client.membership.membership import Membership
from pushstep.client.membership.receipt import own_receipt
from pushstep.client.worker.worker import Worker as ClientWorker
from pushstep.proto.errors import ModelLost
from pushstep.proto.types_pb2 import Identity
from pushstep.server.coordinator.commits import Commits
from pushstep.server.coordinator.coordinator import Coordinator
from pushstep.server.coordinator.pending import PendingPushes
from pushstep.server.coordinator.policies.asynchronous import AsyncPolicy
from pushstep.server.coordinator.policies.bounded import BoundedPolicy
from pushstep.server.coordinator.policies.policy import View
from pushstep.server.coordinator.push import PendingPush
from pushstep.server.coordinator.sessions import Sessions
from pushstep.server.coordinator.worker import Worker, WorkerState

from . import executor_bugs, round_bugs

Patch = pytest.MonkeyPatch


def dedupe_is_dropped(patch: Patch) -> None:
    """A push that comes again is decided again."""
    decided_before = Sessions.decided_before

    def forgetful(self: Sessions, worker: Worker, identity: Identity, digest: int | None = None) -> Any:
        if self.stored(worker, identity) is not None:
            worker.sequence = int(identity.sequence) - 1
        return decided_before(self, worker, identity, digest)

    patch.setattr(Sessions, "decided_before", forgetful)


def eviction_is_ignored(patch: Patch) -> None:
    """An evicted worker's pushes are taken."""
    patch.setattr(Sessions, "evict", lambda self, name: self.workers[name])


def fencing_is_skipped(patch: Patch) -> None:
    """An old epoch is as good as the newest."""
    require = Sessions.require

    def lenient(self: Sessions, identity: Identity, now_s: float) -> Worker:
        worker = self.workers.get(identity.worker)
        if worker is not None and identity.epoch < worker.epoch:
            newest = Identity()
            newest.CopyFrom(identity)
            newest.epoch = worker.epoch
            return require(self, newest, now_s)
        return require(self, identity, now_s)

    patch.setattr(Sessions, "require", lenient)


def old_timeline_is_applied(patch: Patch) -> None:
    """A restore leaves the epochs, and with them the pushes, of the timeline that it ends."""

    def require_current(self: Coordinator, identity: Identity) -> None:
        if identity.model_uid != self.uid:
            raise ModelLost(model=self.name)

    patch.setattr(Coordinator, "require_current", require_current)
    patch.setattr(Sessions, "close_epochs", lambda self, first_epoch=0: None)


def waiting_push_survives_a_restore(patch: Patch) -> None:
    """What waits in a round at a restore is stepped after it."""
    restored = Coordinator.restored

    def start_over(self: PendingPushes, policy: Any) -> None:
        policy._queue = getattr(self.policy, "_queue", [])
        policy.round = getattr(self.policy, "round", None)
        self.policy, self.reducing = policy, None

    def keeping(*arguments: Any) -> Any:
        with Patch.context() as meanwhile:
            meanwhile.setattr(PendingPushes, "start_over", start_over)
            meanwhile.setattr(PendingPushes, "drop", lambda *_: None)
            return restored(*arguments)

    patch.setattr(Coordinator, "restored", keeping)


def every_scheduler_counts(patch: Patch) -> None:
    """Each worker's edits are taken, as if it were the lead."""
    patch.setattr(Sessions, "leads", lambda self, worker: True)


def last_edits_are_lost(patch: Patch) -> None:
    """What the lead's scheduler did after its last push goes with it and is not taken."""
    left = Coordinator.on_leave
    patch.setattr(
        Coordinator,
        "on_leave",
        lambda self, identity, now_s, edits=None, state=None: left(self, identity, now_s, None, state),
    )


def retries_tick(patch: Patch) -> None:
    """A push that comes again moves its worker's clock."""
    who = Coordinator._who

    def ticking(
        self: Coordinator, identity: Identity, digest: int | None, now_s: float
    ) -> tuple[Worker, Any]:
        worker, seen = who(self, identity, digest, now_s)
        if seen is not None:
            self.policy.consumed(worker)
        return worker, seen

    patch.setattr(Coordinator, "_who", ticking)


def staleness_is_off_by_one(patch: Patch) -> None:
    """A push is too stale one version too early."""
    move = AsyncPolicy._move
    patch.setattr(AsyncPolicy, "_move", lambda self, pending, version: move(self, pending, version + 1))


def bound_is_off_by_one(patch: Patch) -> None:
    """SSP lets a worker run one clock too far."""
    admits = BoundedPolicy.admits
    patch.setattr(
        BoundedPolicy, "admits", lambda self, worker, ahead, view: admits(self, worker, ahead - 1, view)
    )


def bound_blocks_too_early(patch: Patch) -> None:
    """SSP holds a worker back one clock before it must."""
    admits = BoundedPolicy.admits
    patch.setattr(
        BoundedPolicy, "admits", lambda self, worker, ahead, view: admits(self, worker, ahead + 1, view)
    )


def newcomers_start_at_nothing(patch: Patch) -> None:
    """A joiner's clock is zero instead of the slowest one's."""
    slowest = BoundedPolicy._slowest

    def from_zero(self: BoundedPolicy, view: View) -> int:
        for worker in view.members:
            self._clocks.setdefault(worker.name, (worker.epoch, 0))
        return slowest(self, view)

    patch.setattr(BoundedPolicy, "_slowest", from_zero)


def the_gone_hold_others_back(patch: Patch) -> None:
    """A clock stays the slowest one after its worker has gone."""

    def slowest(self: BoundedPolicy, view: View) -> int:
        least = min((clock for _, clock in self._clocks.values()), default=0)
        for worker in view.members:
            self._clocks.setdefault(worker.name, (worker.epoch, least))
        return least

    patch.setattr(BoundedPolicy, "_slowest", slowest)


def the_dead_are_waited_for(patch: Patch) -> None:
    """A lease that ran out leaves its worker a member."""

    def live(self: Sessions) -> list[Worker]:
        there = (WorkerState.LIVE, WorkerState.EXPIRED)
        return sorted((w for w in self.workers.values() if w.state in there), key=lambda w: w.joined)

    patch.setattr(Sessions, "live", live)


def receipts_are_forgotten(patch: Patch) -> None:
    """A join does not bring the receipts of the epochs before: what was applied is pushed again."""
    join = Sessions.join

    def emptied(
        self: Sessions, name: str, now_s: float, takeover: bool, attempt: int, old_epoch: int
    ) -> Worker:
        worker = join(self, name, now_s, takeover, attempt, old_epoch)
        worker.decided_pushes.clear()
        return worker

    patch.setattr(Sessions, "join", emptied)


def epochs_begin_again(patch: Patch) -> None:
    """Who was forgotten comes back under the epochs that it had."""
    forget = Sessions._forget

    def lightly(self: Sessions, now_s: float) -> None:
        forget(self, now_s)
        self.forgotten_epoch = 0

    patch.setattr(Sessions, "_forget", lightly)


def joins_are_not_recognised(patch: Patch) -> None:
    """A copy of a join that comes late is a join of its own, and fences what came of the first one."""
    join = Sessions.join
    patch.setattr(
        Sessions,
        "join",
        lambda self, name, now_s, takeover, attempt, old_epoch: join(
            self, name, now_s, takeover, 0, old_epoch
        ),
    )


def restores_lift_fences(patch: Patch) -> None:
    """Whoever is told to join again after a restore may, fenced or not."""
    patch.setattr(Sessions, "_is_itself", lambda self, worker, old_epoch: 0 < old_epoch <= worker.epoch)


def later_parameters_are_never_pushed(patch: Patch) -> None:
    """A step on parameters that a pull brought from after a restore is superseded, and the next one, and the next."""
    step = ClientWorker.step

    def unsent(self: ClientWorker, gradients: Any, held: Any, *given: Any, **options: Any) -> Any:
        member = self.member()
        if held is None or held[0] == member.timeline:
            return step(self, gradients, held, *given, **options)
        push = member.next_identity()
        push.timeline = held[0]
        return self._outcomes.resolved(
            own_receipt(Outcome.SUPERSEDED, "superseded", push, member.version)
        ), None

    patch.setattr(ClientWorker, "step", unsent)


def restores_are_taken_for_known(patch: Patch) -> None:
    """Whoever joins again after a restore is not told, for it was the session that did."""
    rejoin = Membership.rejoin

    def quietly(self: Membership) -> Any:
        member = rejoin(self)
        self.known_timeline = member.timeline
        return member

    patch.setattr(Membership, "rejoin", quietly)


def restores_undo_everything(patch: Patch) -> None:
    """What a restored snapshot holds of an ended timeline is said to be undone."""
    patch.setattr(Commits, "holds", lambda self, timeline, version: timeline == self.timeline)


def restores_undo_nothing(patch: Patch) -> None:
    """What came after a restored snapshot is said to be applied still."""
    patch.setattr(Commits, "holds", lambda self, timeline, version: True)


def held_push_is_taken_twice(patch: Patch) -> None:
    """A retry of a push that waits is a push of its own."""
    staged = Coordinator.on_body

    def greedy(self: Coordinator, pending: PendingPush, now_s: float) -> Any:
        worker = self.sessions.workers.get(pending.worker)
        if worker is not None:
            worker.undecided.pop(int(pending.identity.sequence), None)
        return staged(self, pending, now_s)

    patch.setattr(Coordinator, "on_body", greedy)


def residual_always_advances(patch: Patch) -> None:
    """What int8 or top-k left out of a push that was not applied counts as sent."""
    settle = Compression.settle
    patch.setattr(Compression, "settle", lambda self, *, applied: settle(self, applied=True))


@dataclass(frozen=True)
class Bug:
    """A mistake, what is said when it is found, and which tests are held to finding it.

    chaos: test_simulation.py, runs from seeds. stories: test_stories.py, hypothesis event by event. schedules:
    server/test_policy.py, random orders of pushes under SSP. sessions: server/test_session.py. Of the client, which the
    simulator has none of, compression and restores: client/test_compression.py, client/test_restores.py.
    """

    put_in: Callable[[Patch], None]
    says: str
    by: tuple[str, ...]
    # the run of the chaos that has found it, and is tried before the others
    seed: int = 0

    def __str__(self) -> str:
        return self.put_in.__name__


BUGS: Final = (
    Bug(dedupe_is_dropped, "is applied again|another receipt", ("chaos", "stories")),
    Bug(eviction_is_ignored, "is let in after its eviction", ("chaos",), seed=3),
    # which of them comes first differs with what else is loaded: hypothesis draws numbers from all code that it sees
    Bug(fencing_is_skipped, "is let in, its epoch is over|is told", ("chaos", "stories")),
    Bug(
        round_bugs.time_out_counts_twice,
        "was applied, and denied|another receipt|is applied again|is told|is said to be late",
        ("chaos", "stories"),
        seed=7,
    ),
    Bug(round_bugs.mean_is_over_members, "divided by", ("chaos", "stories"), seed=19),
    Bug(round_bugs.rounds_follow_the_settings, "is not what is left of the last one", ("chaos",), seed=2557),
    Bug(round_bugs.rounds_are_signed_by_the_next, "has decided, and the receipt says", ("chaos",), seed=308),
    Bug(round_bugs.rounds_close_one_too_early, "is closed without", ("chaos",)),
    Bug(round_bugs.time_outs_come_too_early, "is closed without", ("chaos",)),
    Bug(round_bugs.quorums_count_everybody_but_one, "is closed without", ("chaos",)),
    Bug(round_bugs.everybody_is_late, "is said to be late", ("chaos",)),
    Bug(staleness_is_off_by_one, "is refused, the bound is", ("chaos",)),
    Bug(old_timeline_is_applied, "is let in on timeline", ("chaos", "stories"), seed=3),
    Bug(every_scheduler_counts, "the lead's edits make", ("chaos", "stories")),
    Bug(last_edits_are_lost, "the lead's edits make", ("chaos", "stories")),
    Bug(residual_always_advances, "the residual has moved", ("compression",)),
    Bug(
        waiting_push_survives_a_restore,
        "is let in on timeline|without a verdict",
        ("chaos",),  # a story comes to it too seldom
        seed=7,
    ),
    Bug(
        round_bugs.left_behind_stays,
        "is let in, its epoch is over|is let in after its eviction",
        ("chaos",),
        seed=37,
    ),
    Bug(receipts_are_forgotten, "its worker is not told", ("chaos",)),
    Bug(epochs_begin_again, "epoch .* came again|two pushes have one identity", ("chaos",), seed=10),
    Bug(restores_lift_fences, "DID NOT RAISE", ("sessions",)),
    Bug(later_parameters_are_never_pushed, "are not applied", ("restores",)),
    Bug(restores_are_taken_for_known, "is told 0 times", ("restores",)),
    Bug(joins_are_not_recognised, "join came again and got another epoch", ("chaos",), seed=9),
    Bug(restores_undo_everything, "is told", ("chaos",)),
    Bug(restores_undo_nothing, "is told", ("chaos",), seed=3),
    Bug(
        held_push_is_taken_twice,
        "without a verdict|was applied, and denied|another receipt|are still set aside",
        ("chaos",),
        seed=7,
    ),
    Bug(round_bugs.late_is_counted, "are in a round after version", ("chaos", "stories"), seed=15),
    Bug(round_bugs.busy_is_ignored, "are in a round after version|a round", ("chaos", "stories"), seed=15),
    Bug(the_dead_are_waited_for, "is waited for, silent", ("chaos",), seed=37),
    Bug(round_bugs.time_outs_are_ignored, "a push of .* waits", ("chaos",), seed=7),
    Bug(retries_tick, "clocks ahead", ("chaos",), seed=20),
    Bug(bound_is_off_by_one, "clocks ahead", ("chaos", "schedules")),
    Bug(bound_blocks_too_early, "clocks ahead", ("chaos", "schedules")),
    Bug(newcomers_start_at_nothing, "clocks ahead", ("chaos", "schedules"), seed=14),
    Bug(the_gone_hold_others_back, "clocks ahead", ("chaos", "schedules")),
    Bug(executor_bugs.receipts_come_before_the_step, "is told before its step", ("chaos", "stories")),
    Bug(executor_bugs.waiters_sleep_on, "was not woken", ("chaos",)),
    Bug(executor_bugs.the_timer_is_not_set, "a push of .* waits|is waited for, silent", ("chaos",), seed=34),
    Bug(executor_bugs.jobs_are_done_twice, "is stepped behind version", ("chaos", "stories")),
    Bug(executor_bugs.small_steps_overtake, "is stepped behind version", ("chaos",), seed=6),
    Bug(executor_bugs.answers_are_out_of_date, "is answered with version", ("chaos", "stories")),
    Bug(
        executor_bugs.failed_steps_leave_their_version,
        "leaves version|is stepped behind version",
        ("chaos", "stories"),
    ),
    Bug(executor_bugs.failed_steps_are_told_as_applied, "is told version", ("chaos", "stories")),
    Bug(executor_bugs.bytes_are_kept, "are still set aside", ("chaos", "stories")),
    Bug(executor_bugs.sums_are_kept, "are still set aside", ("chaos", "stories"), seed=3),
    Bug(executor_bugs.queued_steps_are_refused_at_the_end, "leaves version", ("chaos",)),
)


def found_by(test: str) -> list[Bug]:
    """The bugs that a test is held to finding."""
    return [bug for bug in BUGS if test in bug.by]
