"""Who is pushing: workers, their epochs and sequences, and the receipts that make a retry harmless.

A synchronous state machine: events and the time go in, decisions come out; no clock, thread or I/O inside. A push is
(worker, epoch, sequence). The next sequence is judged, one that was judged before is answered with the stored
verdict, a gap or an old epoch is refused. A few sequences may be on their way at once; they are judged in order.
An epoch is never given out twice: whoever comes after a worker that was forgotten begins above its epochs.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pushstep.proto.errors import (
    CATALOGUE,
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
from pushstep.proto.training_pb2 import Process
from pushstep.proto.types_pb2 import Identity, Outcome, Receipt

from .worker import RECEIPTS_KEPT, Verdict, Worker, WorkerState

IN_FLIGHT: Final = 8
FORGET_AFTER_S: Final = 24 * 3600.0
LAST_SEQUENCE: Final = 2**64 - 1
# What a worker takes beside what it sends, and a receipt beside what is written of it. A message takes four times as much
# in memory as on the wire, and what is bytes the same when a snapshot's manifest is made of it.
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
        # what they take together
        self.kept_bytes = 0
        # the highest one of a worker that was forgotten
        self.forgotten_epoch = 0
        self._joins = 0
        self._lead: Worker | None = None
        # (when, whose) of each live worker: not before then can its lease have run out
        self._leases: list[tuple[float, str]] = []
        # whose leases ran out since `take_expired`
        self._expired: list[Worker] = []

    def join(self, name: str, now_s: float, takeover: bool, attempt: int = 0, old_epoch: int = 0) -> Worker:
        """Open the next epoch under a name. AlreadyJoined while another holds it, unless taken over; OverCapacity.

        An `attempt` that has come before opens none: it has its epoch, or is Fenced if that is over. `old_epoch`: the
        caller's, if it joins again; Fenced if it was evicted, or another session has joined under the name since.
        """
        self.expire(now_s)
        worker = self.workers.get(name)
        if worker is None:
            self._require_room()
            self._forget(now_s)
            self._require_bytes(WORKER_BYTES)
            worker = self.workers[name] = Worker(name, epoch=self.forgotten_epoch)
            self._count(worker, WORKER_BYTES)
            if self.forgotten_epoch:
                worker.forgotten = self.forgotten_epoch, LAST_SEQUENCE
        elif attempt and attempt in worker.attempts:
            return self._joined_before(worker, attempt, now_s)
        itself = self._is_itself(worker, old_epoch)
        if worker.state is WorkerState.LIVE and not (takeover or itself):
            left_s = round(worker.lease_until_s - now_s, 3)
            raise AlreadyJoined(worker=name, retry_after_s=max(left_s, 0.001))
        if worker.state is not WorkerState.LIVE:
            self._require_room()
        worker.epoch += 1
        worker.since = worker.since if itself else worker.epoch
        worker.attempts.append(attempt)
        worker.sequence = 0
        worker.held, worker.coming = {}, {}
        worker.state = WorkerState.LIVE
        self._joins += 1
        worker.joined = self._joins
        if self._lead is worker:
            self._lead = None  # it joined anew, behind the others
        self._touch(worker, now_s)
        self._watch(worker)
        return worker

    def _require_room(self) -> None:
        """OverCapacity if as many workers are live as may be."""
        live = self.live_count()
        if live >= self.max_workers:
            raise OverCapacity(
                problem=f"{live} workers of model {self.model!r} are live, no more are taken",
                setting="max-workers",
            )

    def _is_itself(self, worker: Worker, old_epoch: int) -> bool:
        """Whether the caller, who had `old_epoch`, has the name still. A restore does not lift a fence."""
        if not 0 < old_epoch <= worker.epoch:
            return False
        if old_epoch < worker.since:
            raise Fenced(worker=worker.name, epoch=old_epoch, why="another session joined under this name")
        if worker.state is WorkerState.EVICTED:
            raise Fenced(worker=worker.name, epoch=old_epoch, why="evicted by an operator")
        return True

    def _joined_before(self, worker: Worker, attempt: int, now_s: float) -> Worker:
        if attempt != worker.attempts[-1]:
            raise Fenced(
                worker=worker.name, epoch=0, why="this join was answered, and another one came after it"
            )
        if worker.state is WorkerState.EVICTED:
            raise Fenced(worker=worker.name, epoch=worker.epoch, why="evicted by an operator")
        if worker.state is WorkerState.LIVE:
            self._touch(worker, now_s)
        return worker

    def require(self, identity: Identity, now_s: float) -> Worker:
        """The live worker that `identity` is; its lease starts anew. UnknownWorker, Fenced or LeaseExpired."""
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
        """Begin a lease anew that has not run out; nothing for who has none."""
        worker = self.workers.get(identity.worker)
        if worker is None or worker.epoch != identity.epoch or worker.state is not WorkerState.LIVE:
            return
        if now_s <= worker.lease_until_s:
            self._touch(worker, now_s)

    def judged(self, worker: Worker, identity: Identity, digest: int | None = None) -> Verdict | None:
        """The stored verdict of a sequence seen before, or None if it is the next one.

        `digest` None: not known yet (only the header has arrived). TooOld, OutOfOrder or Conflict otherwise.
        """
        if identity.sequence > worker.sequence:
            self._require_in_window(worker, int(identity.sequence))
            return None
        if identity.sequence == 0:
            raise OutOfOrder(worker=worker.name, got=0, expected=worker.sequence + 1)
        verdict = self.stored(worker, identity)
        if verdict is not None:
            if digest is not None and digest != verdict.digest:
                raise Conflict(worker=worker.name, sequence=identity.sequence)
            return verdict
        oldest = worker.sequence - len(worker.verdicts) + 1
        raise TooOld(worker=worker.name, got=identity.sequence, oldest=oldest)

    def stored(self, worker: Worker, identity: Identity) -> Verdict | None:
        """The verdict of a push, if it has one that is still kept."""
        return next((v for v in reversed(worker.verdicts) if v.receipt.identity == identity), None)

    def _require_in_window(self, worker: Worker, sequence: int) -> None:
        """OutOfOrder, or TooManyInFlight, unless all before `sequence` are known and it is one of the next few."""
        expected = worker.sequence + 1
        while expected < sequence and (expected in worker.held or expected in worker.coming):
            expected += 1
        if expected < sequence:
            raise OutOfOrder(worker=worker.name, got=sequence, expected=expected)
        if sequence > worker.sequence + IN_FLIGHT:
            raise TooManyInFlight(worker=worker.name, limit=IN_FLIGHT, retry_after_s=0.05)

    def consume(self, worker: Worker, verdict: Verdict) -> None:
        """Store the verdict on the worker's next sequence."""
        worker.sequence = verdict.receipt.identity.sequence
        worker.held.pop(worker.sequence, None)
        if len(worker.verdicts) == RECEIPTS_KEPT:
            oldest = worker.verdicts[0].receipt.identity
            worker.forgotten = max(worker.forgotten, (int(oldest.epoch), int(oldest.sequence)))
            self._count(worker, -worker.verdicts[0].kept_bytes)
        self._store(worker, verdict)
        outcome = Outcome.Name(verdict.receipt.outcome).removeprefix("OUTCOME_").lower()
        worker.outcomes[outcome] = worker.outcomes.get(outcome, 0) + 1

    def _store(self, worker: Worker, verdict: Verdict) -> None:
        verdict.kept_bytes = RECEIPT_BYTES + SPREAD * verdict.receipt.ByteSize()
        self._count(worker, verdict.kept_bytes)
        worker.verdicts.append(verdict)

    def carry(self, worker: Worker, metrics: Mapping[str, float], state: bytes | None) -> None:
        """Keep what a push brought beside its gradient; `state` None: nothing new."""
        before = _carried_bytes(worker)
        worker.metrics = dict(metrics)
        worker.worker_state = worker.worker_state if state is None else state
        self._count(worker, _carried_bytes(worker) - before)

    def require_room_for_state(self, worker: Worker, state: bytes, now_s: float) -> None:
        """OverCapacity if a larger state than the worker has had cannot be kept, also without those that are absent."""
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

    def duplicate(self, worker: Worker, verdict: Verdict) -> None:
        """Count a push that came again."""
        worker.duplicates += 1
        verdict.receipt.duplicates += 1

    def leaving(self, identity: Identity) -> Worker | None:
        """The live worker that `identity` is, and that may go; None if its epoch is over."""
        worker = self.workers.get(identity.worker)
        there = worker is not None and worker.epoch == identity.epoch and worker.state is WorkerState.LIVE
        return worker if there else None

    def leave(self, identity: Identity, now_s: float) -> None:
        """End an epoch; leaving twice, or after expiry, changes nothing."""
        worker = self.leaving(identity)
        if worker is not None:
            worker.state = WorkerState.LEFT
            worker.last_seen_s = now_s

    def evict(self, name: str) -> Worker:
        """Fence a worker by an operator's hand; it may join again by a new session."""
        worker = self.workers.get(name)
        if worker is None:
            raise UnknownWorker(model=self.model, worker=name)
        worker.state = WorkerState.EVICTED
        return worker

    def close_epochs(self) -> None:
        """End every epoch (a restore did): each worker has to join again."""
        for worker in self.workers.values():
            worker.held, worker.coming = {}, {}
            if worker.state is WorkerState.LIVE:
                worker.state = WorkerState.LEFT

    def expire(self, now_s: float) -> None:
        """Let go of leases that ran out."""
        while (first := self._first()) is not None and first.lease_until_s < now_s:
            first.state = WorkerState.EXPIRED
            self._expired.append(first)

    def take_expired(self) -> list[Worker]:
        """The workers whose leases ran out since this was last asked."""
        expired, self._expired = self._expired, []
        return expired

    def _first(self) -> Worker | None:
        """The live worker whose lease ends first. Each is looked at about once a lease, however many there are."""
        leases = self._leases
        while leases:
            due_s, name = leases[0]
            worker = self.workers.get(name)
            if worker is None or worker.state is not WorkerState.LIVE or worker.watched_s != due_s:
                heapq.heappop(leases)
            elif worker.lease_until_s > due_s:
                worker.watched_s = worker.lease_until_s
                heapq.heapreplace(leases, (worker.watched_s, name))
            else:
                return worker
        return None

    def _watch(self, worker: Worker) -> None:
        """See to it that a live worker's lease ends."""
        worker.watched_s = worker.lease_until_s
        heapq.heappush(self._leases, (worker.watched_s, worker.name))

    def live_count(self) -> int:
        """How many are live."""
        return sum(worker.state is WorkerState.LIVE for worker in self.workers.values())

    def live(self) -> list[Worker]:
        """The live workers, longest joined first."""
        found = [worker for worker in self.workers.values() if worker.state is WorkerState.LIVE]
        return sorted(found, key=lambda worker: worker.joined)

    def members(self) -> list[Worker]:
        """Whom a policy counts: the live workers that are not quarantined, longest joined first."""
        return [worker for worker in self.live() if not worker.quarantined]

    def leads(self, worker: Worker) -> bool:
        """Whether a worker's hyperparameter edits count: the longest-joined live one's do."""
        if self._lead is None or self._lead.state is not WorkerState.LIVE:
            # looked for only when the last one is gone: this is asked at every push
            live = self.live()
            self._lead = live[0] if live else None
        return self._lead is worker

    def dump(self) -> list[dict[str, Any]]:
        """The table as JSON, none of it shared with the workers; what is only about this process's clock is left out."""
        return [
            {
                "name": worker.name,
                "epoch": worker.epoch,
                "sequence": worker.sequence,
                "state": str(worker.state),
                "joined": worker.joined,
                "outcomes": dict(worker.outcomes),
                "duplicates": worker.duplicates,
                "refused_in_row": worker.refused_in_row,
                "quarantined": worker.quarantined,
                "attempts": list(worker.attempts),
                "forgotten": list(worker.forgotten),
                "since": worker.since,
                "worker_state": worker.worker_state.hex(),
                "process": worker.process.SerializeToString().hex(),
                "verdicts": [
                    {
                        "digest": verdict.digest,
                        "receipt": verdict.receipt.SerializeToString().hex(),
                        "error": None
                        if verdict.error is None
                        else [verdict.error.code, verdict.error.message, dict(verdict.error.fields)],
                    }
                    for verdict in worker.verdicts
                ],
            }
            for worker in self.workers.values()
        ]

    def parse(self, dumped: Iterable[Mapping[str, Any]], now_s: float, forgotten_epoch: int = 0) -> None:
        """The table that `dump` wrote; whoever was live gets a fresh lease."""
        self.forgotten_epoch = forgotten_epoch
        for entry in dumped:
            worker = Worker(
                entry["name"],
                epoch=entry["epoch"],
                sequence=entry["sequence"],
                state=WorkerState(entry["state"]),
                joined=entry["joined"],
                outcomes=dict(entry["outcomes"]),
                duplicates=entry["duplicates"],
                worker_state=bytes.fromhex(entry["worker_state"]),
                refused_in_row=entry["refused_in_row"],
                quarantined=entry["quarantined"],
                since=entry.get("since", 0),
                process=Process.FromString(bytes.fromhex(entry.get("process", ""))),
            )
            # snapshots of before these were kept have none of them
            worker.attempts.extend(entry.get("attempts", ()))
            epoch, sequence = entry.get("forgotten", (0, 0))
            worker.forgotten = (epoch, sequence)
            for saved in entry["verdicts"]:
                receipt = Receipt.FromString(bytes.fromhex(saved["receipt"]))
                error = None
                if saved["error"] is not None:
                    code, message, fields = saved["error"]
                    error = CATALOGUE[code](message, **fields)
                self._store(worker, Verdict(saved["digest"], receipt, error))
            self._count(worker, WORKER_BYTES + _carried_bytes(worker))
            self._touch(worker, now_s)
            self._joins = max(self._joins, worker.joined)
            self.workers[worker.name] = worker
            if worker.state is WorkerState.LIVE:
                self._watch(worker)

    def first_lease_s(self) -> float | None:
        """When the first live worker's lease runs out, unless it is heard of."""
        first = self._first()
        return None if first is None else first.lease_until_s

    def _touch(self, worker: Worker, now_s: float) -> None:
        worker.last_seen_s = now_s
        worker.lease_until_s = now_s + self.lease_s

    def _forget(self, now_s: float, more_bytes: int = WORKER_BYTES, but: Worker | None = None) -> None:
        """Drop those absent for a day, and the longest absent beyond max_workers, or until there are `more_bytes`."""
        absent = sorted(
            (
                w
                for w in self.workers.values()
                if w.state is not WorkerState.LIVE and not w.held and w is not but
            ),
            key=lambda worker: worker.last_seen_s,
        )
        surplus = len(self.workers) + 1 - self.max_workers
        for index, worker in enumerate(absent):
            is_crowded = index < surplus or self.kept_bytes + more_bytes > self.max_bytes
            if is_crowded or now_s - worker.last_seen_s > FORGET_AFTER_S:
                self.forgotten_epoch = max(self.forgotten_epoch, worker.epoch)
                self._count(worker, -worker.kept_bytes)
                del self.workers[worker.name]


def _carried_bytes(worker: Worker) -> int:
    return SPREAD * (len(worker.worker_state) + sum(len(name) + 8 for name in worker.metrics))
