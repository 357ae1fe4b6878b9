"""The gate's judgement of what a push holds: outlying norms, refusals in a row, quarantine."""

from __future__ import annotations

import math

import pytest

from pushstep.proto.errors import InvalidSettings, NonfiniteGradient, NormOutlier, Quarantined
from pushstep.server.coordinator import gate as gates
from pushstep.server.coordinator.gate import Gate, GateSettings
from tests.support.servers.judged import Court, dense

NAN = float("nan")


def fed(*values: float, **settings: object) -> Gate:
    """A gate that has let pushes of these values in."""
    gate = Gate(GateSettings.model_validate({"norm_outlier": 4.0, "norm_warmup": 10, **settings}))
    for value in values:
        assert gate.decide(dense(value), None)
    return gate


@pytest.mark.parametrize(
    ("values", "then", "refused"),
    [
        ([1.0] * 9, 1e9, False),  # still warming up
        ([1.0] * 10, 1e9, True),
        ([1.0] * 10, 1.1, False),  # norms that never varied leave room for some
        ([1.0] * 10, 2.0, True),
        ([1.0] * 10, 1e-9, False),  # small ones do no harm
        ([0.5, 1.0, 2.0] * 10, 5.0, False),
        ([0.5, 1.0, 2.0] * 10, 50.0, True),
        ([1.0] * 10, 0.0, False),
        ([1.0, 0.0] * 9, 1e9, False),  # zeros teach nothing
    ],
)
def test_a_norm_far_above_the_usual_is_refused(values: list[float], then: float, refused: bool) -> None:
    gate = fed(*values)
    if refused:
        with pytest.raises(NormOutlier) as caught:
            gate.decide(dense(then), None)
        assert float(caught.value.fields["limit"]) == pytest.approx(gate.limit(), rel=1e-5)
    else:
        assert gate.decide(dense(then), None)


def test_only_what_is_let_in_feeds_the_estimate() -> None:
    gate = fed(*[1.0] * 20)
    before = gate.dump()
    for _ in range(100):
        with pytest.raises(NormOutlier):
            gate.decide(dense(1e6), None)
        with pytest.raises(NonfiniteGradient):
            gate.decide(dense(NAN), None)
    assert gate.dump() == before


def test_the_estimate_follows_a_training_whose_norms_fall() -> None:
    gate = fed(*[1.0] * 20)
    for step in range(400):
        assert gate.decide(dense(math.exp(-step / 100)), None)
    limit = gate.limit()
    assert limit is not None
    assert math.exp(-4) * 2**0.5 < limit < 0.1
    same = Gate.parsed(gate.dump())
    assert (same.dump(), same.limit()) == (gate.dump(), limit)


def test_outliers_are_let_in_unless_asked_for() -> None:
    court = Court()
    court.join("w")
    for value in [1.0] * 60 + [1e9]:
        assert court.outcome(court.push("w", value)) == "applied"


@pytest.mark.parametrize(
    "wrong", [{"nonfinite": "maybe"}, {"norm_outlier": 0}, {"quarantine_after": 0}, {"norms": 3}]
)
def test_settings_are_refused_whole(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidSettings):
        gates.read(wrong, GateSettings())


def test_so_many_refusals_in_a_row_end_in_quarantine() -> None:
    court = Court()
    court.coordinator.gate.settings = GateSettings(quarantine_after=3)
    court.join("bad", "good")
    for value in (NAN, NAN, 1.0, NAN, NAN):  # one that is let in begins the count anew
        court.push("bad", value)
    worker = court.coordinator.sessions.workers["bad"]
    assert (worker.refused_in_row, worker.quarantined) == (2, False)
    court.push("bad", NAN)
    assert worker.quarantined
    with pytest.raises(Quarantined):
        court.offer(court.header("bad"))
    with pytest.raises(Quarantined):
        court.coordinator.on_chunk(court.identity("bad"), court.now_s)  # of a stream that is under way
    assert [note.kind for note in court.notes].count("worker_quarantined") == 1
    with pytest.raises(Quarantined):
        court.offer(court.header("bad", sequence=6))  # not even what was answered before is read again
    # it may live on, and joining anew does not help
    court.do(court.coordinator.on_heartbeat(court.identity("bad"), 0))
    court.join("bad", takeover=True)
    with pytest.raises(Quarantined):
        court.offer(court.header("bad"))
    assert court.outcome(court.push("good")) == "applied"
    court.do(court.coordinator.released("bad", 0))
    assert court.outcome(court.push("bad", 2.0)) == "applied"


def test_what_never_became_a_push_counts_too_and_consumes_nothing() -> None:
    court = Court()
    court.coordinator.gate.settings = GateSettings(quarantine_after=2)
    court.join("bad")
    for _ in range(2):
        court.do(court.coordinator.on_fault(court.identity("bad"), NonfiniteGradient(parameter="x"), 0))
    worker = court.coordinator.sessions.workers["bad"]
    assert (worker.sequence, worker.quarantined, worker.outcomes) == (0, True, {})
    # of an epoch that is over, it says nothing about the one that is
    court.join("other")
    court.join("other", takeover=True)
    court.do(
        court.coordinator.on_fault(court.identity("other", epoch=1), NonfiniteGradient(parameter="x"), 0)
    )
    assert court.coordinator.sessions.workers["other"].refused_in_row == 0


def test_quarantine_takes_what_is_held_along() -> None:
    court = Court(policy="sync", timeout_s=None)
    court.coordinator.gate.settings = GateSettings(quarantine_after=1)
    court.join("a", "b")
    held = court.push("b", 1.0)
    court.do(court.coordinator.on_fault(court.identity("b"), NonfiniteGradient(parameter="x"), 0))
    assert court.outcome(held) == "quarantined"
    assert court.outcome(court.push("a", 1.0)) == "applied"


def test_what_is_parked_does_not_outlast_its_worker() -> None:
    court = Court()
    court.join("w")
    court.offer(court.header("w", sequence=1))  # its body never comes
    parked = court.push("w", 1.0, sequence=2)
    assert (court.outcome(parked), court.coordinator.next_s()) == ("pending", 30)
    court.wait(30.001)
    assert court.outcome(parked) == "lease_expired"
    assert court.coordinator.next_s() is None
