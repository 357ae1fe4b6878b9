"""The coordinator of one model: sessions, gate and policy as one synchronous state machine.

The caller passes in events and the time, and gets decisions back. There is no await, thread, clock or I/O inside. A
push comes in two events: `on_header` says whether to read the body, and `on_body` takes the complete body. From then
on the push is pending: its worker holds it until it has an outcome. Pending pushes of one worker pass the gate and
reach the policy in the order of their sequences, one at a time. The policy steps them alone or as a round. A round's
pushes are added up outside (`Reduce`), and the sum comes back by `reduced`. Only then is the round's ticket written,
so that hooks see the norm of what is stepped. Each ticket makes the next version, in the order in which the tickets
leave here.

An event returns all decisions that it leads to. The caller applies them in order (models/executor.py), then offers
again each header that was told to wait. It calls `tick` at `next_s`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pushstep.proto.errors import (
    Conflict,
    Fenced,
    ModelLost,
    NotHeld,
    OutOfOrder,
    PushstepError,
    Superseded,
)
from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.types_pb2 import OUTCOME_APPLIED, Identity, Receipt
from pushstep.proto.wire.hyperparameters import Values

from ..staging.gradient import StagedPush
from .commits import Commits
from .decision import Decision, Offer, Reduce
from .gate import Gate
from .pending import PendingPushes
from .policies import catalogue as policies
from .policies.policy import Policy, PolicySettings
from .push import PendingPush
from .receipts import superseded, take_over_receipts
from .sessions import Sessions
from .worker import Decided, Worker, WorkerState


class Coordinator:
    """Decides which workers are members, which pushes are let in, and when they are stepped."""

    def __init__(self, uid: bytes, commits: Commits, sessions: Sessions) -> None:
        self.name = commits.name
        self.uid = uid
        self.commits = commits
        self.sessions = sessions
        self.pending_pushes = PendingPushes(commits, sessions)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.pending_pushes.policy

    @property
    def gate(self) -> Gate:
        """The gate: its settings, and its estimate of the norms."""
        return self.pending_pushes.gate

    @gate.setter
    def gate(self, gate: Gate) -> None:
        self.pending_pushes.gate = gate

    # Events of a push.

    def require_current(self, identity: Identity) -> None:
        """ModelLost or Superseded unless `identity` is of this model on this timeline."""
        if identity.model_uid != self.uid:
            raise ModelLost(model=self.name)
        if identity.timeline != self.commits.timeline:
            raise Superseded(model=self.name, timeline=self.commits.timeline, got=identity.timeline)

    def has_live(self, identity: Identity, now_s: float) -> bool:
        """True if the epoch of `identity` is a member's on this timeline, and its lease runs."""
        worker = self.sessions.workers.get(identity.worker)
        return (
            identity.timeline == self.commits.timeline
            and worker is not None
            and worker.epoch == identity.epoch
            and worker.state is WorkerState.LIVE
            and now_s <= worker.lease_until_s
        )

    def on_header(self, header: PushHeader, now_s: float) -> Offer:
        """A header has come: says whether to read its body or to wait. `on_stream_end` follows every READ.

        The body of a push that was seen before is read too, so that its digest can be compared. Raises the error that
        the push is refused with; such a push consumes no sequence.
        """
        worker, seen = self._who(header.identity, None, now_s)
        self._require_free(worker)
        sequence = int(header.identity.sequence)
        if not seen and sequence not in worker.undecided:
            ahead = sequence - 1 - worker.sequence
            if not self.policy.admits(worker, ahead, self.pending_pushes.view(now_s)):
                return Offer.WAIT
        worker.receiving[sequence] = worker.receiving.get(sequence, 0) + 1
        return Offer.READ

    def on_chunk(self, identity: Identity, now_s: float) -> None:
        """A chunk of a push's body has come. Renews the lease of its worker.

        Quarantined if the pushes of its worker are no longer read.
        """
        worker = self.sessions.workers.get(identity.worker)
        if worker is not None:
            self._require_free(worker)
            self.sessions.renew(identity, now_s)

    def on_progress(self, identity: Identity, now_s: float) -> None:
        """An upload of this worker moves, however slowly. Renews its lease, which could run out meanwhile."""
        self.sessions.renew(identity, now_s)

    def _require_free(self, worker: Worker) -> None:
        if worker.quarantined:
            raise self.pending_pushes.quarantined(worker)

    def on_stream_end(self, identity: Identity) -> None:
        """The stream of a push has ended, with or without a complete body."""
        worker = self.sessions.workers.get(identity.worker)
        if worker is None or worker.epoch != identity.epoch:
            return
        left = worker.receiving.pop(identity.sequence, 0) - 1
        if left > 0:
            worker.receiving[identity.sequence] = left

    def on_retry(self, header: PushHeader, now_s: float) -> None:
        """A retry without its body has come. NotHeld unless the push is pending here or was decided."""
        digest = header.held_digest
        worker, seen = self._who(header.identity, digest, now_s)
        pending = worker.undecided.get(header.identity.sequence)
        if not seen and (pending is None or pending.digest != digest):
            raise NotHeld(worker=worker.name, sequence=header.identity.sequence)

    def on_body(self, pending: PendingPush, now_s: float) -> list[Decision]:
        """A body is complete (or at fault). Its outcome is among the decisions, or comes with later ones.

        A push that is pending already is compared by its digest and not taken twice. Raises Conflict, OverCapacity if
        its worker's state cannot be kept, and whatever `on_header` raises.
        """
        worker, seen = self._who(pending.identity, pending.digest, now_s)
        sequence = int(pending.identity.sequence)
        held = worker.undecided.get(sequence)
        if seen:
            return []
        if held is not None:
            if held.digest != pending.digest:
                raise Conflict(worker=worker.name, sequence=sequence)
            self.sessions.duplicate(worker)
            return []
        self._require_free(worker)
        self.sessions.require_room_for_state(worker, pending.header.worker_state, now_s)
        pending.staged_s, pending.accepted = now_s, True
        worker.undecided[sequence] = pending
        if sequence == worker.sequence + 1:
            self.pending_pushes.pass_on(pending, now_s)
        else:
            self.pending_pushes.parked.append(pending)
        return self.pending_pushes.conclude(now_s)

    def decided_of(self, identity: Identity) -> Decided | None:
        """The stored outcome of a push; None while it has none."""
        worker = self.sessions.workers.get(identity.worker)
        return None if worker is None else self.sessions.stored(worker, identity)

    def reduced(self, reduce: Reduce, result: StagedPush | PushstepError, now_s: float) -> list[Decision]:
        """A round's pushes have been added up, or could not be: `result` is the sum or the error."""
        self.pending_pushes.reduced(reduce, result, now_s)
        return self.pending_pushes.conclude(now_s)

    def on_fault(self, identity: Identity, error: PushstepError, now_s: float) -> list[Decision]:
        """A push broke a rule before its body was complete. It consumes no sequence and counts as refused."""
        worker = self.sessions.workers.get(identity.worker)
        if worker is not None and worker.epoch == identity.epoch and not worker.quarantined:
            self.pending_pushes.record("push_refused", worker.name, code=error.code)
            self.pending_pushes.count_refused(worker, now_s)
        return self.pending_pushes.conclude(now_s)

    # Events of members and of time.

    def join(
        self, name: str, now_s: float, takeover: bool, attempt: int = 0, old_epoch: int = 0
    ) -> tuple[Worker, list[Decision]]:
        """Open the next epoch under a name. Pushes that the last epoch left undecided are never applied.

        An `attempt` that has come before changes nothing. `old_epoch`: the epoch that the caller has, if it joins
        again. Raises AlreadyJoined, Fenced or OverCapacity (see `Sessions.join`).
        """
        known = self.sessions.workers.get(name)
        epoch, left = (0, []) if known is None else (known.epoch, list(known.undecided.values()))
        worker = self.sessions.join(name, now_s, takeover, attempt, old_epoch)
        if worker.epoch != epoch:
            worker.base_version = self.commits.version  # it takes this version along, and is behind nothing
            why = "another session joined under this name"
            self.pending_pushes.drop(
                left, lambda c: Fenced(worker=name, epoch=c.identity.epoch, why=why), now_s
            )
        return worker, self.pending_pushes.conclude(now_s)

    def receipts_of(self, worker: Worker) -> list[Receipt]:
        """The last receipts of a worker that joins. One whose step a restore has undone says `superseded`."""
        return [self._as_of_now(decided.receipt) for decided in worker.decided_pushes]

    def _as_of_now(self, receipt: Receipt) -> Receipt:
        applied = receipt.outcome == OUTCOME_APPLIED
        if not applied or self.commits.holds(receipt.identity.timeline, receipt.version):
            return receipt
        return superseded(receipt)

    def on_heartbeat(self, identity: Identity, now_s: float) -> list[Decision]:
        """A worker shows that it lives. Renews its lease. Raises what `on_header` raises about identity."""
        self.require_current(identity)
        self.sessions.require(identity, now_s)
        return self.pending_pushes.conclude(now_s)

    def on_leave(
        self,
        identity: Identity,
        now_s: float,
        edits: Mapping[int, Values] | None = None,
        worker_state: bytes | None = None,
    ) -> tuple[list[str], list[Decision]]:
        """A worker leaves. Its pending pushes stay. Takes `edits` and `worker_state` that no push carried.

        Returns the names of the edits that did not count (only the lead's count), and the decisions. Nothing is taken
        from an epoch that is over. If another session has the name by now, no names are returned either: that session
        continues with edits of its own. Raises OverCapacity, and the worker stays, if its state cannot be kept.
        """
        known = self.sessions.workers.get(identity.worker)
        if known is not None and known.epoch > identity.epoch:
            return [], self.pending_pushes.conclude(now_s)
        edits = edits or {}
        current = identity.timeline == self.commits.timeline
        worker = self.sessions.leaving(identity) if current else None
        if worker is not None and worker_state is not None:
            self.sessions.require_room_for_state(worker, worker_state, now_s)
        lead = worker is not None and not worker.quarantined and self.sessions.leads(worker)
        ignored = self.commits.edit(edits, lead=lead)
        if worker is not None:
            self.sessions.carry(worker, worker.metrics, worker_state)
            self.sessions.leave(identity, now_s)
        return ignored, self.pending_pushes.conclude(now_s)

    def evicted(self, name: str, now_s: float) -> list[Decision]:
        """An operator fences a worker. Its pending pushes are not applied. UnknownWorker."""
        worker = self.sessions.evict(name)
        held = list(worker.undecided.values())
        worker.undecided, worker.receiving = {}, {}
        self.pending_pushes.drop(
            held, lambda c: Fenced(worker=name, epoch=c.identity.epoch, why="evicted by an operator"), now_s
        )
        return self.pending_pushes.conclude(now_s)

    def quarantine(self, name: str, now_s: float) -> list[Decision]:
        """An operator quarantines a worker. Its pending pushes are not applied. UnknownWorker."""
        self.pending_pushes.quarantine(self.sessions.known(name), now_s, by_hand=True)
        return self.pending_pushes.conclude(now_s)

    def released(self, name: str, now_s: float) -> list[Decision]:
        """An operator releases a worker from quarantine. UnknownWorker."""
        worker = self.sessions.known(name)
        worker.quarantined, worker.quarantined_by_hand, worker.refused_in_row = False, False, 0
        self.sessions.mark_changed(name)
        return self.pending_pushes.conclude(now_s)

    def tick(self, now_s: float) -> list[Decision]:
        """Time has passed: returns the decisions that it alone leads to."""
        return self.pending_pushes.conclude(now_s)

    def next_s(self) -> float | None:
        """When to `tick` if no event comes: at a round's time-out or the end of a lease. None without."""
        deadline_s, lease_s = self.policy.deadline_s(), self.sessions.leases.first_s()
        if deadline_s is None or lease_s is None:
            return lease_s if deadline_s is None else deadline_s
        return min(deadline_s, lease_s)

    def not_due_before_s(self) -> float:
        """A time before which no `tick` is due. It costs less than `next_s`, and may be too early."""
        deadline_s, lease_s = self.policy.deadline_s(), self.sessions.leases.end_after_s
        return lease_s if deadline_s is None else min(deadline_s, lease_s)

    # Edits.

    def uploaded(
        self, identity: Identity, digest: int, now_s: float
    ) -> tuple[Decided, list[Decision] | None]:
        """A worker's values replace parameters, which makes a version.

        The decisions are None if the upload was seen before. Raises Quarantined, Conflict, OutOfOrder, and what
        `on_header` raises about the identity.
        """
        worker, seen = self._who(identity, digest, now_s)
        if seen:
            return seen, None
        self._require_free(worker)
        if identity.sequence in worker.undecided:
            raise Conflict(worker=worker.name, sequence=identity.sequence)
        if identity.sequence != worker.sequence + 1:
            raise OutOfOrder(worker=worker.name, got=identity.sequence, expected=worker.sequence + 1)
        self.commits.version += 1
        decided = Decided(digest, self.pending_pushes.receipts.of_upload(identity, worker, self.policy.name))
        self.sessions.consume(worker, decided)
        self.policy.consumed(worker)
        return decided, self.pending_pushes.conclude(now_s)

    def switch(self, settings: PolicySettings, now_s: float) -> list[Decision]:
        """Continue under another policy, or under other settings of this one. No push is lost."""
        if settings.policy == self.policy.name:
            self.policy.adopt(settings)
        else:
            self.pending_pushes.replace_policy(policies.make(settings), now_s)
        return self.pending_pushes.conclude(now_s)

    def restored(
        self,
        lineage: Sequence[tuple[int, int]],
        timeline: int,
        settings: PolicySettings,
        now_s: float,
        workers: Iterable[Mapping[str, Any]] = (),
    ) -> list[Decision]:
        """The model was restored to the end of `lineage`. Every epoch ends; pending pushes get Superseded.

        `workers`: the snapshot's worker table, for receipts that are known there alone.
        """
        ended = [c for worker in self.sessions.workers.values() for c in worker.undecided.values()]
        self.sessions.close_epochs()
        self.commits.go_back(lineage, timeline)
        self.pending_pushes.start_over(policies.make(settings))
        self.pending_pushes.drop(
            ended, lambda c: Superseded(model=self.name, timeline=timeline, got=c.identity.timeline), now_s
        )
        take_over_receipts(self.sessions, workers, now_s)
        return self.pending_pushes.conclude(now_s)

    # Inside.

    def _who(self, identity: Identity, digest: int | None, now_s: float) -> tuple[Worker, Decided | None]:
        self.require_current(identity)
        worker = self.sessions.require(identity, now_s)
        seen = self.sessions.decided_before(worker, identity, digest)
        if seen is not None and digest is not None:
            self.sessions.duplicate(worker, seen)
        return worker, seen
