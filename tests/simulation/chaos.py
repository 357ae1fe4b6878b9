"""A run at random: which policy, how many workers, how bad the network, and what happens when. One seed draws it all."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from .loop import Action, SimulatedLoop
from .network import CALM, Network, Weather
from .simulation import TIMEOUT_S, Plan, Settings, Simulation
from .worker import RETRY_FOR_S, Habits

EVENTS = (
    "crash",
    "come_back",
    "come_back",
    "partition",
    "heal",
    "heal",
    "leave",
    "takeover",
    "visit",
    "evict",
    "release",
    "switch",
    "patch",
    "snapshot",
    "restore",
    "restart",
    "stop",
    "fail",
)
EVENTS_PER_RUN = 12
# between two events; the longest outlasts a lease
PAUSES_S = (0.05, 0.5, 0.5, 1.0, 1.0, 3.0, 3.0, 3.0, 14.0)

# Until the server gets round to a piece of work.
WORK_S = {
    "pushes": (0.0, 0.01, 0.3),
    "stepper": (0.0, 0.0, 0.005, 0.2),
    "disk": (0.0, 0.01, 0.1),
    "snapshots": (0.0, 0.01, 0.1),
}


def draw_policy(chance: random.Random, workers: int) -> Settings:
    """Any policy with any settings."""
    name = chance.choice(("async", "bounded", "sync", "sync"))
    settings: dict[str, Any] = {"policy": name}
    if name == "async":
        settings |= {"scale": chance.random() < 0.3, "max_staleness": chance.choice((None, None, 0, 2, 5))}
    elif name == "bounded":
        settings |= {"bound": chance.choice((0, 1, 3))}
    else:
        settings |= {
            "reduce": chance.choice(("sum", "mean")),
            "min_workers": chance.randint(1, workers),
            "quorum": chance.choice((None, None, max(1, workers - 1))),
            "timeout_s": chance.choice((TIMEOUT_S, 1.0, None)),
            "late": chance.choice(("drop", "carry")),
        }
    return settings


def draw_plan(chance: random.Random) -> Plan:
    """A run's constants."""
    workers = chance.randint(2, 5)
    bad = chance.choice((0.0, 1.0, 1.0, 3.0))
    weather = Weather(
        drop=0.04 * bad,
        repeat=0.04 * bad,
        stall=0.03 * bad,
        breaks=0.03 * bad,
        delay_s=chance.choice((0.02, 0.2)),
    )
    habits = [
        Habits(
            think_s=chance.choice((0.2, 0.5, 0.5, 2.0, 2.0, 2.0, 30.0)),
            window=chance.choice((1, 1, 3)),
            pulls=chance.choice((1.0, 1.0, 0.5)),
            retry_for_s=chance.choice((6.0, RETRY_FOR_S)),
            schedules=chance.random() < 0.5,
        )
        for _ in range(workers)
    ]
    poisons = chance.random() < 0.25
    return Plan(
        workers,
        weather,
        habits,
        draw_policy(chance, workers),
        {"quarantine_after": 3, "nonfinite": chance.choice(("reject", "skip"))},
        poison=0.3 if poisons else 0.0,
        skips=chance.choice((0.0, 0.0, 0.1)),
        weighs=chance.random() < 0.3,
        max_workers=chance.choice((100, 100, workers - 1)),
        takes_small=chance.random() < 0.5,
    )


def happen(simulation: Simulation, event: str, name: str, chance: random.Random) -> None:
    """Let one event happen, to one worker where it is of one."""
    match event:
        case "takeover":
            simulation.start(name, takeover=True)
        case "switch":
            simulation.switch(draw_policy(chance, len(simulation.names)))
        case "patch":
            simulation.house.patch(chance.choice((0.5, 0.25)), hold=chance.random() < 0.5)
        case "snapshot":
            simulation.house.take_snapshot()
        case "restore":
            simulation.house.restore()
        case "restart":
            simulation.house.stop_and_start(orderly=False)
        case "stop":
            simulation.house.stop_and_start(orderly=True)
        case _:
            getattr(simulation, event)(name)


@cache
def warm() -> None:
    """Have the kernels compiled: until they are, the event loop leaves small pushes to a thread."""
    loop, chance = SimulatedLoop(), random.Random(0)
    Simulation(chance, Plan(workers=1), loop, Network(loop, chance, CALM)).advance(3.0)


def run(seed: int, *, log: bool = False) -> Simulation:
    """One whole run. Violation, or any other error, if something is wrong."""
    chance, fate = random.Random(~seed), random.Random(seed)
    warm()
    plan, loop = draw_plan(chance), SimulatedLoop()

    def work(kind: str, action: Action) -> None:
        loop.after(fate.choice(WORK_S[kind]), action)

    simulation = Simulation(fate, plan, loop, Network(loop, fate, plan.weather))
    loop.runner = work
    rough = chance.choice((0, EVENTS_PER_RUN // 2, EVENTS_PER_RUN))
    for _ in range(rough + 3):
        simulation.advance(chance.choice(PAUSES_S))
        if rough:
            event, name = chance.choice(EVENTS), chance.choice(simulation.names)
            if log:
                print(f"{simulation.loop.now_s:8.3f} {event} {name}")
            happen(simulation, event, name, chance)
    simulation.finish()
    return simulation
