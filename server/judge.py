"""The judge of one model: session, gate and policy behind one front, as one synchronous state machine.

Events and the time go in, decisions come out; there is no await, thread, clock or I/O inside. A push comes twice:
its header is `offered`, which says whether to read the body, and the complete body is `staged`. From then on it is a
candidate, held by its worker until it has a verdict. Candidates of one worker go through the gate and to the policy
in the order of their sequences, one at a time; the policy steps them alone or together. A round's pushes are added up
outside (`Combine`), and come back by `combined`: only then is its ticket written, so that hooks see the norm of what
is stepped. Every ticket is the version after the last one, in the order in which they leave here.

Whatever an event leads to is in what it returns: carry it out in order (executor.py does, and the tests' simulator),
then offer again whoever was told to wait. Call `tick` when `next_s` has come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pushstep.proto.errors import (
    Conflict,
    Fenced,
    ModelLost,
    NotHeld,
    OutOfOrder,
    PushstepError,
    Superseded,
    UnknownWorker,
)
from pushstep.proto.hyperparameters import Values
from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.types_pb2 import Identity, Outcome, Receipt

from . import policies
from .candidate import Candidate
from .decision import Combine, Decision, Offer
from .docket import Docket
from .ledger import Ledger
from .policy import Policy
from .quality import Quality
from .session import Sessions
from .staging import StagedPush
from .worker import Verdict, Worker


class Judge:
    """Decides who is in, what is let through, and what is stepped when."""

    def __init__(self, uid: bytes, ledger: Ledger, sessions: Sessions) -> None:
        self.name = ledger.name
        self.uid = uid
        self.ledger = ledger
        self.sessions = sessions
        self.docket = Docket(ledger, sessions)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.docket.policy

    @property
    def quality(self) -> Quality:
        """The gate's settings, and what it has learned."""
        return self.docket.quality

    @quality.setter
    def quality(self, quality: Quality) -> None:
        self.docket.quality = quality

    # Events of a push.

    def require_current(self, identity: Identity) -> None:
        """ModelLost or Superseded unless `identity` is of this model on this timeline."""
        if identity.model_uid != self.uid:
            raise ModelLost(model=self.name)
        if identity.timeline != self.ledger.timeline:
            raise Superseded(model=self.name, timeline=self.ledger.timeline, got=identity.timeline)

    def offered(self, header: PushHeader, now_s: float) -> Offer:
        """A header has come: read its body, or wait. Every READ is followed by `staged` or `withdrawn`.

        A push that was seen before is read too, to be compared. Raises what the push is refused with; nothing is
        consumed by that.
        """
        worker, seen = self._who(header.identity, None, now_s)
        self._require_free(worker)
        sequence = int(header.identity.sequence)
        if not seen and sequence not in worker.held:
            ahead = sequence - 1 - worker.sequence
            if not self.policy.admits(worker, ahead, self.docket.view(now_s)):
                return Offer.WAIT
        worker.coming[sequence] = worker.coming.get(sequence, 0) + 1
        return Offer.READ

    def require_open(self, identity: Identity) -> None:
        """Quarantined for a stream whose worker's pushes are no longer read."""
        worker = self.sessions.workers.get(identity.worker)
        if worker is not None:
            self._require_free(worker)

    def moved(self, identity: Identity, now_s: float) -> None:
        """A body of this worker moves, however slowly: its lease does not run out meanwhile."""
        self.sessions.renew(identity, now_s)

    def _require_free(self, worker: Worker) -> None:
        if worker.quarantined:
            raise self.docket.quarantined(worker)

    def withdrawn(self, identity: Identity) -> None:
        """The stream that was bringing a body has ended, with or without it."""
        worker = self.sessions.workers.get(identity.worker)
        if worker is None or worker.epoch != identity.epoch:
            return
        left = worker.coming.pop(identity.sequence, 0) - 1
        if left > 0:
            worker.coming[identity.sequence] = left

    def reattached(self, header: PushHeader, now_s: float) -> None:
        """A retry without its body: of a push that is held or was decided. NotHeld otherwise."""
        digest = header.held_digest
        worker, seen = self._who(header.identity, digest, now_s)
        candidate = worker.held.get(header.identity.sequence)
        if not seen and (candidate is None or candidate.digest != digest):
            raise NotHeld(worker=worker.name, sequence=header.identity.sequence)

    def staged(self, candidate: Candidate, now_s: float) -> list[Decision]:
        """A body is complete (or at fault). Its verdict is among the decisions, or comes with later ones.

        A push that is held already is compared and not taken twice. Raises Conflict and whatever `offered` does.
        """
        worker, seen = self._who(candidate.identity, candidate.digest, now_s)
        sequence = int(candidate.identity.sequence)
        held = worker.held.get(sequence)
        if seen:
            return []
        if held is not None:
            if held.digest != candidate.digest:
                raise Conflict(worker=worker.name, sequence=sequence)
            worker.duplicates += 1
            return []
        self._require_free(worker)
        self.sessions.require_room_for_state(worker, candidate.header.worker_state, now_s)
        candidate.staged_s, candidate.taken = now_s, True
        worker.held[sequence] = candidate
        if sequence == worker.sequence + 1:
            self.docket.pass_on(candidate)
        else:
            self.docket.parked.append(candidate)
        return self.docket.conclude(now_s)

    def verdict_of(self, identity: Identity) -> Verdict | None:
        """The stored verdict of a push; None while it has none."""
        worker = self.sessions.workers.get(identity.worker)
        return None if worker is None else self.sessions.stored(worker, identity)

    def combined(self, combine: Combine, result: StagedPush | PushstepError, now_s: float) -> list[Decision]:
        """A round's pushes have been added up, or could not be."""
        self.docket.combined(combine, result, now_s)
        return self.docket.conclude(now_s)

    def faulted(self, identity: Identity, error: PushstepError, now_s: float) -> list[Decision]:
        """A push broke a rule before it was complete. It consumes nothing, and counts against its worker."""
        worker = self.sessions.workers.get(identity.worker)
        if worker is not None and worker.epoch == identity.epoch and not worker.quarantined:
            self.docket.note("push_refused", worker.name, code=error.code)
            self.docket.count_refused(worker)
        return self.docket.conclude(now_s)

    # Events of members and of time.

    def join(
        self, name: str, now_s: float, takeover: bool, attempt: int = 0, old_epoch: int = 0
    ) -> tuple[Worker, list[Decision]]:
        """Open the next epoch under a name; what the last one left undecided is never applied. AlreadyJoined.

        An `attempt` that has come before changes nothing. `old_epoch`: the caller's, which joins over itself.
        """
        known = self.sessions.workers.get(name)
        epoch, left = (0, []) if known is None else (known.epoch, list(known.held.values()))
        worker = self.sessions.join(name, now_s, takeover, attempt, old_epoch)
        if worker.epoch != epoch:
            why = "another session joined under this name"
            self.docket.drop(left, lambda c: Fenced(worker=name, epoch=c.identity.epoch, why=why))
        return worker, self.docket.conclude(now_s)

    def receipts_of(self, worker: Worker) -> list[Receipt]:
        """What a worker that joins is told of its last pushes: of one that a restore has undone, that it was."""
        return [self._as_of_now(verdict.receipt) for verdict in worker.verdicts]

    def _as_of_now(self, receipt: Receipt) -> Receipt:
        applied = receipt.outcome == Outcome.OUTCOME_APPLIED
        if not applied or self.ledger.holds(receipt.identity.timeline, receipt.version):
            return receipt
        undone = Receipt()
        undone.CopyFrom(receipt)
        undone.outcome, undone.reason = Outcome.OUTCOME_SUPERSEDED, Superseded.code
        return undone

    def heard(self, identity: Identity, now_s: float) -> list[Decision]:
        """A worker shows that it lives. What `offered` raises about who it is."""
        self.require_current(identity)
        self.sessions.require(identity, now_s)
        return self.docket.conclude(now_s)

    def left(
        self,
        identity: Identity,
        now_s: float,
        edits: Mapping[int, Values] | None = None,
        worker_state: bytes | None = None,
    ) -> tuple[list[str], list[Decision]]:
        """A worker goes; what it has handed in stays, and what no push of its has carried is taken.

        The names of the `edits` that did not count: only the lead's do. Of an epoch that is over nothing is taken, and
        nothing is said of it if another session has the name by now: that one goes on with edits of its own.
        OverCapacity, and it stays, if its state cannot be kept.
        """
        known = self.sessions.workers.get(identity.worker)
        if known is not None and known.epoch > identity.epoch:
            return [], self.docket.conclude(now_s)
        edits = edits or {}
        current = identity.timeline == self.ledger.timeline
        worker = self.sessions.leaving(identity) if current else None
        if worker is not None and worker_state is not None:
            self.sessions.require_room_for_state(worker, worker_state, now_s)
        lead = worker is not None and not worker.quarantined and self.sessions.leads(worker)
        ignored = self.ledger.edit(edits, lead=lead)
        if worker is not None:
            self.sessions.carry(worker, worker.metrics, worker_state)
            self.sessions.leave(identity, now_s)
        return ignored, self.docket.conclude(now_s)

    def evicted(self, name: str, now_s: float) -> list[Decision]:
        """An operator fences a worker; what it has handed in is not applied. UnknownWorker."""
        worker = self.sessions.evict(name)
        held = list(worker.held.values())
        worker.held, worker.coming = {}, {}
        self.docket.drop(
            held, lambda c: Fenced(worker=name, epoch=c.identity.epoch, why="evicted by an operator")
        )
        return self.docket.conclude(now_s)

    def released(self, name: str, now_s: float) -> list[Decision]:
        """An operator lets a worker out of quarantine. UnknownWorker."""
        worker = self.sessions.workers.get(name)
        if worker is None:
            raise UnknownWorker(model=self.name, worker=name)
        worker.quarantined, worker.refused_in_row = False, 0
        return self.docket.conclude(now_s)

    def tick(self, now_s: float) -> list[Decision]:
        """Time has passed."""
        return self.docket.conclude(now_s)

    def next_s(self) -> float | None:
        """When to `tick` although nothing happens: a round's time-out, or the end of a lease."""
        due = self.policy.deadline_s(), self.sessions.first_lease_s()
        return min((due_s for due_s in due if due_s is not None), default=None)

    # Edits.

    def uploaded(
        self, identity: Identity, digest: int, now_s: float
    ) -> tuple[Verdict, list[Decision] | None]:
        """A worker's values replace parameters: a version of its own. None for decisions if it was seen before."""
        worker, seen = self._who(identity, digest, now_s)
        if seen:
            return seen, None
        self._require_free(worker)
        if identity.sequence in worker.held:
            raise Conflict(worker=worker.name, sequence=identity.sequence)
        if identity.sequence != worker.sequence + 1:
            raise OutOfOrder(worker=worker.name, got=identity.sequence, expected=worker.sequence + 1)
        self.ledger.version += 1
        receipt = self.ledger.receipt(identity, self.policy.name, lead=self.sessions.leads(worker))
        receipt.outcome = Outcome.OUTCOME_APPLIED
        receipt.groups.extend(self.ledger.groups.messages())
        verdict = Verdict(digest, receipt)
        self.sessions.consume(worker, verdict)
        self.policy.consumed(worker)
        return verdict, self.docket.conclude(now_s)

    def switch(self, settings: policies.Settings, now_s: float) -> list[Decision]:
        """Go on under another policy, or under other settings of this one. No push is lost."""
        if settings.policy == self.policy.name:
            self.policy.adopt(settings)
        else:
            self.docket.replace_policy(policies.make(settings), now_s)
        return self.docket.conclude(now_s)

    def restored(
        self,
        lineage: Sequence[tuple[int, int]],
        timeline: int,
        settings: policies.Settings,
        now_s: float,
    ) -> list[Decision]:
        """The model has become the last state of `lineage`: every epoch and everything undecided ends."""
        ended = [c for worker in self.sessions.workers.values() for c in worker.held.values()]
        self.sessions.close_epochs()
        self.ledger.go_back(lineage, timeline)
        self.docket.start_over(policies.make(settings))
        self.docket.drop(
            ended, lambda c: Superseded(model=self.name, timeline=timeline, got=c.identity.timeline)
        )
        return self.docket.conclude(now_s)

    # Inside.

    def _who(self, identity: Identity, digest: int | None, now_s: float) -> tuple[Worker, Verdict | None]:
        self.require_current(identity)
        worker = self.sessions.require(identity, now_s)
        seen = self.sessions.judged(worker, identity, digest)
        if seen is not None and digest is not None:
            self.sessions.duplicate(worker, seen)
        return worker, seen
