"""The pending pushes of one model, and how each gets its outcome: gate, policy, ticket.

Part of the coordinator's state machine (see coordinator.py): no await, thread, clock or I/O. Pending pushes of one
worker pass the gate and reach the policy in the order of their sequences, one at a time. The policy's moves are
executed here. A move is an outcome without a step, a ticket for one push, or a `Reduce` of several pushes. The ticket
of a round is written when its sum has come back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pushstep.proto.errors import (
    LeaseExpired,
    MalformedFrame,
    NonfiniteGradient,
    PushstepError,
    Quarantined,
    StepFailed,
)
from pushstep.proto.types_pb2 import OUTCOME_REJECTED, OUTCOME_SKIPPED
from pushstep.proto.wire.hyperparameters import Values

from ..counters.round_counts import RoundCounts
from ..staging.gradient import StagedPush
from .commits import Commits, Order
from .decision import Decision, Event, Reduce, Resolve, Step
from .gate import Gate, decide
from .policies.asynchronous import AsyncPolicy
from .policies.policy import Move, Policy, Refuse, Round, Single, View
from .push import PendingPush
from .receipts import Receipts, refuse_consumed
from .sessions import Sessions
from .worker import Decided, Worker, WorkerState


class PendingPushes:
    """Owns the policy and the gate. Collects its decisions until `conclude` returns them."""

    def __init__(self, commits: Commits, sessions: Sessions) -> None:
        self.commits = commits
        self.sessions = sessions
        self.policy: Policy = AsyncPolicy()
        self.gate = Gate()
        self.receipts = Receipts(commits, sessions)
        self.rounds = RoundCounts()
        # the round that is being added up, and the version that the policy's last round made
        self.reducing: Reduce | None = None
        self._round_version = 0
        # pushes that wait for an earlier push of their worker, which is undecided or has not come
        self.parked: list[PendingPush] = []
        self._decisions: list[Decision] = []

    def reduced(self, reduce: Reduce, result: StagedPush | PushstepError, now_s: float) -> None:
        """Take a round's sum, or the error of adding it up. Ignored if the round has changed meanwhile."""
        if reduce is not self.reducing:
            return
        self.reducing = None
        if isinstance(result, PushstepError):
            self._reject(reduce.pushes, result, now_s, reduce.policy, blamed=False)
        else:
            before = self.commits.version
            order = Order(reduce.pushes, result, 1.0, reduce.divisor, reduce.notes)
            self._step(order, now_s, reduce.policy)
            if self.commits.version > before and reduce.policy is self.policy:
                self._round_version = self.commits.version
        self._skip(reduce.skips, now_s, reduce.policy)

    def replace_policy(self, policy: Policy, now_s: float) -> None:
        """Close the policy, and hand the pushes that it leaves to another one."""
        closed = self.policy
        moves, left = closed.close(self.view(now_s))
        self.policy, self._round_version = policy, 0
        for move in moves:
            self._play(move, now_s, closed)
        for pending in left:
            self.policy.take(pending)

    def start_over(self, policy: Policy) -> None:
        """Replace the policy. Forgets the pushes that it holds and the round that is being added up."""
        self.policy, self.reducing, self._round_version = policy, None, 0

    def view(self, now_s: float) -> View:
        """The state that the policy may look at."""
        members = self.sessions.members() if self.policy.waits else ()
        return View(now_s, self.commits.version, members, self.reducing is not None, self._round_version)

    def conclude(self, now_s: float) -> list[Decision]:
        """Review until the policy has no move left. Returns everything decided since the last event."""
        self.sessions.expire(now_s)
        if self.sessions.expired:
            for worker in self.sessions.take_expired():
                self.record("worker_expired", "server", worker=worker.name, epoch=worker.epoch)
        if self.parked:
            self._clear_parked(now_s)
        while moves := self.policy.review(self.view(now_s)):
            for move in moves:
                self._play(move, now_s, self.policy)
        decisions, self._decisions = self._decisions, []
        return decisions

    def _clear_parked(self, now_s: float) -> None:
        """Drop parked pushes of workers that are not live: the push before them will never come."""
        waiting = [c for c in self.parked if self._is_parked(c)]
        gone = [c for c in waiting if self.sessions.workers[c.worker].state is not WorkerState.LIVE]
        self.parked = [c for c in waiting if c not in gone]
        for pending in gone:
            del self.sessions.workers[pending.worker].undecided[int(pending.identity.sequence)]
        lease_s = self.sessions.lease_s
        self.drop(gone, lambda c: LeaseExpired(worker=c.worker, seconds=lease_s), now_s)

    def _is_parked(self, pending: PendingPush) -> bool:
        worker = self.sessions.workers.get(pending.worker)
        if worker is None:
            return False
        sequence = int(pending.identity.sequence)
        return worker.undecided.get(sequence) is pending and sequence > worker.sequence + 1

    def _play(self, move: Move, now_s: float, policy: Policy) -> None:
        """Execute a move. `policy`: the one that makes it, which the receipts name."""
        match move:
            case Single(pending, lr_scale, notes):
                if pending.push is None or pending.skips:
                    self._skip([pending], now_s, policy)
                else:
                    self._step(Order([pending], pending.push, lr_scale, notes=notes), now_s, policy)
            case Refuse(pending, outcome, reason, notes):
                receipt = self.receipts.without_step(pending, policy.name, now_s, outcome, reason, notes)
                self._consume(pending, Decided(pending.digest, receipt), now_s)
            case Round():
                self.rounds.note(move.closed_by, now_s - move.opened_s, len(move.pushes) + len(move.skips))
                self._combine(Reduce(move.pushes, move.skips, move.mean, move.notes, policy), now_s)

    def _combine(self, reduce: Reduce, now_s: float) -> None:
        if reduce.pushes:
            self.reducing = reduce
            self._decisions.append(reduce)
        else:
            self._skip(reduce.skips, now_s, reduce.policy)

    def pass_on(self, pending: PendingPush, now_s: float) -> None:
        """Pass a push through the gate and on to the policy."""
        worker = self.sessions.workers[pending.worker]
        worker.base_version = pending.header.base_version
        pending.known_version = max(worker.base_version, worker.last_receipt_version)
        commits = self.commits
        try:
            if pending.fault is not None:
                # a copy: the traceback of the fault would hold `pending`, which holds the fault
                raise copy.copy(pending.fault)
            if pending.header.base_version > commits.version:
                raise MalformedFrame(
                    problem=f"base_version {pending.header.base_version} is ahead of version {commits.version}"
                )
            planned: Mapping[int, Values] = {}
            if pending.header.edits:
                planned = commits.plan(pending, lead=self.sessions.leads(worker)).planned
            if pending.push is None:
                pending.skips, pending.skip_reason = True, "skip_push"
            else:
                commits.groups.require_steppable(pending.push, planned)
                if not self.gate.decide(pending.push, commits.hooks.nonfinite()):
                    pending.skips, pending.skip_reason = True, NonfiniteGradient.code
        except PushstepError as error:
            self._reject([pending], error, now_s, self.policy)
        else:
            self.policy.take(pending)

    def _step(self, order: Order, now_s: float, policy: Policy) -> None:
        """Write the ticket, unless the step is refused after all. Then the pushes are skipped or rejected."""
        sessions = self.sessions
        try:
            if order.divisor is not None and not self._still_finite(order.push):
                self._skip(order.pushes, now_s, policy, NonfiniteGradient.code)
                return
            leads = [sessions.leads(sessions.workers[pending.worker]) for pending in order.pushes]
            written = self.commits.write(order, leads)
            receipts = self.receipts.of_step(order, written, policy.name, now_s)
        except PushstepError as error:
            self._reject(order.pushes, error, now_s, policy, blamed=order.divisor is None)
            return
        except Exception as error:  # noqa: BLE001 - a defect must not leave the pushes without an answer for ever
            failed = StepFailed(
                model=self.commits.name, version=self.commits.version + 1, problem=repr(error)
            )
            self.record(failed.code, "server", problem=repr(error))
            self._reject(order.pushes, failed, now_s, policy, blamed=False)
            return
        pairs = zip(order.pushes, receipts, strict=True)
        resolves = [self._resolve(pending, Decided(pending.digest, receipt)) for pending, receipt in pairs]
        hooks = self.commits.hooks
        after = hooks.dump() if hooks.list else ()
        self._decisions.append(Step(written.ticket, order.push, tuple(resolves), written.facts, after))
        for pending in order.pushes:
            self._pass_on_next(pending, now_s)

    def _still_finite(self, push: StagedPush) -> bool:
        """`gate.decide` for a round's sum, which no gate has seen: finite pushes may sum to infinity."""
        return decide(push, self.gate.nonfinite(self.commits.hooks.nonfinite()))

    def _skip(self, pushes: Sequence[PendingPush], now_s: float, policy: Policy, reason: str = "") -> None:
        """Resolve pushes as skipped: their workers count as present, and nothing is applied."""
        for pending in pushes:
            why = reason or pending.skip_reason
            receipt = self.receipts.without_step(pending, policy.name, now_s, OUTCOME_SKIPPED, why)
            self._consume(pending, Decided(pending.digest, receipt), now_s)

    def _reject(
        self,
        pushes: Sequence[PendingPush],
        error: PushstepError,
        now_s: float,
        policy: Policy,
        *,
        blamed: bool = True,
    ) -> None:
        """Resolve pushes as rejected.

        `blamed` False: the cause is a round's sum or a failed step, so no worker's count of refusals grows.
        """
        for pending in pushes:
            receipt = self.receipts.without_step(pending, policy.name, now_s, OUTCOME_REJECTED, error.code)
            self.record("push_rejected", pending.worker, code=error.code)
            # a copy: the traceback of the raised error holds the push's whole body
            refused = Decided(pending.digest, receipt, refuse_consumed(copy.copy(error)))
            self._consume(pending, refused, now_s)
            if blamed:
                self.count_refused(self.sessions.workers[pending.worker], now_s)

    def _consume(self, pending: PendingPush, decided: Decided, now_s: float) -> None:
        self._decisions.append(self._resolve(pending, decided))
        self._pass_on_next(pending, now_s)

    def _resolve(self, pending: PendingPush, decided: Decided) -> Resolve:
        """Store the outcome. From here on the push counts as seen."""
        worker = self.sessions.workers[pending.worker]
        self.sessions.consume(worker, decided)
        self.policy.consumed(worker)
        if decided.receipt.outcome != OUTCOME_REJECTED:
            worker.refused_in_row = 0
        worker.staleness = decided.receipt.staleness
        header = pending.header
        self.sessions.carry(
            worker, header.metrics, header.worker_state if header.HasField("worker_state") else None
        )
        return Resolve(pending, decided)

    def _pass_on_next(self, pending: PendingPush, now_s: float) -> None:
        """Pass on the worker's next push, if it is here already."""
        worker = self.sessions.workers[pending.worker]
        following = worker.undecided.get(worker.sequence + 1)
        if following is not None:
            self.pass_on(following, now_s)

    def count_refused(self, worker: Worker, now_s: float) -> None:
        """Count one more refused push in a row. At the limit quarantine the worker and drop its pushes."""
        worker.refused_in_row += 1
        limit = self.gate.settings.quarantine_after
        if limit is not None and worker.refused_in_row >= limit and not worker.quarantined:
            self.record("worker_quarantined", "server", worker=worker.name, refused=worker.refused_in_row)
            self.quarantine(worker, now_s, by_hand=False)

    def quarantine(self, worker: Worker, now_s: float, *, by_hand: bool) -> None:
        """Read nothing more of a worker. Its pending pushes are dropped."""
        worker.quarantines += not worker.quarantined
        worker.quarantined, worker.quarantined_by_hand = True, by_hand
        self.sessions.mark_changed(worker.name)
        held, worker.undecided = list(worker.undecided.values()), {}
        self.drop(held, lambda _: self.quarantined(worker), now_s)

    def quarantined(self, worker: Worker) -> Quarantined:
        """The error that a quarantined worker gets."""
        why = f"after {worker.refused_in_row} refused pushes in a row"
        if worker.quarantined_by_hand:
            why = "by an operator"
        return Quarantined(worker=worker.name, why=why, model=self.commits.name, times=worker.quarantines)

    def drop(
        self, pushes: Sequence[PendingPush], why: Callable[[PendingPush], PushstepError], now_s: float
    ) -> None:
        """Resolve pushes that will never have an outcome, each with the error of `why`."""
        for pending in pushes:
            self.policy.drop(pending)
            self._decisions.append(Resolve(pending, None, why(pending)))
        old = self.reducing
        if old is None or not any(c in pushes for c in (*old.pushes, *old.skips)):
            return
        # the round is added up again without them
        self.reducing = None
        kept = tuple(c for c in old.pushes if c not in pushes)
        skips = tuple(c for c in old.skips if c not in pushes)
        self._combine(replace(old, pushes=kept, skips=skips), now_s)

    def record(self, kind: str, by: str, **facts: Any) -> None:
        """Add an entry to the model's events."""
        self._decisions.append(Event(kind, by, facts))
