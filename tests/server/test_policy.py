"""async and bounded, as tables over the judge: which pushes are stepped, how, and who has to wait."""

from __future__ import annotations

import math
import random

import pytest

from pushstep.proto.errors import InvalidSettings
from pushstep.proto.training_pb2 import PushHeader
from pushstep.server.coordinator.decision import Offer
from pushstep.server.coordinator.policies import catalogue as policies
from pushstep.server.coordinator.push import PendingPush
from tests.simulation.seeded_bugs import Bug, found_by
from tests.support.servers.judged import Court, dense


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
    version = court.commits.version
    push = court.push("slow", base=0, groups=groups)
    receipt = court.receipt(push)
    assert (court.outcome(push), receipt.staleness) == (outcome, stale)
    if outcome == "applied":
        assert court.tickets[-1].lr_scale == receipt.lr_scale == lr_scale
        assert court.tickets[-1].factor == 1.0  # never the gradient: a factor on it cancels in both rules
        assert receipt.version == version + 1
        assert list(receipt.contributors) == ["slow"]
    else:
        assert court.commits.version == version
        assert court.coordinator.sessions.workers["slow"].sequence == 1  # the verdict took the sequence
        assert receipt.reason == "too_stale"
        assert f"staleness {stale}" in receipt.notes[0]


def test_bounded_lets_a_worker_run_ahead_as_far_as_the_bound() -> None:
    court = Court(policy="bounded", bound=2)
    court.join("a", "b")
    for _ in range(3):  # at clocks 0, 1 and 2
        court.push("a")
    assert court.offer(court.header("a")) is Offer.WAIT
    assert not court.coordinator.sessions.workers["a"].receiving  # what waits holds nothing
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
        court.do(court.coordinator.on_leave(court.identity("b"), 0)[1])
    elif gone == "is evicted":
        court.do(court.coordinator.evicted("b", 0))
    elif gone == "is quarantined":
        court.coordinator.sessions.workers["b"].refused_in_row = 19
        court.push("b", float("nan"))
        assert court.coordinator.sessions.workers["b"].quarantined
    else:
        court.wait(29)
        assert court.offer(header) is Offer.WAIT
        assert court.coordinator.next_s() == 30
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
    view = court.coordinator.pending_pushes.view(0)
    clocks = {w.name: court.coordinator.policy.shown(view)(w)["clock"] for w in view.members}
    assert clocks == {"a": 6, "b": 5, "c": 5}
    court.join("a", takeover=True)
    view = court.coordinator.pending_pushes.view(0)
    assert court.coordinator.policy.shown(view)(court.coordinator.sessions.workers["a"]) == {
        "clock": 5,
        "clocks_ahead": 0,
    }


def test_retries_never_tick() -> None:
    court = Court(policy="bounded", bound=0)
    court.join("a", "b")
    first = court.push("a")
    for _ in range(3):
        again = court.push("a", sequence=1)
        assert not again.accepted
    assert court.receipt(first).duplicates == 3
    assert court.offer(court.header("a")) is Offer.WAIT
    court.push("b")
    assert court.offer(court.header("a")) is Offer.READ


class Schedule:
    """Workers under SSP that come, push and go at random, against clocks kept here.

    After every event each of them is asked whether its next push would have to wait: it must exactly while it is more
    than the bound ahead of the slowest, so it is held back at that event and not before, and let go at the very event
    that moves the slowest. Bodies take their time: a worker may have several on their way, all let in by then.
    """

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.bound = self.draw.randrange(4)
        self.names = [f"w{index}" for index in range(self.draw.randrange(1, 6))]
        self.court = Court(policy="bounded", bound=self.bound)
        self.clocks: dict[str, int] = {}
        # let in, and not here yet
        self.bodies: dict[str, list[PushHeader]] = {}
        self.applied = self.blocked = 0
        for name in self.names:
            self.come(name)

    def come(self, name: str, **how: bool) -> None:
        self.court.join(name, **how)
        self.clocks.pop(name, None)  # whose place is taken does not count
        self.clocks[name] = min(self.clocks.values(), default=0)
        self.bodies[name] = []

    def go(self, name: str) -> None:
        """In order, by an operator's hand, or without a word."""
        if self.draw.random() < 0.5:
            self.court.do(self.court.coordinator.on_leave(self.court.identity(name), self.court.now_s)[1])
        else:
            self.court.do(self.court.coordinator.evicted(name, self.court.now_s))
        del self.clocks[name], self.bodies[name]

    def offer(self, name: str) -> None:
        """Another push: let in if its turn is within the bound."""
        header = self.header(name)
        if self.court.offer(header) is Offer.READ:
            self.bodies[name].append(header)

    def header(self, name: str) -> PushHeader:
        decided = self.court.coordinator.sessions.workers[name].sequence
        return self.court.header(name, sequence=decided + 1 + len(self.bodies[name]))

    def arrive(self, name: str) -> None:
        """The oldest body on its way: applied, or refused, and either way a clock more."""
        header = self.bodies[name].pop(0)
        ahead = self.clocks[name] - min(self.clocks.values())
        value = 1.0 if self.draw.random() < 0.9 else math.nan
        self.court.coordinator.on_stream_end(header.identity)
        pending = PendingPush(header, digest=1, push=dense(value))
        self.court.do(self.court.coordinator.on_body(pending, self.court.now_s))
        outcome = self.court.outcome(pending)
        assert outcome == ("applied" if value == 1.0 else "rejected")
        assert ahead <= self.bound, f"{name} was applied {ahead} clocks ahead, the bound is {self.bound}"
        self.applied += outcome == "applied"
        self.clocks[name] += 1
        again = self.court.header(name, sequence=header.identity.sequence)
        if self.draw.random() < 0.2 and self.court.offer(again) is Offer.READ:  # a retry never ticks
            self.court.coordinator.on_stream_end(again.identity)

    def event(self) -> None:
        drawn, name = self.draw.random(), self.draw.choice(self.names)
        if name not in self.clocks:
            self.come(name)
        elif drawn < 0.05 and len(self.clocks) > 1:
            self.go(name)
        elif drawn < 0.08:
            self.come(name, takeover=True)
        elif drawn < 0.55 and self.bodies[name]:
            self.arrive(name)
        elif len(self.bodies[name]) < 3:
            self.offer(name)

    def check(self) -> None:
        slowest = min(self.clocks.values(), default=0)
        for name, clock in self.clocks.items():
            header = self.header(name)
            offer = self.court.offer(header)
            if offer is Offer.READ:
                self.court.coordinator.on_stream_end(header.identity)
            ahead = clock + len(self.bodies[name]) - slowest
            assert (offer is Offer.WAIT) == (ahead > self.bound), (
                f"{name} would be {ahead} clocks ahead, the bound is {self.bound}: {offer}"
            )
            self.blocked += offer is Offer.WAIT


def run_schedules(seeds: range) -> tuple[int, int]:
    """How many pushes they applied, and how often a worker was held back."""
    applied = blocked = 0
    for seed in seeds:
        schedule = Schedule(seed)
        for _ in range(30):
            schedule.event()
            schedule.check()
        applied, blocked = applied + schedule.applied, blocked + schedule.blocked
    return applied, blocked


def test_no_applied_push_exceeds_the_bound_and_blocking_is_exact() -> None:
    """1000 random schedules."""
    applied, blocked = run_schedules(range(1000))
    assert min(applied, blocked) > 5000
    print(f"\n1000 schedules under SSP: {applied} pushes applied, {blocked} times somebody had to wait")


@pytest.mark.parametrize("bug", found_by("schedules"), ids=str)
def test_a_seeded_bug_is_found(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.put_in(monkeypatch)
    with pytest.raises(AssertionError, match=bug.says):
        run_schedules(range(100))


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
