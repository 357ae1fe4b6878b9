"""sync, as tables over the judge: when rounds open and close, who is in them, and what becomes of everybody else."""

from __future__ import annotations

import pytest

from pushstep.proto.errors import NonfiniteGradient
from pushstep.proto.training_pb2 import GroupEdit
from pushstep.proto.wire.hyperparameters import wire_values
from pushstep.server.coordinator.hooks.hook import Hook, Point, Settings, StepContext
from pushstep.server.coordinator.policies import catalogue as policies
from pushstep.server.staging.gradient import DensePart
from tests.support.servers.judged import Court


def sync(*workers: str, **settings: object) -> Court:
    court = Court(policy="sync", **settings)
    court.join(*workers)
    return court


def value(court: Court) -> float:
    """What the last step was taken with."""
    part = court.stepped[-1].parts[0]
    assert isinstance(part, DensePart)
    return float(part.gradient[0])


def names(court: Court) -> list[str]:
    return [c.identity.worker for c in court.tickets[-1].contributions]


def test_a_round_is_one_step_of_everybody_in_name_order() -> None:
    court = sync("b", "c", "a")
    pushes = [court.push(name, number) for name, number in (("c", 4.0), ("a", 1.0), ("b", 1.0))]
    assert [court.outcome(push) for push in pushes] == ["applied"] * 3
    assert (court.commits.version, names(court), value(court)) == (1, ["a", "b", "c"], 2.0)
    for push in pushes:
        receipt = court.receipt(push)
        assert (receipt.version, receipt.staleness, list(receipt.contributors)) == (1, 0, ["a", "b", "c"])
        assert receipt.policy == "sync"
    assert court.receipt(pushes[0]).gradient_norm == pytest.approx(4 * 2**0.5)  # its own, as it came
    assert court.receipt(pushes[0]).step_norm == pytest.approx(2 * 2**0.5)


@pytest.mark.parametrize(
    ("reduce", "samples", "expected", "divisor"),
    [
        ("mean", (0, 0), (2.0 + 6.0) / 2, 2.0),
        ("sum", (0, 0), 8.0, 1.0),
        ("mean", (1, 3), (2.0 + 18.0) / 4, 4.0),
        ("sum", (1, 3), 20.0, 1.0),
        ("mean", (0, 3), (2.0 + 18.0) / 4, 4.0),  # who does not say counts as one sample
    ],
)
def test_samples_weigh_and_the_contributors_weight_divides(
    reduce: str, samples: tuple[float, float], expected: float, divisor: float
) -> None:
    court = sync("a", "b", reduce=reduce)
    court.push("a", 2.0, samples=samples[0])
    court.push("b", 6.0, samples=samples[1])
    assert (value(court), court.tickets[-1].divisor) == (expected, divisor)


def test_the_mean_divides_by_contributors_and_not_by_members() -> None:
    court = sync("a", "b", "c", quorum=2)
    court.push("a", 2.0)
    court.push("b", 4.0)
    assert (value(court), court.tickets[-1].divisor) == (3.0, 2.0)


def test_missing_gradients_count_as_zero_unless_all_are_missing() -> None:
    court = sync("a", "b")
    court.push("a", 2.0, groups="a")
    court.push("b", 4.0, groups="a")
    assert [part.slots[0].name for part in court.stepped[-1].parts if isinstance(part, DensePart)] == ["a"]
    court.push("a", 2.0, groups="ab")
    court.push("b", 4.0, groups="b")
    parts = {
        p.slots[0].name: p.gradient.tolist() for p in court.stepped[-1].parts if isinstance(p, DensePart)
    }
    assert parts == {"a": [1.0, 1.0], "b": [3.0]}


@pytest.mark.parametrize("gone", ["leaves", "expires", "is evicted", "is quarantined"])
@pytest.mark.parametrize("pushed", [False, True])
def test_nobody_waits_for_who_is_gone(gone: str, pushed: bool) -> None:
    court = sync("a", "b", "c", timeout_s=None)
    first = court.push("a", 1.0)
    of_c = court.push("c", 5.0) if pushed else None
    court.push("b", 3.0) if not pushed else None
    assert court.outcome(first) == "pending"
    who = "b" if pushed else "c"
    if gone == "leaves":
        court.do(court.coordinator.on_leave(court.identity(who), court.now_s)[1])
    elif gone == "is evicted":
        court.do(court.coordinator.evicted(who, court.now_s))
    elif gone == "is quarantined":
        court.coordinator.sessions.workers[who].refused_in_row = 19
        court.push(who, float("nan"))
    else:
        for _ in range(3):
            court.wait(10)
            for name in {"a", "b", "c"} - {who}:
                court.do(court.coordinator.on_heartbeat(court.identity(name), court.now_s))
        assert court.outcome(first) == "pending"
        assert court.coordinator.next_s() == 30
        court.wait(0.001)
    assert court.outcome(first) == "applied"
    assert value(court) == (3.0 if pushed else 2.0)
    assert of_c is None or court.outcome(of_c) == "applied"


@pytest.mark.parametrize(
    ("goes", "stays"), [("leaves", True), ("expires", True), ("is evicted", False), ("joins anew", False)]
)
def test_what_a_worker_had_handed_in(goes: str, stays: bool) -> None:
    """It counts when its worker goes by itself, and once; not when the worker is fenced."""
    court = sync("a", "b", timeout_s=None)
    handed_in = court.push("b", 9.0)
    if goes == "leaves":
        court.do(court.coordinator.on_leave(court.identity("b", epoch=1), 0)[1])
    elif goes == "is evicted":
        court.do(court.coordinator.evicted("b", 0))
    elif goes == "joins anew":
        court.join("b", takeover=True)
        assert court.outcome(handed_in) == "fenced"
        court.push("b", 5.0)
    else:
        court.wait(20)
        court.do(court.coordinator.on_heartbeat(court.identity("a"), court.now_s))
        court.wait(11)
    last = court.push("a", 1.0)
    assert court.outcome(last) == "applied"
    assert court.outcome(handed_in) == ("applied" if stays else "fenced")
    assert value(court) == (5.0 if stays else {"is evicted": 1.0, "joins anew": 3.0}[goes])
    assert len(court.tickets) == 1


def test_late_joiners_are_not_waited_for_and_may_contribute() -> None:
    court = sync("a", "b")
    court.push("a", 1.0)
    court.join("c", "d")
    court.push("c", 4.0)
    court.push("b", 1.0)
    assert (names(court), value(court)) == (["a", "b", "c"], 2.0)
    waits = court.push("a", 1.0)  # the next round expects all four
    court.push("b", 1.0)
    court.push("c", 1.0)
    assert court.outcome(waits) == "pending"
    court.push("d", 1.0)
    assert court.outcome(waits) == "applied"


def test_min_workers_gates_opening_only() -> None:
    court = sync("a", min_workers=2)
    first = court.push("a", 1.0)
    court.wait(20)
    assert (court.outcome(first), court.coordinator.next_s()) == ("pending", 30)
    court.join("b")
    second = court.push("b", 3.0)
    assert [court.outcome(push) for push in (first, second)] == ["applied"] * 2
    court.push("a", 1.0)
    court.do(
        court.coordinator.on_leave(court.identity("b"), court.now_s)[1]
    )  # one is left, in a round that is open
    assert court.commits.version == 2
    assert court.outcome(court.push("a", 1.0)) == "pending"


@pytest.mark.parametrize("late", ["drop", "carry"])
def test_quorum_closes_and_stragglers_are_late(late: str) -> None:
    court = sync("a", "b", "c", quorum=2, late=late)
    court.push("a", 1.0)
    court.push("b", 3.0)
    assert (court.commits.version, value(court)) == (1, 2.0)
    straggler = court.push("c", 10.0, base=0)
    if late == "drop":
        assert court.outcome(straggler) == "dropped_late"
        assert court.receipt(straggler).version == 1
        court.push("a", 5.0)
        court.push("b", 7.0)
        assert (names(court), value(court)) == (["a", "b"], 6.0)
    else:
        assert court.outcome(straggler) == "pending"
        court.push("a", 2.0)
        assert (names(court), value(court)) == (["a", "c"], 6.0)
        assert court.receipt(straggler).version == 2
        assert court.receipt(straggler).staleness == 1


def test_a_straggler_carried_contributes_once() -> None:
    court = sync("a", "b", "c", quorum=2, late="carry")
    court.push("a", 1.0)
    court.push("b", 3.0)
    carried = court.push("c", 10.0, base=0)
    following = court.push("c", 20.0, base=1)  # waits until the first one has its verdict
    assert [court.outcome(push) for push in (carried, following)] == ["pending"] * 2
    court.push("b", 2.0)
    assert (names(court), value(court)) == (["b", "c"], 6.0)
    assert court.outcome(following) == "pending"
    court.push("a", 4.0)
    assert (names(court), value(court)) == (["a", "c"], 12.0)


def test_the_time_out_counts_from_the_first_push() -> None:
    court = sync("a", "b", timeout_s=5.0)
    court.wait(20)
    push = court.push("a", 1.0)
    assert court.coordinator.next_s() == 25
    court.wait(4.999)
    assert court.outcome(push) == "pending"
    court.wait(0.001)
    assert court.outcome(push) == "applied"
    assert "timed out without b" in court.receipt(push).notes[0]
    assert court.outcome(court.push("b", 1.0, base=0)) == "dropped_late"


def test_who_pushes_in_every_round_is_never_late() -> None:
    """However old what it computes on: it may only push, or compute ahead of what it has pulled."""
    court = sync("a", "b", "c", quorum=2)
    for step in range(3):
        pushes = [court.push(name, 1.0, base=0) for name in ("a", "b")]
        assert [court.outcome(push) for push in pushes] == ["applied"] * 2
        assert court.receipt(pushes[0]).staleness == step
    straggler = court.push("c", 9.0, base=0)  # three rounds have gone by without it
    assert (court.outcome(straggler), court.receipt(straggler).version) == ("dropped_late", 3)
    court.push("c", 9.0, base=0)  # it was told of the last one
    court.push("a", 1.0, base=0)
    assert (names(court), value(court)) == (["a", "c"], 5.0)
    ahead = [court.push("a", 1.0, base=4), court.push("a", 3.0, base=4)]  # two on their way at once
    court.push("b", 1.0, base=4)
    assert [court.outcome(push) for push in ahead] == ["applied", "pending"]
    court.push("b", 1.0, base=5)
    assert (court.outcome(ahead[1]), value(court)) == ("applied", 2.0)
    court.join("a", takeover=True)  # what the epoch before was told is not this one's
    assert court.outcome(court.push("a", 1.0, base=3)) == "dropped_late"


@pytest.mark.parametrize("ends", ["skips", "is infinite", "breaks", "is fenced"])
def test_a_round_without_a_version_makes_nobody_late(ends: str) -> None:
    """Though there is a newer version than that of the round before: one that an upload has made."""
    court = sync("a", "b", "c", quorum=2)
    court.push("a", 1.0)
    court.push("b", 1.0)
    straggler = court.push("c", 1.0, base=0)  # which is told of version 1
    court.do(court.coordinator.uploaded(court.identity("a"), 7, 0)[1] or ())
    court.holds_back = ends in ("breaks", "is fenced")
    for name in "ab":
        court.push(name, 3e38 if ends == "is infinite" else 1.0, skip=ends == "skips")
    if ends == "breaks":
        court.do(court.coordinator.reduced(court.combines.pop(), NonfiniteGradient(parameter="a"), 0))
    elif ends == "is fenced":
        for name in "ab":
            court.do(court.coordinator.evicted(name, 0))
    assert (court.commits.version, len(court.tickets)) == (2, 1)
    following = court.push("c", 1.0, base=1)
    assert [court.outcome(push) for push in (straggler, following)] == ["dropped_late", "pending"]


def test_skip_pushes_are_present_and_contribute_nothing() -> None:
    court = sync("a", "b", timeout_s=None)
    skip = court.push("a", skip=True)
    assert court.outcome(skip) == "pending"
    court.push("b", 4.0)
    assert (names(court), value(court), court.tickets[-1].divisor) == (["b"], 4.0, 1.0)
    assert court.outcome(skip) == "skipped"
    assert court.receipt(skip).version == 1  # what its worker goes on from
    both = [court.push(name, skip=True) for name in ("a", "b")]
    assert [court.outcome(push) for push in both] == ["skipped"] * 2
    assert court.commits.version == 1


def test_a_rejected_push_is_absent_until_the_time_out() -> None:
    court = sync("a", "b", timeout_s=5.0)
    rejected = court.push("b", float("nan"))
    assert court.outcome(rejected) == "rejected"
    push = court.push("a", 1.0)
    assert court.outcome(push) == "pending"
    court.wait(5)
    assert (court.outcome(push), value(court)) == ("applied", 1.0)


def test_a_rejected_worker_may_push_again_in_time() -> None:
    court = sync("a", "b", timeout_s=5.0)
    court.push("b", float("nan"))
    court.push("a", 1.0)
    court.push("b", 3.0)
    assert value(court) == 2.0


def test_finite_pushes_that_add_up_to_infinity_are_rejected_together() -> None:
    court = sync("a", "b", reduce="sum")
    pushes = [court.push(name, 3e38) for name in ("a", "b")]
    assert [court.outcome(push) for push in pushes] == ["rejected"] * 2
    assert court.commits.version == 0
    resolve = court.settled["a", 1, 1]
    assert resolve.decided is not None
    assert isinstance(resolve.decided.error, NonfiniteGradient)
    assert resolve.decided.error.consumed
    # whoever of them it was: nobody is quarantined for what came of all
    assert [worker.refused_in_row for worker in court.coordinator.sessions.workers.values()] == [0, 0]


def test_a_guard_rejects_a_round_whole() -> None:
    class Never(Hook):
        name, kind, points = "never", "guard", frozenset({Point.STEP_PRE})

        def step_pre(self, context: StepContext) -> None:
            raise ValueError(f"norm {context.gradient_norm:.3f}")

    court = sync("a", "b")
    court.commits.hooks.list.append(Never("never-1", Point.STEP_PRE, Settings()))
    pushes = [court.push(name, 1.0) for name in ("a", "b")]
    assert [court.outcome(push) for push in pushes] == ["rejected"] * 2
    assert (court.commits.version, court.coordinator.sessions.workers["a"].sequence) == (0, 1)


def test_what_arrives_while_a_round_is_added_up_waits_for_the_next() -> None:
    court = sync("a", "b")
    court.holds_back = True
    court.push("a", 1.0)
    court.push("b", 3.0)
    assert len(court.combines) == 1
    court.join("c")
    late = court.push("c", 7.0, base=0)
    assert court.outcome(late) == "pending"
    court.holds_back = False
    court.add_up()
    assert (court.commits.version, value(court)) == (1, 2.0)
    assert court.outcome(late) == "dropped_late"


@pytest.mark.parametrize("fences", ["evicts", "joins anew"])
def test_who_is_fenced_while_a_round_is_added_up_is_taken_out_of_it(fences: str) -> None:
    court = sync("a", "b")
    court.holds_back = True
    pushes = [court.push("a", 1.0), court.push("b", 3.0)]
    if fences == "evicts":
        court.do(court.coordinator.evicted("b", 0))
    else:
        court.join("b", takeover=True)
    assert len(court.combines) == 2
    court.holds_back = False
    court.add_up()  # the first one comes back too, and is of no use any more
    assert (names(court), value(court)) == (["a"], 1.0)
    assert [court.outcome(push) for push in pushes] == ["applied", "fenced"]


def test_how_long_a_push_waited_is_counted_to_its_outcome() -> None:
    """Also if another one's going, or the outcome of the one before it, is what decides it."""
    court = sync("a", "b")
    court.holds_back = True
    contributes = court.push("a", 1.0)
    court.wait(2)
    skips = court.push("b", skip=True)
    wrong = court.push("b", groups="a", edits=[GroupEdit(group=9, values=wire_values({"lr": 1.0}))])
    court.wait(3)
    court.do(court.coordinator.evicted("a", court.now_s))  # only the skip is left of the round
    assert [court.outcome(push) for push in (contributes, skips, wrong)] == ["fenced", "skipped", "rejected"]
    assert [court.receipt(push).times.wait_s for push in (skips, wrong)] == [3.0, 3.0]


def test_a_restore_ends_what_is_held() -> None:
    court = sync("a", "b", "c")
    court.holds_back = True
    for name in "abc":
        court.push(name, 1.0)
    court.do(court.coordinator.restored([(1, 0)], 2, policies.read({"policy": "sync"}), 0))
    court.holds_back = False
    court.add_up()
    assert [resolve.error.code for resolve in court.settled.values() if resolve.error] == ["superseded"] * 3
    assert (court.commits.version, court.tickets) == (0, [])
    court.join("a")
    assert court.outcome(court.push("a", 2.0)) == "applied"


@pytest.mark.parametrize(
    ("quorum", "pushed", "to", "outcomes", "versions"),
    [
        # below quorum everything is handed over, in worker order; at quorum (three cannot be there: it would have closed)
        (None, "ba", {"policy": "async"}, ["applied", "applied"], 2),
        (None, "ba", {"policy": "bounded"}, ["applied", "applied"], 2),
        (None, "ba", {"policy": "sync", "quorum": 2}, ["applied", "applied"], 1),
        (3, "ba", {"policy": "async"}, ["applied", "applied"], 2),
        (None, "ba", {"policy": "sync", "timeout_s": 9}, ["pending", "pending"], 0),
    ],
)
def test_a_switch_loses_nothing(
    quorum: int | None, pushed: str, to: dict[str, object], outcomes: list[str], versions: int
) -> None:
    court = sync("a", "b", "c", "d", quorum=quorum)
    pushes = [court.push(name, number) for name, number in zip(pushed, (3.0, 1.0), strict=True)]
    court.do(court.coordinator.switch(policies.read(to, court.coordinator.policy.settings), 0))
    assert [court.outcome(push) for push in pushes] == outcomes
    assert court.commits.version == versions
    if versions == 2:
        assert [ticket.identity.worker for ticket in court.tickets] == ["a", "b"]


def test_a_switch_at_quorum_steps_under_the_old_policy() -> None:
    """The quorum can be there with the round still open only when it was lowered in the same breath."""
    court = sync("a", "b", "c")
    pushes = [court.push(name, number) for name, number in (("b", 3.0), ("a", 1.0))]
    court.coordinator.policy.adopt(policies.read({"policy": "sync", "quorum": 2}))
    court.do(court.coordinator.switch(policies.read({"policy": "async"}), 0))
    assert [court.outcome(push) for push in pushes] == ["applied"] * 2
    assert (court.commits.version, names(court), value(court)) == (1, ["a", "b"], 2.0)
    assert {court.receipt(push).policy for push in pushes} == {"sync"}
    assert court.coordinator.policy.name == "async"


def test_a_switch_while_a_round_is_added_up_keeps_the_round() -> None:
    court = sync("a", "b")
    court.holds_back = True
    pushes = [court.push(name, 1.0) for name in ("a", "b")]
    court.do(court.coordinator.switch(policies.read({"policy": "async"}), 0))
    court.join("c")
    alone = court.push("c", 1.0)
    assert court.outcome(alone) == "applied"  # async waits for nobody, not even for that
    court.holds_back = False
    court.add_up()
    assert [court.outcome(push) for push in pushes] == ["applied"] * 2
    assert court.commits.version == 2
    assert [court.receipt(push).policy for push in (*pushes, alone)] == ["sync", "sync", "async"]


@pytest.mark.parametrize("fenced", [None, "a", "d"])
@pytest.mark.parametrize("to", [{"reduce": "mean", "quorum": 3}, {"policy": "async"}, {"policy": "bounded"}])
def test_a_round_that_is_closed_stays_what_it_is(to: dict[str, object], fenced: str | None) -> None:
    """Whatever is changed while it is added up, and though it is added up again: d, who only skips, too."""
    court = sync(*"abcd", reduce="sum")
    court.holds_back = True
    pushes = {name: court.push(name, number) for name, number in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    pushes["d"] = court.push("d", skip=True)
    court.do(court.coordinator.switch(policies.read(to, court.coordinator.policy.settings), 0))
    if fenced is not None:
        court.do(court.coordinator.evicted(fenced, 0))
        assert court.outcome(pushes.pop(fenced)) == "fenced"
    court.holds_back = False
    court.add_up()
    expected = (["b", "c"], 6.0) if fenced == "a" else (["a", "b", "c"], 7.0)
    assert (names(court), value(court), court.tickets[-1].divisor) == (*expected, 1.0)
    assert [court.outcome(pushes[name]) for name in pushes] == [
        "skipped" if name == "d" else "applied" for name in pushes
    ]
    assert {court.receipt(push).policy for push in pushes.values()} == {"sync"}


@pytest.mark.parametrize("refused", ["infinite", "broken"])
def test_a_round_is_refused_by_the_policy_that_closed_it(refused: str) -> None:
    court = sync("a", "b", reduce="sum")
    court.holds_back = True
    pushes = [court.push(name, 3e38 if refused == "infinite" else 1.0) for name in "ab"]
    court.do(court.coordinator.switch(policies.read({"policy": "async"}), 0))
    court.holds_back = False
    if refused == "broken":
        court.do(court.coordinator.reduced(court.combines.pop(), NonfiniteGradient(parameter="a"), 0))
    court.add_up()
    assert [court.outcome(push) for push in pushes] == ["rejected"] * 2
    assert {court.receipt(push).policy for push in pushes} == {"sync"}


def test_edits_count_from_the_lead_of_a_round_only() -> None:
    court = sync("a", "b", "c", "d")
    pushes = [
        court.push(name, 1.0, edits=[GroupEdit(group=0, values=wire_values({"lr": lr}))])
        for name, lr in (("d", 0.1), ("b", 0.2), ("a", 0.3), ("c", 0.4))
    ]
    assert court.tickets[-1].groups[0].values["lr"].number == 0.3
    ignored = {push.worker: list(court.receipt(push).ignored_edits) for push in pushes}
    assert ignored == {"a": [], "b": ["0.lr"], "c": ["0.lr"], "d": ["0.lr"]}
    assert [court.receipt(push).lead for push in pushes] == [False, False, True, False]


def test_eight_pushes_may_be_in_flight_and_are_judged_in_order() -> None:
    from pushstep.proto.errors import OutOfOrder, TooManyInFlight

    court = sync("a", "b", timeout_s=None)
    flying = [court.push("a", float(number), base=0) for number in range(8)]
    with pytest.raises(TooManyInFlight):
        court.push("a", 9.0, sequence=9)
    with pytest.raises(OutOfOrder):
        court.push("b", 1.0, sequence=2)
    for number in range(8):
        assert [court.outcome(push) for push in flying[number:]] == ["pending"] * (8 - number)
        court.push("b", 1.0)
        assert (court.outcome(flying[number]), value(court)) == ("applied", (number + 1) / 2)
