"""A run event by event, told by hypothesis: which message arrives next, which is lost or comes twice, who crashes when.

chaos.py draws whole runs from a seed; here each step is one event, so that a failure shrinks to the short story that
leads to it. The witness looks on; after each event the arenas must hold what its story makes; at the end everything
calms down, and everybody must get on.
"""

from __future__ import annotations

import random
import sys
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from .by_hand import Hand
from .chaos import warm
from .loop import SimulatedLoop
from .simulation import Plan, Settings, Simulation
from .worker import Habits

NAMES = ("w0", "w1", "w2")
# Their time-outs are there, or who is told to do nothing would hang a round.
POLICIES: tuple[Settings, ...] = (
    {"policy": "async"},
    {"policy": "async", "max_staleness": 1},
    {"policy": "async", "scale": True},
    {"policy": "bounded", "bound": 0},
    {"policy": "bounded", "bound": 1},
    {"policy": "sync", "timeout_s": 3.0, "reduce": "sum"},
    {"policy": "sync", "timeout_s": 3.0, "reduce": "mean", "late": "carry"},
    {"policy": "sync", "timeout_s": 3.0, "reduce": "mean", "late": "drop", "quorum": 2},
)
# A stream's patience, an attempt's, a round's, a lease's.
WAITS_S = (0.1, 1.1, 2.1, 3.1, 10.1)
# Less than the witness allows for adding a round up.
MOMENT_S = 0.5

workers = st.sampled_from(NAMES)
places = st.integers(0, 9)
policies = st.sampled_from(POLICIES)


class Story(RuleBasedStateMachine):
    """Three workers and a server; hypothesis says what happens."""

    @initialize(
        policy=policies, window=st.sampled_from((1, 3)), nonfinite=st.sampled_from(("reject", "skip"))
    )
    def begin(self, policy: Settings, window: int, nonfinite: str) -> None:
        warm()
        loop = SimulatedLoop()
        self.hand = Hand(loop)
        plan = Plan(
            workers=len(NAMES),
            habits=[Habits(window=window, pulls=1.0, retry_for_s=6.0, by_hand=True) for _ in NAMES],
            policy=policy,
            gate={"quarantine_after": 2, "nonfinite": nonfinite},
        )
        self.simulation = Simulation(random.Random(0), plan, loop, self.hand)
        loop.runner = self.hand.work
        self.flow()

    # Messages.

    @precondition(lambda self: self.hand.loose)
    @rule(place=places)
    def let(self, place: int) -> None:
        self.hand.let(place % len(self.hand.loose))

    @precondition(lambda self: self.hand.loose)
    @rule(place=places)
    def lose(self, place: int) -> None:
        self.hand.lose(place % len(self.hand.loose))

    @precondition(lambda self: self.hand.loose)
    @rule(place=places)
    def repeat(self, place: int) -> None:
        self.hand.repeat(place % len(self.hand.loose))

    @rule()
    def flow(self) -> None:
        """All that is on its way arrives in order, with what follows from it."""
        while self.hand.loose:
            self.hand.let(0)
            self.simulation.advance(0.0)

    @precondition(lambda self: self.hand.cut)
    @rule()
    def heal(self) -> None:
        self.hand.cut.clear()

    # Time.

    @rule(seconds=st.sampled_from(WAITS_S))
    def wait(self, seconds: float) -> None:
        """The server's own work is put off for a moment, and not for as long as anybody likes."""
        until_s = self.simulation.loop.now_s + seconds
        while (left_s := until_s - self.simulation.loop.now_s) > 0:
            self.hand.work_off()
            self.simulation.advance(min(left_s, MOMENT_S))

    # Workers.

    @rule(
        name=workers,
        kind=st.sampled_from(
            ({}, {}, {}, {"both": True}, {"poison": True}, {"skip": True}, {"samples": 3.0})
        ),
    )
    def push(self, name: str, kind: dict[str, Any]) -> None:
        if self.simulation.processes[name].ready:
            self.simulation.processes[name].push(self.simulation.intend(name, **kind))

    @rule(name=workers)
    def step(self, name: str) -> None:
        """A push that nothing happens to."""
        self.push(name, {})
        self.flow()

    @rule(name=workers)
    def beat(self, name: str) -> None:
        if self.simulation.processes[name].alive:
            self.simulation.processes[name].beat()

    @rule(name=workers)
    def decay(self, name: str) -> None:
        self.simulation.processes[name].decay()

    @rule(name=workers)
    def retire(self, name: str) -> None:
        """A worker's scheduler steps once more, and the worker goes in order: no push takes the edit along."""
        self.flow()
        self.decay(name)
        self.simulation.leave(name)

    @rule(name=workers, takeover=st.booleans())
    def start(self, name: str, takeover: bool) -> None:
        """Another process under the name, which may have to wait for the lease; the old one, if it lives, goes on."""
        self.simulation.start(name, takeover=takeover)

    # Trouble. One rule for several, since hypothesis picks rules evenly: most of the time somebody should work.

    @rule(name=workers, trouble=st.sampled_from(("crash", "partition", "evict", "release", "fail")))
    def befall(self, name: str, trouble: str) -> None:
        getattr(self.simulation, trouble)(name)

    @rule(policy=policies)
    def switch(self, policy: Settings) -> None:
        self.simulation.switch(policy)

    @rule(lr=st.sampled_from((0.5, 0.25)), hold=st.booleans())
    def patch(self, lr: float, hold: bool) -> None:
        self.simulation.house.patch(lr, hold=hold)

    @rule(command=st.sampled_from(("snapshot", "restore", "stop", "kill")))
    def command(self, command: str) -> None:
        house = self.simulation.house
        if command == "snapshot":
            house.take_snapshot()
        elif command == "restore":
            house.restore()
        else:
            house.stop_and_start(orderly=command == "stop")

    # What must hold.

    @invariant()
    def the_state_is_what_was_decided(self) -> None:
        self.simulation.advance(0.0)
        self.simulation.check_state()

    def teardown(self) -> None:
        """Nothing goes wrong any more; unless something has."""
        if sys.exc_info()[1] is None:
            self.simulation.finish()
