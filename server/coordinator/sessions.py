"""The workers of one model: their leases, epochs and sequences, and the receipts that make a retry harmless.

A synchronous state machine. A push is (worker, epoch, sequence). The pushes of an epoch are decided in the order of
their sequences, of which a few may be in flight at once. A sequence that was decided before is answered with the stored
outcome. A gap or an old epoch is refused. An epoch is never given out twice: a new name starts above the epochs of all
forgotten workers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pushstep.proto.errors import (
    AlreadyJoined,
    Conflict,
    Fenced,
    LeaseExpired,
    OutOfOrder,
    OverCapacity,
    TooManyInFlight,
    TooOld,
    UnknownWorker,
)
from pushstep.proto.types_pb2 import Identity

from ..counters.model_counts import OUTCOMES
from .leases import Leases
from .worker import RECEIPTS_KEPT, Decided, Worker, WorkerState

IN_FLIGHT: Final = 8
FORGET_AFTER_S: Final = 24 * 3600.0
LAST_SEQUENCE: Final = 2**64 - 1
# Estimated memory of a worker without what it sends, and of a receipt without its message. SPREAD is memory per byte on
# the wire: a parsed message takes four times its size, and so do bytes while a snapshot's manifest is made of them.
WORKER_BYTES: Final = 4096
RECEIPT_BYTES: Final = 1024
SPREAD: Final = 4


class Sessions:
    """The worker table of one model."""

    def __init__(
        self, lease_s: float, max_workers: int, model: str = "", max_bytes: int = sys.maxsize
    ) -> None:
        self.model = model
        self.lease_s = lease_s
        self.max_workers = max_workers
        self.max_bytes = max_bytes
        self.workers: dict[str, Worker] = {}
        # estimated memory of all workers together
        self.kept_bytes = 0
        # the highest epoch of any worker that was forgotten
        self.forgotten_epoch = 0
        # epochs up to here may have been given to workers that a crash has undone
        self.first_epoch = 0
        # pushes that came again, of all workers since this process knows the model
        self.duplicates = 0
        self._joins = 0
        self._lead: Worker | None = None
        self.leases = Leases(self.workers)
        # workers whose leases ran out since the last `take_expired`
        self.expired: list[Worker] = []
        # names of workers whose rows have changed since `take_changed`; a new outcome, or one more duplicate, is no change here
        self._changed: set[str] = set()

    def join(self, name: str, now_s: float, takeover: bool, attempt: int = 0, old_epoch: int = 0) -> Worker:
        """Open the next epoch under a name. AlreadyJoined while another session holds it, without `takeover`.

        An `attempt` that has come before opens no epoch: it gets the epoch that it opened. Fenced if a later join came, or
        the worker was evicted. `old_epoch`: the epoch of a caller that joins again. Such a caller needs no `takeover`. It is
        Fenced if it was evicted, or if another session has joined under the name since. OverCapacity if there is no room
        for a worker.
        """
        self.expire(now_s)
        worker = self.workers.get(name)
        if worker is None:
            self._require_room()
            self._forget(now_s)
            self._require_bytes(WORKER_BYTES)
            worker = self.workers[name] = Worker(name, epoch=max(self.forgotten_epoch, self.first_epoch))
            self._count(worker, WORKER_BYTES)
            worker.forgotten = self.forgotten_before
        elif attempt and attempt in worker.attempts:
            return self._joined_before(worker, attempt, now_s)
        itself = self._is_itself(worker, old_epoch)
        if worker.state is WorkerState.LIVE and not (takeover or itself):
            left_s = round(worker.lease_until_s - now_s, 3)
            raise AlreadyJoined(worker=name, retry_after_s=max(left_s, 0.001))
        if worker.state is not WorkerState.LIVE:
            self._require_room()
        worker.epoch += 1
        worker.session_epoch = worker.session_epoch if itself else worker.epoch
        worker.attempts.append(attempt)
        worker.sequence = 0
        worker.undecided, worker.receiving = {}, {}
        worker.state = WorkerState.LIVE
        self._joins += 1
        worker.joined = self._joins
        if self._lead is worker:
            self._lead = None  # who joins again comes last
        self._touch(worker, now_s)
        self.leases.watch(worker)
        self._changed.add(name)
        return worker

    def _require_room(self) -> None:
        """OverCapacity if `max_workers` workers are live."""
        live = self.live_count()
        if live >= self.max_workers:
            raise OverCapacity(
                problem=f"{live} workers of model {self.model!r} are live, no more are taken",
                setting="max-workers",
            )

    def _is_itself(self, worker: Worker, old_epoch: int) -> bool:
        """True if `old_epoch` belongs to the session that has the name.

        Fenced if another session has the name, or the worker was evicted. An eviction remains in force after a restore.
        """
        if not 0 < old_epoch <= worker.epoch:
            return False
        if old_epoch < worker.session_epoch:
            raise Fenced(worker=worker.name, epoch=old_epoch, why="another session joined under this name")
        if worker.state is WorkerState.EVICTED:
            raise Fenced(worker=worker.name, epoch=old_epoch, why="evicted by an operator")
        return True

    def _joined_before(self, worker: Worker, attempt: int, now_s: float) -> Worker:
        if attempt != worker.attempts[-1]:
            raise Fenced(worker=worker.name, epoch=0, why="a later join has replaced this one")
        if worker.state is WorkerState.EVICTED:
            raise Fenced(worker=worker.name, epoch=worker.epoch, why="evicted by an operator")
        if worker.state is WorkerState.LIVE:
            self._touch(worker, now_s)
        return worker

    def require(self, identity: Identity, now_s: float) -> Worker:
        """The live worker of `identity`, with its lease renewed. UnknownWorker, Fenced or LeaseExpired."""
        self.expire(now_s)
        worker = self.workers.get(identity.worker)
        if worker is None or identity.epoch > worker.epoch:
            raise UnknownWorker(model=self.model, worker=identity.worker)
        if worker.state is WorkerState.EVICTED:
            raise Fenced(worker=worker.name, epoch=identity.epoch, why="evicted by an operator")
        if identity.epoch < worker.epoch:
            raise Fenced(
                worker=worker.name, epoch=identity.epoch, why="another session joined under this name"
            )
        if worker.state is not WorkerState.LIVE:
            raise LeaseExpired(worker=worker.name, seconds=self.lease_s)
        self._touch(worker, now_s)
        return worker

    def renew(self, identity: Identity, now_s: float) -> None:
        """Renew a lease that has not run out. Does nothing for a worker without one."""
        worker = self.workers.get(identity.worker)
        if worker is None or worker.epoch != identity.epoch or worker.state is not WorkerState.LIVE:
            return
        if now_s <= worker.lease_until_s:
            self._touch(worker, now_s)

    def decided_before(self, worker: Worker, identity: Identity, digest: int | None = None) -> Decided | None:
        """The stored outcome of a sequence seen before; None if it is not decided yet.

        Raises TooOld, OutOfOrder or TooManyInFlight. Conflict if `digest` is given, and the stored one differs.
        """
        ahead = identity.sequence - worker.sequence
        if ahead > 1:
            self._require_in_window(worker, int(identity.sequence))
        if ahead > 0:
            return None
        if identity.sequence == 0:
            raise OutOfOrder(worker=worker.name, got=0, expected=worker.sequence + 1)
        decided = self.stored(worker, identity)
        if decided is not None:
            if digest is not None and digest != decided.digest:
                raise Conflict(worker=worker.name, sequence=identity.sequence)
            return decided
        oldest = worker.sequence - len(worker.decided_pushes) + 1
        raise TooOld(worker=worker.name, got=identity.sequence, oldest=oldest)

    def stored(self, worker: Worker, identity: Identity) -> Decided | None:
        """The outcome of a push; None if it has none or it is no longer kept."""
        for decided in reversed(worker.decided_pushes):
            if decided.receipt.identity == identity:
                return decided
        return None

    def _require_in_window(self, worker: Worker, sequence: int) -> None:
        """OutOfOrder if a sequence before this one is unknown. TooManyInFlight if it is too far ahead."""
        expected = worker.sequence + 1
        while expected < sequence and (expected in worker.undecided or expected in worker.receiving):
            expected += 1
        if expected < sequence:
            raise OutOfOrder(worker=worker.name, got=sequence, expected=expected)
        if sequence > worker.sequence + IN_FLIGHT:
            raise TooManyInFlight(worker=worker.name, limit=IN_FLIGHT, retry_after_s=0.05)

    def consume(self, worker: Worker, decided: Decided) -> None:
        """Store the outcome of the worker's next sequence."""
        worker.sequence = decided.receipt.identity.sequence
        worker.undecided.pop(worker.sequence, None)
        if len(worker.decided_pushes) == RECEIPTS_KEPT:
            oldest = worker.decided_pushes[0].receipt.identity
            worker.forgotten = max(worker.forgotten, (int(oldest.epoch), int(oldest.sequence)))
            self._count(worker, -worker.decided_pushes[0].kept_bytes)
        self._count_decided(worker, decided)
        worker.decided_pushes.append(decided)
        outcome = OUTCOMES[decided.receipt.outcome]
        worker.outcomes[outcome] = worker.outcomes.get(outcome, 0) + 1

    def _count_decided(self, worker: Worker, decided: Decided) -> None:
        decided.kept_bytes = RECEIPT_BYTES + SPREAD * decided.receipt.ByteSize()
        self._count(worker, decided.kept_bytes)

    def carry(self, worker: Worker, metrics: Mapping[str, float], state: bytes | None) -> None:
        """Keep the metrics and the worker state that a push brought. `state` None: the old state stays."""
        if state is None and not metrics and not worker.metrics:
            return
        before = _carried_bytes(worker)
        worker.metrics = dict(metrics)
        worker.worker_state = worker.worker_state if state is None else state
        self._count(worker, _carried_bytes(worker) - before)

    def require_room_for_state(self, worker: Worker, state: bytes, now_s: float) -> None:
        """OverCapacity if a larger state cannot be kept, even after absent workers are forgotten."""
        more = SPREAD * (len(state) - len(worker.worker_state))
        if more > 0 and self.kept_bytes + more > self.max_bytes:
            self._forget(now_s, more, but=worker)
            self._require_bytes(more)

    def _require_bytes(self, more_bytes: int) -> None:
        if self.kept_bytes + more_bytes > self.max_bytes:
            raise OverCapacity(
                problem=f"the workers of model {self.model!r}, their receipts and states take {self.kept_bytes} of "
                f"{self.max_bytes} bytes",
                setting="worker-bytes",
            )

    def _count(self, worker: Worker, more_bytes: int) -> None:
        worker.kept_bytes += more_bytes
        self.kept_bytes += more_bytes

    def duplicate(self, worker: Worker, decided: Decided | None = None) -> None:
        """Count a push that came again; `decided`: its outcome, if it has one."""
        worker.duplicates += 1
        self.duplicates += 1
        if decided is not None:
            decided.receipt.duplicates += 1

    def leaving(self, identity: Identity) -> Worker | None:
        """The live worker of `identity`; None if that epoch is over."""
        worker = self.workers.get(identity.worker)
        there = worker is not None and worker.epoch == identity.epoch and worker.state is WorkerState.LIVE
        return worker if there else None

    def leave(self, identity: Identity, now_s: float) -> None:
        """End an epoch. Leaving twice, or after expiry, changes nothing."""
        worker = self.leaving(identity)
        if worker is not None:
            worker.state = WorkerState.LEFT
            worker.last_seen_s = now_s
            self._changed.add(worker.name)

    def evict(self, name: str) -> Worker:
        """Fence a worker for an operator. It may join again in a new session. UnknownWorker."""
        worker = self.known(name)
        worker.state = WorkerState.EVICTED
        self._changed.add(name)
        return worker

    def known(self, name: str) -> Worker:
        """A worker by its name. UnknownWorker."""
        worker = self.workers.get(name)
        if worker is None:
            raise UnknownWorker(model=self.model, worker=name)
        return worker

    def close_epochs(self, first_epoch: int = 0) -> None:
        """End every epoch. Workers join again above `first_epoch`: a crash may have undone joins up to it."""
        self.first_epoch = max(self.first_epoch, first_epoch)
        for worker in self.workers.values():
            worker.epoch = max(worker.epoch, first_epoch)
            worker.undecided, worker.receiving = {}, {}
            if worker.state is WorkerState.LIVE:
                worker.state = WorkerState.LEFT
            self._changed.add(worker.name)

    def expire(self, now_s: float) -> None:
        """Mark the live workers whose leases have run out as expired."""
        if self.leases.end_after_s >= now_s:
            return  # this is called on every event
        while (first := self.leases.first()) is not None and first.lease_until_s < now_s:
            first.state = WorkerState.EXPIRED
            self._changed.add(first.name)
            self.expired.append(first)

    def take_expired(self) -> list[Worker]:
        """The workers whose leases ran out since the last call."""
        expired, self.expired = self.expired, []
        return expired

    @property
    def forgotten_before(self) -> tuple[int, int]:
        """The last push that a worker of a forgotten name may have made; (0, 0) if no name was forgotten."""
        return (self.forgotten_epoch, LAST_SEQUENCE) if self.forgotten_epoch else (0, 0)

    def live_count(self) -> int:
        """The number of live workers."""
        return sum(worker.state is WorkerState.LIVE for worker in self.workers.values())

    def live(self) -> list[Worker]:
        """The live workers, longest joined first."""
        found = [worker for worker in self.workers.values() if worker.state is WorkerState.LIVE]
        return sorted(found, key=lambda worker: worker.joined)

    def members(self) -> list[Worker]:
        """The workers that a policy counts: live and not quarantined, longest joined first."""
        return [worker for worker in self.live() if not worker.quarantined]

    def leads(self, worker: Worker) -> bool:
        """True for the lead, the longest-joined live worker. Only its hyperparameter edits count."""
        if self._lead is None or self._lead.state is not WorkerState.LIVE:
            # searched for only when the last lead is gone: this is called on every push
            live = self.live()
            self._lead = live[0] if live else None
        return self._lead is worker

    def dump(self) -> list[dict[str, Any]]:
        """The table as JSON, without times of this process's clock. It shares no object with the workers."""
        return [worker.dump() for worker in self.workers.values()]

    def mark_changed(self, *names: str) -> None:
        """Have the next `take_changed` return the rows of these workers, too."""
        self._changed.update(names)

    def take_changed(self) -> dict[str, dict[str, Any] | None]:
        """The rows that have changed since the last call, by name; None for a worker that was forgotten."""
        if not self._changed:
            return {}
        names, self._changed = self._changed, set()
        return {name: self.workers[name].dump() if name in self.workers else None for name in sorted(names)}

    def put(self, name: str, row: Mapping[str, Any] | None, now_s: float) -> None:
        """Replace a worker by what `take_changed` returned. Outcomes that are known already stay as they are."""
        known = self.workers.pop(name, None)
        if known is not None:
            self._count(known, -known.kept_bytes)
        self._lead = None
        if row is None:
            return
        held = {} if known is None else {decided.key: decided for decided in known.decided_pushes}
        self.parse([row], now_s, self.forgotten_epoch)
        worker = self.workers[name]
        for index, decided in enumerate(worker.decided_pushes):
            worker.decided_pushes[index] = held.get(decided.key, decided)

    def parse(self, dumped: Iterable[Mapping[str, Any]], now_s: float, forgotten_epoch: int = 0) -> None:
        """Load the table that `dump` wrote. Workers that were live get a fresh lease."""
        self.forgotten_epoch = forgotten_epoch
        for entry in dumped:
            worker = Worker.parsed(entry)
            for decided in worker.decided_pushes:
                self._count_decided(worker, decided)
            self._count(worker, WORKER_BYTES + _carried_bytes(worker))
            self._touch(worker, now_s)
            self._joins = max(self._joins, worker.joined)
            self.workers[worker.name] = worker
            if worker.state is WorkerState.LIVE:
                self.leases.watch(worker)

    def _touch(self, worker: Worker, now_s: float) -> None:
        worker.last_seen_s = now_s
        worker.lease_until_s = now_s + self.lease_s

    def _forget(self, now_s: float, more_bytes: int = WORKER_BYTES, but: Worker | None = None) -> None:
        """Forget workers absent for `FORGET_AFTER_S`. Then forget the longest absent ones until there is room.

        There is room if one more worker fits into `max_workers`, and `more_bytes` into `max_bytes`. Never forgets `but`.
        """
        gone = [w for w in self.workers.values() if w.state is not WorkerState.LIVE and w is not but]
        absent = sorted((w for w in gone if not w.undecided), key=lambda worker: worker.last_seen_s)
        surplus = len(self.workers) + 1 - self.max_workers
        for index, worker in enumerate(absent):
            is_crowded = index < surplus or self.kept_bytes + more_bytes > self.max_bytes
            if is_crowded or now_s - worker.last_seen_s > FORGET_AFTER_S:
                self.forgotten_epoch = max(self.forgotten_epoch, worker.epoch)
                self._count(worker, -worker.kept_bytes)
                del self.workers[worker.name]
                self._changed.add(worker.name)


def _carried_bytes(worker: Worker) -> int:
    return SPREAD * (len(worker.worker_state) + sum(len(name) + 8 for name in worker.metrics))
