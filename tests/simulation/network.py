"""A network that delays, drops, repeats and reorders messages, and that a partition cuts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .loop import SimulatedLoop

Deliver = Callable[[], None]


@dataclass
class Weather:
    """How bad it is: probabilities, and the longest delay of most messages and of the odd one."""

    drop: float = 0.05
    repeat: float = 0.05
    stall: float = 0.03
    delay_s: float = 0.05
    stall_s: float = 3.0
    # of a body that it stops half way
    breaks: float = 0.03


CALM = Weather(drop=0.0, repeat=0.0, stall=0.0, breaks=0.0)


class Network:
    """Between the workers and the server. Messages of one worker overtake each other."""

    def __init__(self, loop: SimulatedLoop, chance: random.Random, weather: Weather) -> None:
        self.loop = loop
        self.chance = chance
        self.weather = weather
        self.cut: set[str] = set()
        self.counts = {"sent": 0, "dropped": 0, "repeated": 0}

    def send(self, worker: str, deliver: Deliver) -> None:
        """Bring a message from or to `worker`: not at all, once, or twice."""
        self.counts["sent"] += 1
        if worker in self.cut or self.chance.random() < self.weather.drop:
            self.counts["dropped"] += 1
            return
        copies = 1
        if self.chance.random() < self.weather.repeat:
            copies = 2
            self.counts["repeated"] += 1
        for _ in range(copies):
            self.loop.after(self.delay_s(), lambda: self._arrive(worker, deliver))

    def calm(self) -> None:
        """Nothing goes wrong from here on."""
        self.weather = CALM
        self.cut.clear()

    def bring(self, worker: str, whole: Deliver, broken: Deliver) -> None:
        """Bring a push's body after its header, or break off half way."""
        arrives = broken if self.chance.random() < self.weather.breaks else whole
        self.loop.after(self.delay_s(), arrives)

    def delay_s(self) -> float:
        """How long a message takes."""
        longest_s = (
            self.weather.stall_s if self.chance.random() < self.weather.stall else self.weather.delay_s
        )
        return self.chance.uniform(0.001, longest_s)

    def _arrive(self, worker: str, deliver: Deliver) -> None:
        if worker not in self.cut:
            deliver()
