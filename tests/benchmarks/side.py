"""One side of a comparison: its crews in their drivers, and what a turn of it cost.

A turn is a few repeats of one task by all workers of the side. CPU time is what all its processes used during the
turn, servers and children too, so that a server which spins or copies in the background pays for it.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .driver import Driver, DriverEnded, Make, Span
from .machine import cpu_s, descendants

TOGETHER_S = 0.05  # within which all drivers of a side have got their request
_crew_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn took: each worker's spans, and CPU seconds for each repeat; of those, the servers'."""

    spans: list[list[Span]]
    cpu_s: float
    servers_cpu_s: float = 0.0

    @property
    def times_s(self) -> list[float]:
        """Each repeat's own time; of several workers, a round's: the whole turn's share."""
        if len(self.spans) == 1:
            return [end - begin for begin, end in self.spans[0]]
        return [self.wall_s / min(map(len, self.spans))]

    @property
    def wall_s(self) -> float:
        """From the first begin to the last end."""
        begin = min(spans[0][0] for spans in self.spans)
        return max(spans[-1][1] for spans in self.spans) - begin

    @property
    def count(self) -> int:
        """Repeats done by all workers together."""
        return sum(map(len, self.spans))


@dataclass
class Side:
    """Owns its crews (not their drivers). `servers` are processes beside the drivers whose CPU time counts."""

    name: str
    crews: Sequence[tuple[Driver, int]]
    servers: Sequence[int] = ()
    # of our own: where it is, and how an operator changes it
    address: str = ""
    model: str = ""
    patch: Callable[[str, dict[str, object]], None] | None = field(default=None, repr=False)
    on_close: Callable[[], None] | None = field(default=None, repr=False)

    def turn(self, task: str, warm: int, repeats: int, seconds: float = 0.0) -> Turn:
        """Have every worker do the task `warm` times uncounted, then `repeats` times or for `seconds`."""
        servers = descendants(self.servers)
        pids = descendants([driver.pid for driver, _ in self.crews]) - servers
        before_s, servers_before_s = sum(map(cpu_s, pids)), sum(map(cpu_s, servers))
        # drivers that work together begin to count together
        start_s = time.perf_counter() + (TOGETHER_S if seconds else 0.0)
        for driver, crew in self.crews:
            driver.begin("turn", crew, task, warm, repeats, seconds, start_s)
        spans = [span for driver, _ in self.crews for span in driver.answer()]
        servers_used_s = sum(map(cpu_s, servers)) - servers_before_s
        used_s = sum(map(cpu_s, pids)) - before_s + servers_used_s
        repeats_done = sum(warm + len(one) for one in spans)
        return Turn(spans, used_s / repeats_done, servers_used_s / repeats_done)

    def close(self) -> None:
        """Close the workers."""
        with contextlib.suppress(DriverEnded):  # whatever ended it has been raised
            for driver, crew in self.crews:
                driver.begin("shut", crew)
            for driver, _ in self.crews:
                driver.answer()
        if self.on_close is not None:
            self.on_close()


def side_of(
    name: str, make: Make, drivers: Sequence[Driver], arguments: Sequence[Sequence[object]], **more: object
) -> Side:
    """A side with one crew in each driver, made at the same time: a process group's ranks wait for each other."""
    numbers = [next(_crew_numbers) for _ in drivers]
    for driver, number, own in zip(drivers, numbers, arguments, strict=True):
        driver.begin("open", number, make, tuple(own))
    for driver in drivers:
        driver.answer()
    return Side(name, list(zip(drivers, numbers, strict=True)), **more)  # type: ignore[arg-type]
