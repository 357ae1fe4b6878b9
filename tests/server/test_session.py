"""Who is pushing, as a state machine: events and a time of the test's own go in, decisions come out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pushstep.proto.errors import (
    AlreadyJoined,
    Conflict,
    Fenced,
    LeaseExpired,
    NonfiniteGradient,
    OutOfOrder,
    OverCapacity,
    PushstepError,
    TooOld,
    UnknownWorker,
)
from pushstep.proto.types_pb2 import Identity, Outcome, Receipt
from pushstep.server.coordinator.sessions import (
    FORGET_AFTER_S,
    LAST_SEQUENCE,
    RECEIPT_BYTES,
    SPREAD,
    WORKER_BYTES,
    Sessions,
)
from pushstep.server.coordinator.worker import RECEIPTS_KEPT, Decided, Worker, WorkerState
from tests.simulation.seeded_bugs import Bug, found_by

LEASE_S = 30.0


@pytest.fixture
def sessions() -> Sessions:
    return Sessions(LEASE_S, max_workers=100)


def identity(worker: Worker | str, epoch: int | None = None, sequence: int | None = None) -> Identity:
    """A worker's next push, or one of another epoch or sequence."""
    if isinstance(worker, str):
        return Identity(worker=worker, epoch=epoch or 1, sequence=sequence or 1)
    return Identity(
        worker=worker.name,
        epoch=worker.epoch if epoch is None else epoch,
        sequence=worker.sequence + 1 if sequence is None else sequence,
    )


def consume(sessions: Sessions, worker: Worker, digest: int = 1, **more: Any) -> Decided:
    receipt = Receipt(outcome=Outcome.OUTCOME_APPLIED, identity=identity(worker), version=worker.sequence + 1)
    decided = Decided(digest, receipt, **more)
    sessions.consume(worker, decided)
    return decided


def test_each_join_is_the_next_epoch_from_sequence_0(sessions: Sessions) -> None:
    worker = sessions.join("w", 0, takeover=False)
    consume(sessions, worker)
    assert (worker.epoch, worker.sequence, worker.state) == (1, 1, WorkerState.LIVE)
    sessions.leave(identity(worker), 1)
    assert sessions.join("w", 2, takeover=False) is worker
    assert (worker.epoch, worker.sequence) == (2, 0)
    assert len(worker.decided_pushes) == 1


@pytest.mark.parametrize(("at_s", "left_s"), [(0, 30.0), (10.5, 19.5), (30.0, 0.001)])
def test_a_live_name_is_taken_until_its_lease_ends(sessions: Sessions, at_s: float, left_s: float) -> None:
    sessions.join("w", 0, takeover=False)
    with pytest.raises(AlreadyJoined) as caught:
        sessions.join("w", at_s, takeover=False)
    assert caught.value.retry_after_s == left_s
    assert sessions.workers["w"].epoch == 1


def test_a_lease_ends_just_after_its_last_moment(sessions: Sessions) -> None:
    worker = sessions.join("w", 0, takeover=False)
    assert sessions.require(identity(worker), LEASE_S) is worker
    assert sessions.require(identity(worker), 2 * LEASE_S) is worker  # each call began it anew
    with pytest.raises(LeaseExpired):
        sessions.require(identity(worker), 3 * LEASE_S + 0.001)
    assert worker.state is WorkerState.EXPIRED
    with pytest.raises(LeaseExpired):
        sessions.require(identity(worker), 3 * LEASE_S + 0.002)
    assert sessions.join("w", 200, takeover=False).epoch == 2


def test_takeover_fences_the_old_epoch(sessions: Sessions) -> None:
    old = identity(sessions.join("w", 0, takeover=False))
    worker = sessions.join("w", 1, takeover=True)
    with pytest.raises(Fenced, match="another session"):
        sessions.require(old, 1)
    sessions.leave(old, 1)  # of the fenced one: it ends nothing
    assert sessions.require(identity(worker), 1) is worker


def test_evicted_is_fenced_until_it_joins_by_hand(sessions: Sessions) -> None:
    worker = sessions.join("w", 0, takeover=False)
    decided = consume(sessions, worker)
    sessions.evict("w")
    for at_s in (0.0, 1000.0):
        with pytest.raises(Fenced, match="evicted"):
            sessions.require(identity(worker), at_s)
    sessions.leave(identity(worker), 1)
    assert worker.state is WorkerState.EVICTED
    assert list(worker.decided_pushes) == [decided]
    sessions.join("w", 1001, takeover=False)
    with pytest.raises(Fenced):
        sessions.require(identity(worker, epoch=1), 1001)
    sessions.require(identity(worker), 1001)
    with pytest.raises(UnknownWorker):
        sessions.evict("nobody")


def test_a_session_joins_over_itself_until_it_is_fenced(sessions: Sessions) -> None:
    """Closing the epochs, as a restore does, lifts no fence; nor does the disk."""
    sessions.join("w", 0, takeover=False)
    assert sessions.join("w", 1, takeover=False, old_epoch=1).epoch == 2
    assert (
        sessions.join("w", 1, takeover=False, old_epoch=1).epoch == 3
    )  # of which it was not told of the second
    assert sessions.join("w", 2, takeover=True).epoch == 4
    sessions.close_epochs()
    kept = Sessions(LEASE_S, 100)
    kept.parse(json.loads(json.dumps(sessions.dump())), 3)
    for table in (sessions, kept):
        for old_epoch in (1, 2, 3):
            with pytest.raises(Fenced, match="another session joined"):
                table.join("w", 3, takeover=True, old_epoch=old_epoch)
        assert table.join("w", 4, takeover=False, old_epoch=4).epoch == 5
        table.evict("w")
        table.close_epochs()
        with pytest.raises(Fenced, match="evicted"):
            table.join("w", 5, takeover=True, old_epoch=5)
        assert table.join("w", 6, takeover=False).epoch == 6


@pytest.mark.parametrize("bug", found_by("sessions"), ids=str)
def test_a_seeded_bug_is_found(sessions: Sessions, bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.put_in(monkeypatch)
    with pytest.raises(pytest.fail.Exception, match=bug.says):
        test_a_session_joins_over_itself_until_it_is_fenced(sessions)


def test_strangers_are_unknown(sessions: Sessions) -> None:
    worker = sessions.join("w", 0, takeover=False)
    for stranger in (identity("nobody"), identity(worker, epoch=2), identity(worker, epoch=2**64 - 1)):
        with pytest.raises(UnknownWorker):
            sessions.require(stranger, 0)


def test_a_closed_epoch_must_join_again(sessions: Sessions) -> None:
    worker = sessions.join("w", 0, takeover=False)
    sessions.evict(sessions.join("bad", 0, takeover=False).name)
    sessions.close_epochs()
    with pytest.raises(LeaseExpired):
        sessions.require(identity(worker), 0)
    with pytest.raises(Fenced):
        sessions.require(identity("bad"), 0)


def test_sequences_are_judged_in_order(sessions: Sessions) -> None:
    worker = sessions.join("w", 0, takeover=False)
    for gap in (0, 2, 3, 2**64 - 1):
        with pytest.raises(OutOfOrder) as caught:
            sessions.decided_before(worker, identity(worker, sequence=gap))
        assert caught.value.fields["expected"] == "1"
    assert sessions.decided_before(worker, identity(worker)) is None
    first = consume(sessions, worker, digest=7)
    seen = identity(worker, sequence=1)
    assert sessions.decided_before(worker, seen) is first
    assert sessions.decided_before(worker, seen, 7) is first
    with pytest.raises(Conflict):
        sessions.decided_before(worker, seen, 8)
    assert sessions.decided_before(worker, identity(worker)) is None


def test_the_last_eight_receipts_are_kept(sessions: Sessions) -> None:
    worker = sessions.join("w", 0, takeover=False)
    decided_pushes = [consume(sessions, worker, digest=n) for n in range(1, 12)]
    for sequence in range(1, 4):
        with pytest.raises(TooOld) as caught:
            sessions.decided_before(worker, identity(worker, sequence=sequence), sequence)
        assert caught.value.fields["oldest"] == "4"
    for sequence in range(4, 12):
        assert (
            sessions.decided_before(worker, identity(worker, sequence=sequence), sequence)
            is decided_pushes[sequence - 1]
        )
    assert RECEIPTS_KEPT == 8


def test_a_receipt_of_an_earlier_epoch_is_no_verdict_of_this_one(sessions: Sessions) -> None:
    """Sequence 1 of both epochs, with other bodies: the second is new, and the first is kept for its join."""
    worker = sessions.join("w", 0, takeover=False)
    first = consume(sessions, worker, digest=1)
    worker = sessions.join("w", 0, takeover=True)
    assert sessions.decided_before(worker, identity(worker), 2) is None
    second = consume(sessions, worker, digest=2)
    assert sessions.decided_before(worker, identity(worker, sequence=1), 2) is second
    assert list(worker.decided_pushes) == [first, second]


def test_duplicates_and_outcomes_are_counted(sessions: Sessions) -> None:
    worker = sessions.join("w", 0, takeover=False)
    decided = consume(sessions, worker)
    for _ in range(3):
        sessions.duplicate(worker, decided)
    assert (worker.duplicates, decided.receipt.duplicates) == (3, 3)
    receipt = Receipt(outcome=Outcome.OUTCOME_REJECTED, identity=identity(worker))
    sessions.consume(worker, Decided(1, receipt))
    assert worker.outcomes == {"applied": 1, "rejected": 1}


def test_the_longest_joined_live_worker_leads(sessions: Sessions) -> None:
    a, b, c = (sessions.join(name, 0, takeover=False) for name in "abc")
    assert [sessions.leads(w) for w in (a, b, c)] == [True, False, False]
    sessions.leave(identity(a), 1)
    assert [sessions.leads(w) for w in (a, b, c)] == [False, True, False]
    sessions.join("a", 2, takeover=False)  # behind the others now
    assert [sessions.leads(w) for w in (a, b, c)] == [False, True, False]
    sessions.join("b", 3, takeover=True)
    assert [sessions.leads(w) for w in (a, b, c)] == [False, False, True]
    sessions.evict("c")
    assert [sessions.leads(w) for w in (a, b, c)] == [True, False, False]
    sessions.expire(2 + LEASE_S + 0.5)
    assert [sessions.leads(w) for w in (a, b, c)] == [False, True, False]
    sessions.expire(100)
    assert not any(sessions.leads(w) for w in (a, b, c))
    assert sessions.live() == []


def test_the_absent_are_forgotten_after_a_day(sessions: Sessions) -> None:
    old, recent = (sessions.join(name, 0, takeover=False) for name in ("old", "recent"))
    sessions.leave(identity(old), 10)
    sessions.leave(identity(recent), 20)
    live = sessions.join("live", 0, takeover=False)
    live.lease_until_s = 10**9
    sessions.join("new", FORGET_AFTER_S + 15, takeover=False)
    assert set(sessions.workers) == {"recent", "live", "new"}
    with pytest.raises(UnknownWorker):
        sessions.require(identity("old"), FORGET_AFTER_S + 15)


def test_beyond_the_limit_the_longest_absent_go_and_of_the_live_no_more_come() -> None:
    sessions = Sessions(LEASE_S, max_workers=3)
    for at_s, name in enumerate("abc"):
        sessions.leave(identity(sessions.join(name, at_s, takeover=False)), at_s)
    sessions.join("d", 5, takeover=False)
    assert list(sessions.workers) == ["b", "c", "d"]
    b = sessions.join("b", 6, takeover=False)
    sessions.join("e", 7, takeover=False)
    assert list(sessions.workers) == ["b", "d", "e"]
    before = sessions.dump()
    for name in ("f", "a"):
        with pytest.raises(OverCapacity, match="max-workers"):
            sessions.join(name, 8, takeover=True)
    assert sessions.dump() == before
    assert sessions.join("b", 8, takeover=True).epoch == b.epoch  # who is live already takes nobody's place
    sessions.leave(identity(b), 9)
    sessions.join("f", 9, takeover=False)
    with pytest.raises(OverCapacity):
        sessions.join("b", 10, takeover=False)
    assert (
        sessions.join("b", 9 + 2 * LEASE_S, takeover=False).epoch == 4
    )  # the others are silent for too long


def test_no_epoch_is_given_out_twice() -> None:
    """What a forgotten worker had sent cannot pass for what it sends when it is back."""
    sessions = Sessions(LEASE_S, max_workers=1)
    for _ in range(3):
        old = sessions.join("a", 0, takeover=True)
    assert (old.epoch, old.forgotten) == (3, (0, 0))
    sessions.leave(identity(old), 0)
    b = sessions.join("b", 1, takeover=False)
    assert (list(sessions.workers), b.epoch, b.forgotten) == (["b"], 4, (3, LAST_SEQUENCE))
    sessions.leave(identity(b), 1)
    saved = Sessions(LEASE_S, max_workers=1)
    saved.parse(json.loads(json.dumps(sessions.dump())), 1, sessions.forgotten_epoch)
    for table in (sessions, saved):
        a = table.join("a", 2, takeover=False)
        assert a.epoch == 5
        assert (3, 1) <= a.forgotten < (5, 1)
        with pytest.raises(Fenced):
            table.require(identity(a, epoch=3), 2)


def test_what_is_forgotten_of_a_worker_that_is_not(sessions: Sessions) -> None:
    worker = sessions.join("w", 0, takeover=False)
    for sequence in range(1, RECEIPTS_KEPT + 3):
        consume(sessions, worker)
        assert worker.forgotten == ((1, sequence - RECEIPTS_KEPT) if sequence > RECEIPTS_KEPT else (0, 0))
    sessions.join("w", 0, takeover=True)
    consume(sessions, worker)
    assert worker.forgotten == (1, 3)


@pytest.mark.parametrize("state", ["live", "left"])
def test_a_join_that_comes_again_changes_nothing(sessions: Sessions, state: str) -> None:
    first = sessions.join("w", 0, takeover=False, attempt=5)
    consume(sessions, first)
    sessions.join("v", 1, takeover=False)
    if state == "left":
        sessions.leave(identity(first), 1)
    before = sessions.dump()
    assert sessions.join("w", 2, takeover=True, attempt=5) is first
    assert sessions.dump() == before
    assert first.lease_until_s == (2 if state == "live" else 0) + LEASE_S
    assert sessions.join("w", 3, takeover=True, attempt=6).epoch == 2
    with pytest.raises(Fenced, match="a later join has replaced this one"):
        sessions.join("w", 4, takeover=True, attempt=5)
    assert sessions.join("w", 5, takeover=True).epoch == 3  # without a number each is one of its own
    assert sessions.join("w", 6, takeover=True).epoch == 4
    with pytest.raises(Fenced):
        sessions.join("w", 7, takeover=True, attempt=6)


def test_a_join_that_comes_again_after_an_eviction_is_fenced(sessions: Sessions) -> None:
    """Also on another timeline: the table, and with it the fence, outlives a restore."""
    sessions.join("w", 0, takeover=False, attempt=5)
    sessions.close_epochs()
    sessions.evict("w")
    before = sessions.dump()
    with pytest.raises(Fenced, match="evicted by an operator"):
        sessions.join("w", 1, takeover=False, attempt=5)
    assert sessions.dump() == before


def test_the_table_survives_as_json(sessions: Sessions) -> None:
    a, b = (sessions.join(name, 0, takeover=False, attempt=2**63) for name in "ab")
    for n in range(10):
        consume(sessions, a, digest=2**64 - 1 - n)
    error = NonfiniteGradient(parameter="w'\n", consumed=True)
    refused = consume(sessions, b, digest=5, error=error)
    a.worker_state = bytes(range(256))
    sessions.duplicate(b, refused)
    sessions.evict("b")
    earlier = json.loads(json.dumps(sessions.dump()))
    for entry in earlier:  # written before these were kept
        del entry["attempts"], entry["forgotten"], entry["since"]
    kept = Sessions(LEASE_S, 100)
    kept.parse(earlier, 1000)
    assert [len(worker.decided_pushes) for worker in kept.workers.values()] == [8, 1]
    restored = Sessions(LEASE_S, 100)
    restored.parse(json.loads(json.dumps(sessions.dump())), 1000)
    assert restored.dump() == sessions.dump()
    a2, b2 = restored.workers["a"], restored.workers["b"]
    assert restored.leads(a2)
    assert a2.lease_until_s == 1000 + LEASE_S
    assert restored.decided_before(a2, identity(a2, sequence=10), 2**64 - 10) is a2.decided_pushes[-1]
    with pytest.raises(TooOld):
        restored.decided_before(a2, identity(a2, sequence=2))
    got = b2.decided_pushes[0].error
    assert isinstance(got, NonfiniteGradient)
    assert (got.message, got.fields, got.consumed) == (error.message, error.fields, True)
    with pytest.raises(Fenced):
        restored.require(identity(b2), 1000)
    assert restored.join("c", 1000, takeover=False).joined > max(a.joined, b.joined)


class Model(RuleBasedStateMachine):
    """Any history: what is applied is applied once, epochs only grow, and at most one live worker leads."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.sessions = Sessions(LEASE_S, max_workers=3)
        self.applied: list[tuple[str, int, int]] = []
        self.epochs: dict[str, int] = {}
        self.known: list[Identity] = []

    names = st.sampled_from("abcd")

    @rule(name=names, takeover=st.booleans())
    def join(self, name: str, takeover: bool) -> None:
        before = self.sessions.workers.get(name)
        live = before is not None and before.state is WorkerState.LIVE and before.lease_until_s >= self.now_s
        try:
            worker = self.sessions.join(name, self.now_s, takeover)
        except AlreadyJoined:
            assert live
            assert not takeover
        except OverCapacity:
            assert not live
            assert self.sessions.live_count() == 3
        else:
            assert takeover or not live
            assert worker.epoch > self.epochs.get(name, 0)
            self.epochs[name] = worker.epoch
            self.known.append(identity(worker))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), step=st.integers(0, 3), digest=st.integers(1, 2))
    def push(self, data: st.DataObject, step: int, digest: int) -> None:
        who = data.draw(st.sampled_from(self.known))
        sequence = (
            max(0, self.sessions.workers[who.worker].sequence + 2 - step)
            if who.worker in self.sessions.workers
            else 1
        )
        sent = Identity(worker=who.worker, epoch=who.epoch, sequence=sequence)
        try:
            worker = self.sessions.require(sent, self.now_s)
            seen = self.sessions.decided_before(worker, sent, digest)
        except PushstepError:
            return
        if seen is not None:
            assert seen.digest == digest
            assert seen.receipt.identity == sent
            return
        self.sessions.consume(
            worker, Decided(digest, Receipt(outcome=Outcome.OUTCOME_APPLIED, identity=sent))
        )
        self.applied.append((who.worker, worker.epoch, sequence))

    @rule(data=st.data())
    @precondition(lambda self: self.known)
    def leave(self, data: st.DataObject) -> None:
        self.sessions.leave(data.draw(st.sampled_from(self.known)), self.now_s)

    @rule(name=names)
    def evict(self, name: str) -> None:
        if name in self.sessions.workers:
            self.sessions.evict(name)

    @rule(seconds=st.sampled_from([0.5, LEASE_S, FORGET_AFTER_S]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def holds(self) -> None:
        assert self.sessions.live_count() <= 3
        assert len(set(self.applied)) == len(self.applied)
        assert sum(self.sessions.leads(worker) for worker in self.sessions.workers.values()) <= 1
        for worker in self.sessions.workers.values():
            assert len(worker.decided_pushes) <= RECEIPTS_KEPT


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_table_has_a_bound_in_bytes() -> None:
    """Beyond it the longest absent go; where nobody is absent no other may join, and no state may grow."""
    sessions = Sessions(LEASE_S, 100, max_bytes=4 * WORKER_BYTES + SPREAD * 1000)
    workers = [sessions.join(name, at_s, takeover=False) for at_s, name in enumerate("abcd")]
    assert sessions.kept_bytes == 4 * WORKER_BYTES
    sessions.leave(identity(workers[1]), 5)
    sessions.leave(identity(workers[0]), 6)
    sessions.join("e", 7, takeover=False)
    assert set(sessions.workers) == {"a", "c", "d", "e"}
    sessions.require_room_for_state(workers[2], bytes(1000), 8)
    assert "a" in sessions.workers
    sessions.carry(workers[2], {}, bytes(1000))
    sessions.require_room_for_state(workers[3], bytes(900), 8)
    assert "a" not in sessions.workers
    sessions.carry(workers[3], {"loss": 1.0}, bytes(900))
    sessions.require_room_for_state(workers[3], bytes(10), 8)
    with pytest.raises(OverCapacity, match="--worker-bytes"):
        sessions.join("f", 9, takeover=False)
    with pytest.raises(OverCapacity):
        sessions.require_room_for_state(workers[3], bytes(1400), 9)
    assert set(sessions.workers) == {"c", "d", "e"}


def test_the_bytes_of_the_table_are_those_of_what_it_holds(sessions: Sessions) -> None:
    for number, name in enumerate("abc" * 10):
        worker = sessions.join(name, number, takeover=True)
        consume(sessions, worker)
        sessions.carry(worker, {"m" * number: 1.0}, bytes(number) if number % 2 else None)
    loaded = Sessions(LEASE_S, 100)
    loaded.parse(json.loads(json.dumps(sessions.dump())), 1)
    metrics = sum(SPREAD * (len(name) + 8) for worker in sessions.workers.values() for name in worker.metrics)
    assert sessions.kept_bytes == loaded.kept_bytes + metrics  # which are not saved
    receipts = [v.receipt.ByteSize() for worker in sessions.workers.values() for v in worker.decided_pushes]
    states = sum(len(worker.worker_state) for worker in sessions.workers.values())
    fixed = 3 * WORKER_BYTES + len(receipts) * RECEIPT_BYTES
    assert loaded.kept_bytes == fixed + SPREAD * (sum(receipts) + states)
    for worker in sessions.workers.values():
        sessions.leave(identity(worker), 40)
    sessions.join("d", 40 + 2 * FORGET_AFTER_S, takeover=False)
    assert (list(sessions.workers), sessions.kept_bytes) == (["d"], WORKER_BYTES)
