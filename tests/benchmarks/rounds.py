"""Turns in rounds: A B C A B C, so that a noisy neighbour hits all sides alike, and what came of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .machine import Others
from .side import Side, Turn

PAUSE_S = 0.03  # torch's worker threads spin for some milliseconds after an operation


@dataclass
class Measured:
    """All repeats of one side."""

    times_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    servers_cpu_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def add(self, turn: Turn) -> None:
        """Count a turn in."""
        self.times_s += turn.times_s
        self.cpu_s.append(turn.cpu_s)
        self.servers_cpu_s.append(turn.servers_cpu_s)
        self.rates.append(turn.count / turn.wall_s)

    @property
    def least_s(self) -> float:
        return min(self.times_s)

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)

    @property
    def rate(self) -> float:
        """Repeats per second of all workers together, the median of the turns."""
        return statistics.median(self.rates)

    @property
    def cpu_s_each(self) -> float:
        """CPU seconds of all processes of the side for each repeat, the median of the turns."""
        return statistics.median(self.cpu_s)

    def cpu_s_per_gb(self, payload_bytes: float) -> float:
        """CPU seconds of all processes of the side for each GB of payload."""
        return statistics.mean(self.cpu_s) / (payload_bytes / 1e9)


@dataclass(frozen=True, slots=True)
class Plan:
    """How often: rounds of turns, each `warm` repeats uncounted and then `repeats` or `seconds` of them."""

    rounds: int
    warm: int = 0
    repeats: int = 1
    seconds: float = 0.0


class Found(dict[str, Measured]):
    """What was measured by side; `others_share` of the CPUs went to processes that are not ours meanwhile."""

    others_share: float = 0.0


def interleave(sides: Sequence[Side], task: str, plan: Plan) -> Found:
    """Measure all sides. The first turn of each, in which pages are touched and paths warm up, does not count."""
    found = Found({side.name: Measured() for side in sides})
    for side in sides:
        side.turn(task, 0, max(1, plan.warm))
    others = Others()
    for _ in range(plan.rounds):
        for side in sides:
            time.sleep(PAUSE_S)
            found[side.name].add(side.turn(task, plan.warm, plan.repeats, plan.seconds))
    found.others_share = others.share()
    return found


def best(found: Mapping[str, Measured], prefix: str) -> Measured | None:
    """The fastest, by its median, of the sides whose names begin so."""
    named = [measured for name, measured in found.items() if name.startswith(prefix)]
    return min(named, key=lambda measured: measured.median_s, default=None)
