"""async and bounded, as tables over the judge: which pushes are stepped, how, and who has to wait."""

from __future__ import annotations

import random

import pytest
from judged import Court

from pushstep.proto.errors import InvalidSettings
from pushstep.server import policies
from pushstep.server.decision import Offer


@pytest.mark.parametrize(
    ("settings", "groups", "stale", "outcome", "lr_scale"),
    [
        ({}, "a", 9, "applied", 1.0),
        ({"scale": True}, "a", 0, "applied", 1.0),
        ({"scale": True}, "a", 3, "applied", 0.25),
        ({"max_staleness": 2}, "a", 2, "applied", 1.0),
        ({"max_staleness": 2}, "a", 3, "too_stale", 1.0),
        ({"max_staleness": 2, "scale": True}, "a", 2, "applied", 1 / 3),
        ({"max_staleness": 0}, "a", 1, "too_stale", 1.0),
        # one group too stale refuses the whole push; a group that it does not touch does not
        ({"max_staleness_by_group": {"1": 1}}, "a", 9, "applied", 1.0),
        ({"max_staleness_by_group": {"1": 1}}, "ab", 2, "too_stale", 1.0),
        ({"max_staleness_by_group": {"1": 1}}, "b", 1, "applied", 1.0),
        ({"max_staleness": 1, "max_staleness_by_group": {"0": 5}}, "a", 5, "applied", 1.0),
        ({"max_staleness": 1, "max_staleness_by_group": {"0": 5}}, "ab", 5, "too_stale", 1.0),
    ],
)
def test_async_accepts_scales_or_refuses_by_staleness(
    settings: dict[str, object], groups: str, stale: int, outcome: str, lr_scale: float
) -> None:
    court = Court(**settings)
    court.join("fast", "slow")
    for _ in range(stale):
        court.push("fast", groups="a" if "max_staleness" not in settings else groups)
    version = court.ledger.version
    push = court.push("slow", base=0, groups=groups)
    receipt = court.receipt(push)
    assert (court.outcome(push), receipt.staleness) == (outcome, stale)
    if outcome == "applied":
        assert court.tickets[-1].lr_scale == receipt.lr_scale == lr_scale
        assert court.tickets[-1].factor == 1.0  # never the gradient: a factor on it cancels in both rules
        assert receipt.version == version + 1
        assert list(receipt.contributors) == ["slow"]
    else:
        assert court.ledger.version == version
        assert court.judge.sessions.workers["slow"].sequence == 1  # the verdict took the sequence
        assert receipt.reason == "too_stale"
        assert f"staleness {stale}" in receipt.notes[0]


def test_bounded_lets_a_worker_run_ahead_as_far_as_the_bound() -> None:
    court = Court(policy="bounded", bound=2)
    court.join("a", "b")
    for _ in range(3):  # at clocks 0, 1 and 2
        court.push("a")
    assert court.offer(court.header("a")) is Offer.WAIT
    assert not court.judge.sessions.workers["a"].coming  # what waits holds nothing
    court.push("b")
    court.push("a")
    assert court.offer(court.header("a")) is Offer.WAIT


@pytest.mark.parametrize("gone", ["leaves", "expires", "is evicted", "is quarantined"])
def test_bounded_waits_for_nobody_who_is_gone(gone: str) -> None:
    court = Court(policy="bounded", bound=0)
    court.join("a", "b")
    court.push("a")
    header = court.header("a")
    assert court.offer(header) is Offer.WAIT
    if gone == "leaves":
        court.do(court.judge.left(court.identity("b"), 0))
    elif gone == "is evicted":
        court.do(court.judge.evicted("b", 0))
    elif gone == "is quarantined":
        court.judge.sessions.workers["b"].refused_in_row = 19
        court.push("b", float("nan"))
        assert court.judge.sessions.workers["b"].quarantined
    else:
        court.wait(29)
        assert court.offer(header) is Offer.WAIT
        assert court.judge.next_s() == 30
        court.wait(1.001)
    assert court.offer(header) is Offer.READ


def test_joiners_and_returners_start_at_the_slowest_clock() -> None:
    court = Court(policy="bounded", bound=1)
    court.join("a", "b")
    for _ in range(5):
        court.push("a")
        court.push("b")
    court.push("a")  # 6 and 5
    court.join("c")
    view = court.judge.docket.view(0)
    clocks = {w.name: court.judge.policy.show(w, view)["clock"] for w in view.members}
    assert clocks == {"a": 6, "b": 5, "c": 5}
    court.join("a", takeover=True)
    view = court.judge.docket.view(0)
    assert court.judge.policy.show(court.judge.sessions.workers["a"], view) == {"clock": 5, "clocks_ahead": 0}


def test_retries_never_tick() -> None:
    court = Court(policy="bounded", bound=0)
    court.join("a", "b")
    first = court.push("a")
    for _ in range(3):
        again = court.push("a", sequence=1)
        assert not again.taken
    assert court.receipt(first).duplicates == 3
    assert court.offer(court.header("a")) is Offer.WAIT
    court.push("b")
    assert court.offer(court.header("a")) is Offer.READ


@pytest.mark.parametrize("seed", range(10))
def test_no_applied_push_exceeds_the_bound_and_blocking_is_exact(seed: int) -> None:
    """100 random schedules each, against clocks kept by the test."""
    for number in range(100):
        draw = random.Random(1000 * seed + number)
        bound, names = draw.randrange(4), [f"w{i}" for i in range(draw.randrange(1, 6))]
        court = Court(policy="bounded", bound=bound)
        court.join(*names)
        clocks = dict.fromkeys(names, 0)
        for _ in range(30):
            event, name = draw.random(), draw.choice(names)
            if event < 0.06 and name in clocks and len(clocks) > 1:
                court.do(court.judge.left(court.identity(name), 0))
                del clocks[name]
            elif event < 0.12 and name not in clocks:
                court.join(name)
                clocks[name] = min(clocks.values(), default=0)
            elif name in clocks:
                ahead = clocks[name] - min(clocks.values())
                if ahead > bound:
                    assert court.offer(court.header(name)) is Offer.WAIT
                else:
                    assert court.outcome(court.push(name)) == "applied"
                    clocks[name] += 1
        assert max(clocks.values()) - min(clocks.values()) <= bound + 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "eventual"},
        {"policy": 3},
        {"policy": "bounded", "bound": -1},
        {"policy": "bounded", "scale": True},
        {"policy": "async", "max_staleness": 1.5},
        {"policy": "sync", "reduce": "median"},
        {"policy": "sync", "timeout_s": 0},
        {"policy": "sync", "quorum": 0},
        {"policy": "sync", "min_workers": 0},
    ],
)
def test_settings_are_refused_whole(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidSettings):
        policies.read(wrong)


def test_what_is_left_out_stays_within_a_policy_and_is_the_default_of_a_new_one() -> None:
    first = policies.read({"policy": "sync", "quorum": 2, "late": "carry"})
    assert policies.read({"quorum": 3}, first) == policies.read(
        {"policy": "sync", "quorum": 3, "late": "carry"}
    )
    assert policies.read({"policy": "bounded"}, first) == policies.read({"policy": "bounded", "bound": 3})
    assert policies.read({}) == policies.read({"policy": "async"})
