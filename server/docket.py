"""The candidates of one model that have no verdict yet, and how they come to one: gate, policy, ticket.

Part of the judge's state machine (see judge.py): no await, thread, clock or I/O. Candidates of one worker pass the gate
and reach the policy in the order of their sequences, one at a time. The policy's moves are played here: a verdict
without a step, a ticket for one push, or the order to add several up, whose ticket is written when that has been done.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from pushstep.proto.errors import (
    LeaseExpired,
    MalformedFrame,
    NonfiniteGradient,
    PushstepError,
    Quarantined,
    StepFailed,
)
from pushstep.proto.types_pb2 import Outcome, Receipt

from . import gate
from .async_policy import AsyncPolicy
from .candidate import Candidate
from .decision import Combine, Decision, Note, Settle, Step
from .ledger import Ledger, Order
from .policy import Alone, Move, Policy, Together, TurnAway, View
from .quality import Quality
from .session import Sessions
from .staging import StagedPush
from .worker import Verdict, Worker, WorkerState


class Docket:
    """Owns the policy and the gate's settings. What it decides is collected until `conclude`."""

    def __init__(self, ledger: Ledger, sessions: Sessions) -> None:
        self.ledger = ledger
        self.sessions = sessions
        self.policy: Policy = AsyncPolicy()
        self.quality = Quality()
        # the round that is being added up
        self.combining: Combine | None = None
        # held behind an earlier push of their worker's that has no verdict yet, or has not come
        self.parked: list[Candidate] = []
        self._decisions: list[Decision] = []

    def combined(self, combine: Combine, result: StagedPush | PushstepError, now_s: float) -> None:
        """A round's pushes have been added up, or could not be. Nothing happens if the round has changed meanwhile."""
        if combine is not self.combining:
            return
        self.combining = None
        if isinstance(result, PushstepError):
            self._reject(combine.candidates, result, now_s, blamed=False)
        else:
            self._step(Order(combine.candidates, result, 1.0, combine.divisor, combine.notes), now_s)
        self._skip(combine.skips, now_s)

    def replace_policy(self, policy: Policy, now_s: float) -> None:
        """Close the policy and judge what it leaves under another."""
        moves, left = self.policy.close(self.view(now_s))
        self.policy = policy
        for move in moves:
            self._play(move, now_s)
        for candidate in left:
            self.policy.take(candidate)

    def start_over(self, policy: Policy) -> None:
        """Forget the policy with what it holds, and the round that is being added up."""
        self.policy, self.combining = policy, None

    def view(self, now_s: float) -> View:
        """What the policy may look at."""
        members = self.sessions.members() if self.policy.waits else ()
        return View(now_s, self.ledger.version, members, self.combining is not None)

    def conclude(self, now_s: float) -> list[Decision]:
        """Let the policy look until it has nothing more to do; everything decided since the last event."""
        self.sessions.expire(now_s)
        for worker in self.sessions.take_expired():
            self.note("worker_expired", "server", worker=worker.name, epoch=worker.epoch)
        if self.parked:
            self._clear_parked()
        while moves := self.policy.review(self.view(now_s)):
            for move in moves:
                self._play(move, now_s)
        decisions, self._decisions = self._decisions, []
        return decisions

    def _clear_parked(self) -> None:
        """What waits for an earlier push does not outlast its worker: nothing would ever come before it."""
        waiting = [c for c in self.parked if self._is_parked(c)]
        gone = [c for c in waiting if self.sessions.workers[c.worker].state is not WorkerState.LIVE]
        self.parked = [c for c in waiting if c not in gone]
        for candidate in gone:
            del self.sessions.workers[candidate.worker].held[int(candidate.identity.sequence)]
        lease_s = self.sessions.lease_s
        self.drop(gone, lambda c: LeaseExpired(worker=c.worker, seconds=lease_s))

    def _is_parked(self, candidate: Candidate) -> bool:
        worker = self.sessions.workers.get(candidate.worker)
        if worker is None:
            return False
        sequence = int(candidate.identity.sequence)
        return worker.held.get(sequence) is candidate and sequence > worker.sequence + 1

    def _play(self, move: Move, now_s: float) -> None:
        match move:
            case Alone(candidate, lr_scale, notes):
                if candidate.push is None or candidate.skips:
                    self._skip([candidate], now_s)
                else:
                    self._step(Order([candidate], candidate.push, lr_scale, notes=notes), now_s)
            case TurnAway(candidate, outcome, reason, notes):
                receipt = self._receipt(candidate, now_s, outcome, reason)
                receipt.notes.extend(notes)
                self._consume(candidate, Verdict(candidate.digest, receipt))
            case Together((), _, skips):
                self._skip(skips, now_s)
            case Together(candidates, mean, skips, notes):
                self._combine(Combine(candidates, skips, mean, notes))

    def _combine(self, combine: Combine) -> None:
        self.combining = combine
        self._decisions.append(combine)

    def pass_on(self, candidate: Candidate) -> None:
        """Through the gate, and to the policy."""
        worker = self.sessions.workers[candidate.worker]
        worker.base_version = candidate.header.base_version
        candidate.known_version = max(worker.base_version, worker.told_version)
        ledger = self.ledger
        try:
            if candidate.fault is not None:
                raise copy.copy(candidate.fault)  # or the traceback of what it holds would hold it
            if candidate.header.base_version > ledger.version:
                raise MalformedFrame(
                    problem=f"base_version {candidate.header.base_version} is ahead of version {ledger.version}"
                )
            planned, _ = ledger.groups.plan_worker_edits(
                candidate.edits(), self.sessions.leads(worker), ledger.name
            )
            if candidate.push is None:
                candidate.skips, candidate.skip_reason = True, "skip_push"
            else:
                gate.require_steppable(candidate.push, ledger.groups, planned)
                if not self.quality.decide(candidate.push, ledger.hooks.nonfinite()):
                    candidate.skips, candidate.skip_reason = True, NonfiniteGradient.code
        except PushstepError as error:
            self._reject([candidate], error, candidate.staged_s)
        else:
            self.policy.take(candidate)

    def _step(self, order: Order, now_s: float) -> None:
        """Write the ticket, unless what is to be stepped is refused after all."""
        receipts = [self._receipt(candidate, now_s) for candidate in order.candidates]
        try:
            if order.divisor is not None and not self._still_finite(order.push):
                self._skip(order.candidates, now_s, NonfiniteGradient.code)
                return
            ticket, facts = self.ledger.write(order, receipts)
        except PushstepError as error:
            self._reject(order.candidates, error, now_s, blamed=order.divisor is None)
            return
        except Exception as error:  # noqa: BLE001 - a defect must not leave the pushes without an answer for ever
            failed = StepFailed(model=self.ledger.name, version=self.ledger.version + 1, problem=repr(error))
            self.note(failed.code, "server", problem=repr(error))
            self._reject(order.candidates, failed, now_s, blamed=False)
            return
        pairs = zip(order.candidates, receipts, strict=True)
        settles = [
            self._settle(candidate, Verdict(candidate.digest, receipt)) for candidate, receipt in pairs
        ]
        self._decisions.append(Step(ticket, order.push, tuple(settles), facts))
        for candidate in order.candidates:
            self._pass_on_next(candidate)

    def _still_finite(self, push: StagedPush) -> bool:
        """Of a round: finite pushes may add up to infinity. As `gate.decide`, for what no gate has seen."""
        return gate.decide(push, self.quality.nonfinite(self.ledger.hooks.nonfinite()))

    def _receipt(
        self,
        candidate: Candidate,
        now_s: float,
        outcome: Outcome = Outcome.OUTCOME_UNSPECIFIED,
        reason: str = "",
    ) -> Receipt:
        """A candidate's receipt; with an outcome, of one that moves nothing."""
        worker = self.sessions.workers[candidate.worker]
        receipt = self.ledger.receipt(candidate.identity, self.policy.name, lead=self.sessions.leads(worker))
        receipt.outcome, receipt.reason = outcome, reason
        receipt.staleness = max(0, self.ledger.version - candidate.header.base_version)
        receipt.times.receive_s = candidate.receive_s
        receipt.times.wait_s = candidate.waited_s + now_s - candidate.staged_s
        if candidate.push is not None:
            receipt.gradient_norm = candidate.push.norm
        if outcome:
            receipt.groups.extend(self.ledger.groups.messages())
        return receipt

    def _skip(self, candidates: Sequence[Candidate], now_s: float, reason: str = "") -> None:
        """Present, and nothing to apply."""
        for candidate in candidates:
            why = reason or candidate.skip_reason
            receipt = self._receipt(candidate, now_s, Outcome.OUTCOME_SKIPPED, why)
            self._consume(candidate, Verdict(candidate.digest, receipt))

    def _reject(
        self, candidates: Sequence[Candidate], error: PushstepError, now_s: float, *, blamed: bool = True
    ) -> None:
        """Refused. `blamed` False: for what they add up to, of which no worker's count of refusals may grow."""
        for candidate in candidates:
            receipt = self._receipt(candidate, now_s, Outcome.OUTCOME_REJECTED, error.code)
            self.note("push_rejected", candidate.worker, code=error.code)
            # a copy: the one that was raised holds, in its traceback, the push's whole body
            self._consume(candidate, Verdict(candidate.digest, receipt, refuse_consumed(copy.copy(error))))
            if blamed:
                self.count_refused(self.sessions.workers[candidate.worker])

    def _consume(self, candidate: Candidate, verdict: Verdict) -> None:
        self._decisions.append(self._settle(candidate, verdict))
        self._pass_on_next(candidate)

    def _settle(self, candidate: Candidate, verdict: Verdict) -> Settle:
        """Store the verdict: from here on the push is seen."""
        worker = self.sessions.workers[candidate.worker]
        self.sessions.consume(worker, verdict)
        self.policy.consumed(worker)
        if verdict.receipt.outcome != Outcome.OUTCOME_REJECTED:
            worker.refused_in_row = 0
        worker.staleness = verdict.receipt.staleness
        header = candidate.header
        state = header.worker_state if header.HasField("worker_state") else None
        self.sessions.carry(worker, header.metrics, state)
        return Settle(candidate, verdict)

    def _pass_on_next(self, candidate: Candidate) -> None:
        """The worker's next push, if it is here already."""
        worker = self.sessions.workers[candidate.worker]
        following = worker.held.get(worker.sequence + 1)
        if following is not None:
            self.pass_on(following)

    def count_refused(self, worker: Worker) -> None:
        """One refused push more in a row; quarantine at the limit."""
        worker.refused_in_row += 1
        limit = self.quality.settings.quarantine_after
        if limit is not None and worker.refused_in_row >= limit and not worker.quarantined:
            worker.quarantined = True
            worker.quarantines += 1
            self.note("worker_quarantined", "server", worker=worker.name, refused=worker.refused_in_row)
            held, worker.held = list(worker.held.values()), {}
            self.drop(held, lambda _: self.quarantined(worker))

    def quarantined(self, worker: Worker) -> Quarantined:
        """What a quarantined worker is told."""
        return Quarantined(
            worker=worker.name, count=worker.refused_in_row, model=self.ledger.name, times=worker.quarantines
        )

    def drop(self, candidates: Sequence[Candidate], why: Callable[[Candidate], PushstepError]) -> None:
        """Candidates that will never have a verdict."""
        for candidate in candidates:
            self.policy.drop(candidate)
            self._decisions.append(Settle(candidate, None, why(candidate)))
        old = self.combining
        if old is None or not any(c in candidates for c in (*old.candidates, *old.skips)):
            return
        # the round is added up again without them
        self.combining = None
        kept = tuple(c for c in old.candidates if c not in candidates)
        skips = tuple(c for c in old.skips if c not in candidates)
        self._play(Together(kept, old.mean, skips, old.notes), candidates[0].staged_s)

    def note(self, kind: str, by: str, **facts: Any) -> None:
        """Something for the model's events."""
        self._decisions.append(Note(kind, by, facts))


def refuse_consumed(error: PushstepError) -> PushstepError:
    """Mark an error as a verdict: its push took its sequence, and a retry gets the same error."""
    error.fields["consumed"] = "True"
    return error
