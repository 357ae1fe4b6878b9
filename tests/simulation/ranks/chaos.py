"""A run at random: how many ranks and workers, how bad the network, and what dies when. One seed draws it all."""

from __future__ import annotations

import logging
import random
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.simulation.chaos import warm
from tests.simulation.witness import require

from .disk import watched
from .group import Group
from .links import Weather, Winds
from .model import INTENTS_EACH, PARAMETERS, WORKERS, Intent
from .worker import Habits, Worker
from .world import ProcessLoop, World

EVENTS = (
    "kill",
    "kill",
    "kill_zero",
    "cut",
    "vanish",
    "stop",
    "snapshot",
    "snapshot",
    "crash",
    "crash",
    "come_back",
    "come_back",
)
EVENTS_PER_RUN = 6
# Of all runs: those in which nothing happens before there is a model.
BEGUN = 0.8
WARM = 0
PAUSES_S = (0.02, 0.05, 0.2, 0.5, 1.0, 1.0, 3.0)
# Until a thread gets round to a piece of work.
WORK_S = {
    "pushes": (0.0, 0.01, 0.2),
    "stepper": (0.0, 0.0, 0.005, 0.1),
    "disk": (0.0, 0.01),
    "snapshots": (0.0, 0.01, 0.3),
    "journal": (0.001, 0.005, 0.1),
    "requests": (0.0,),
    "pulls": (0.0, 0.01),
    "asyncio": (0.0,),
}
PROMPT_S = dict.fromkeys(WORK_S, (0.001,))
# Steps that everybody takes at the end, and how long that may take: ranks may have to be missed, and leases to run out.
LAST_STEPS = 1
LAST_S = 200.0
# A part whose push never came is forgotten after a minute.
QUIET_S = 140.0


@dataclass
class Run:
    """One run, once it is over."""

    group: Group
    workers: dict[str, Worker]
    versions: int
    events: list[str]


class Chaos:
    """The job, its workers, and what happens to them."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.chance, fate = random.Random(~seed), random.Random(seed)
        bad = self.chance.choice((0.0, 1.0, 1.0, 3.0))
        weather = Weather(
            delay_s=self.chance.choice((0.002, 0.02, 0.2)),
            stall=0.02 * bad,
            breaks=0.02 * bad,
            loses=0.03 * bad,
        )
        self.world = World()
        self.winds = Winds(fate, weather)
        level = self.chance.choice(("durable", "durable", "durable", "everysec", "applied"))
        ranks = self.chance.choice((2, 2, 3, 4))
        self.group = Group(self.world, self.winds, fate, folder, ranks, level, dict(WORK_S))
        self.group.power_is_lost = self.chance.choice((0.0, 0.3))
        self.outside = ProcessLoop(self.world)
        self.names = [f"w{index}" for index in range(self.chance.randint(1, WORKERS))]
        self.workers: dict[str, Worker] = {}
        self.events: list[str] = []
        self._fate = fate
        self._drawn: dict[str, int] = {}
        self._kept = 30
        self._whole = self.chance.random() < 0.3
        for name in self.names:
            self.start(name)

    def start(self, name: str) -> None:
        """A process of a worker."""
        habits = Habits(self.chance.choice((0.05, 0.2, 0.5)), self.chance.choice((1.0, 0.7, 0.0)))
        self.workers[name] = Worker(
            name, self.world, self.outside, self.winds, self.group, self._fate, habits, self._draw
        )

    def _draw(self, name: str) -> Intent | None:
        number = self._drawn.get(name, 0)
        if number >= INTENTS_EACH - self._kept:
            return None
        self._drawn[name] = number + 1
        touches = tuple(range(PARAMETERS))
        if not self._whole and self._fate.random() < 0.5:
            touches = tuple(sorted(self._fate.sample(touches, self._fate.randint(1, PARAMETERS - 1))))
        return Intent(name, number, touches, skip=self._fate.random() < 0.05)

    def happen(self, event: str) -> None:
        """Let one event happen."""
        name, rank = self.chance.choice(self.names), self.chance.randrange(1, self.group.world_size)
        self.events.append(f"{self.world.now_s:8.3f} {event} {name if 'cra' in event else rank}")
        match event:
            case "kill":
                self.group.kill(rank)
            case "kill_zero":
                self.group.kill(0)
            case "cut":
                self.group.cut(rank, is_noticed=True)
            case "vanish":
                self.group.cut(rank, is_noticed=False)
            case "stop":
                self.group.stop()
            case "snapshot":
                self.group.take_snapshot()
            case "crash":
                self.workers[name].crash()
            case _:
                if not self.workers[name].is_alive:
                    self.start(name)

    def finish(self) -> None:
        """Nothing goes wrong any more: everybody gets on, and all ranks hold the same."""
        self.winds.calm()
        self.group.be_calm(PROMPT_S)
        self._kept = 0
        for name in self.names:
            if not self.workers[name].is_alive:
                self.start(name)
            self.workers[name].habits = Habits(0.2, 1.0)
        goals = {name: worker.done + LAST_STEPS for name, worker in self.workers.items()}

        def enough() -> bool:
            return all(
                worker.done >= goals[name] or self._drawn.get(name, 0) >= INTENTS_EACH
                for name, worker in self.workers.items()
            )

        require(self.world.advance(LAST_S, enough), f"not everybody gets on within {LAST_S:.0f} s")
        self._kept = INTENTS_EACH
        idle = lambda: all(worker.is_idle or not worker.is_alive for worker in self.workers.values())  # noqa: E731
        require(self.world.advance(LAST_S, idle), "a push is not answered")
        for worker in self.workers.values():
            worker.crash()
        self.world.advance(QUIET_S)
        self.group.witness.check()


@cache
def _warm() -> None:
    """Have the kernels compiled."""
    warm()
    _run(WARM, log=False)  # the first run of a process may meet kernels that are not compiled


def run(seed: int, *, log: bool = False) -> Run:
    """One whole run. Violation, or any other error, if something is wrong."""
    _warm()
    return _run(seed, log=log)


def _run(seed: int, *, log: bool) -> Run:
    log_of_all = logging.getLogger("pushstep")
    level = log_of_all.level
    log_of_all.setLevel(logging.CRITICAL + 1)  # ranks that are lost are meant to be
    try:
        return _quietly(seed, log=log)
    finally:
        log_of_all.setLevel(level)


def _quietly(seed: int, *, log: bool) -> Run:
    safe_bytes: dict[Path, int] = {}
    deaths: list[int] = []
    with tempfile.TemporaryDirectory(prefix="ranks-", dir=_memory()) as folder, watched(safe_bytes, deaths):
        chaos = Chaos(seed, Path(folder))
        chaos.group.safe_bytes, chaos.group.deaths = safe_bytes, deaths
        if chaos.chance.random() < BEGUN:
            chaos.world.advance(LAST_S, lambda: chaos.group.witness.is_created)
        rough = chaos.chance.choice((0, EVENTS_PER_RUN // 2, EVENTS_PER_RUN))
        for _ in range(rough + 2):
            chaos.world.advance(chaos.chance.choice(PAUSES_S))
            if rough and chaos.group.starts:
                chaos.happen(chaos.chance.choice(EVENTS))
                if log:
                    print(chaos.events[-1])
        chaos.finish()
        witness = chaos.group.witness
        for process in chaos.group.processes:
            if process is not None:
                process.bury()
        return Run(chaos.group, chaos.workers, len(witness.history), chaos.events)


def _memory() -> str | None:
    """A folder in memory, if there is one: a fake disk need not last."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
