"""A job of many ranks and workers as a queue of events: who computes, sends or waits when, at costs that were measured.

Each process has an interpreter, which does one thing at a time, and the cores of its machine, which do what needs no
interpreter. Each machine has a link: a byte takes its time on the sender's way out and on the receiver's way in, and then
every message the latency. All queues are first come, first served, but that an interpreter that wants a core gets the next one.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from pushstep.proto.wire.frames import CHUNK_BYTES

from .scale_costs import Costs

Then = Callable[[], None]
# From this share of the time on something is called saturated.
SATURATED: Final = 0.8
# How unequal equal work is: the spread of a lognormal factor whose mean is 1.
SPREAD: Final = 0.3
SLOW_WORKER_TIMES: Final = 4.0
SLOW_RANK_TIMES: Final = 2.0
_random = random.Random(7)
_FACTORS: Final = [_random.lognormvariate(-(SPREAD**2) / 2, SPREAD) for _ in range(4099)]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a job runs. `is_one_machine`: all processes share its cores, and its link takes no time."""

    cores: int
    bytes_per_s: float
    latency_s: float
    is_one_machine: bool = False
    # the share of the cores that strangers have
    others_share: float = 0.0
    # processes of the workers; None: one for each
    worker_processes: int | None = None
    # of so many workers one is SLOW_WORKER_TIMES as slow; 0: none. And the last rank SLOW_RANK_TIMES as slow
    slow_workers: int = 0
    has_slow_rank: bool = False


class Clock:
    """What happens next."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Then]] = []

    def after(self, delay_s: float, then: Then) -> None:
        """Have something happen."""
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._order), then))

    def run(self, until: Callable[[], bool]) -> None:
        """Let everything happen until something is the case."""
        while not until():
            self.now_s, _, then = heapq.heappop(self._events)
            then()


class Cores:
    """The cores of a machine."""

    def __init__(self, clock: Clock, count: int, slower_by: float) -> None:
        self._clock = clock
        self._free = self.count = count
        self._slower_by = slower_by
        self._waiting: deque[tuple[float, Callable[[float], None]]] = deque()
        self._factors = itertools.cycle(_FACTORS)
        self.busy_s = 0.0

    def use(self, cost_s: float, then: Then) -> None:
        """Compute for so long, once one is free."""
        if self._free:
            self._begin(cost_s, lambda _: then())
        else:
            self._waiting.append((cost_s, lambda _: then()))

    def use_first(self, cost_s: float, then: Callable[[float], None]) -> None:
        """The same for an interpreter, before bytes that wait. `then` is told how long it took, without the wait."""
        if self._free:
            self._begin(cost_s, then)
        else:
            self._waiting.appendleft((cost_s, then))

    def _begin(self, cost_s: float, then: Callable[[float], None]) -> None:
        self._free -= 1
        takes_s = cost_s * self._slower_by * next(self._factors)
        self.busy_s += takes_s

        def end() -> None:
            self._free += 1
            if self._waiting:
                self._begin(*self._waiting.popleft())
            then(takes_s)

        self._clock.after(takes_s, end)


class Interpreter:
    """One process's Python, on the cores of its machine."""

    def __init__(self, cores: Cores) -> None:
        self._cores = cores
        self._is_used = False
        self._waiting: deque[tuple[float, Then]] = deque()
        self.busy_s = 0.0

    def use(self, cost_s: float, then: Then) -> None:
        """Run for so long, once it is free and then a core."""
        self._waiting.append((cost_s, then))
        if not self._is_used:
            self._next()

    def _next(self) -> None:
        self._is_used = bool(self._waiting)
        if not self._waiting:
            return
        cost_s, then = self._waiting.popleft()

        def end(took_s: float) -> None:
            self.busy_s += took_s
            self._next()
            then()

        self._cores.use_first(cost_s, end)


class Wire:
    """One direction of a machine's link."""

    def __init__(self, clock: Clock, bytes_per_s: float) -> None:
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self.busy_s = 0.0

    def carry(self, size_bytes: int, latency_s: float, then: Then) -> None:
        """Send so many bytes after those that wait already."""
        takes_s = size_bytes / self._bytes_per_s
        self.busy_s += takes_s
        self._free_s = max(self._free_s, self._clock.now_s) + takes_s
        self._clock.after(self._free_s - self._clock.now_s + latency_s, then)


class Process:
    """A rank, or some workers."""

    def __init__(self, clock: Clock, setting: Setting, cores: Cores | None, slower_by: float) -> None:
        self.cores = cores or Cores(clock, setting.cores, slower_by / (1 - setting.others_share))
        self.interpreter = Interpreter(self.cores)
        # out of a worker, into a rank: the other direction carries a few hundred bytes for each push
        self.wire = Wire(clock, setting.bytes_per_s / slower_by)


@dataclass(slots=True, eq=False)
class Push:
    """One push under way."""

    worker: Process
    chunks: dict[int, int]
    # parts that are not whole yet, ranks that have not stepped, ranks that have not answered
    unstaged: int
    unstepped: int
    unanswered: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Pushes per second, and what share of its time each kind of thing was busy, of the busiest of the kind."""

    rate: float
    busy: dict[str, float] = field(default_factory=dict)

    @property
    def saturated(self) -> str:
        """What is busy all the time, or '' if that is nothing but the workers."""
        name, share = max(self.busy.items(), key=lambda each: each[1])
        return name if share >= SATURATED else ""


class Simulation:
    """A job whose workers push without rest, each its next push when it has the receipt of the last."""

    def __init__(self, costs: Costs, parts: Sequence[int], workers: int, setting: Setting) -> None:
        self._clock = Clock()
        self._costs = costs
        self._setting = setting
        shared = None
        if setting.is_one_machine:
            shared = Cores(self._clock, setting.cores, 1 / (1 - setting.others_share))
        # by rank, the bytes of those that have a part
        self._parts = {rank: size for rank, size in enumerate(parts) if size}
        self._is_alone = len(parts) == 1
        last = len(parts) - 1
        self._ranks = [
            Process(
                self._clock,
                setting,
                shared,
                SLOW_RANK_TIMES if setting.has_slow_rank and rank == last else 1.0,
            )
            for rank in range(len(parts))
        ]
        self._workers = [
            Process(
                self._clock,
                setting,
                shared,
                SLOW_WORKER_TIMES if setting.slow_workers and (n + 1) % setting.slow_workers == 0 else 1.0,
            )
            for n in range(min(workers, setting.worker_processes or workers))
        ]
        self._done = 0
        for number in range(workers):
            self._begin(self._workers[number % len(self._workers)])

    def run(self, warm: int, pushes: int) -> Outcome:
        """Let so many pushes go by uncounted, and then count so many."""
        self._clock.run(lambda: self._done >= warm)
        since_s, busy_before = self._clock.now_s, self._busy()
        self._clock.run(lambda: self._done >= warm + pushes)
        elapsed_s = self._clock.now_s - since_s
        kinds: dict[str, float] = {}
        for (kind, place), busy_s in self._busy().items():
            share = (busy_s - busy_before[kind, place]) / elapsed_s
            kinds[kind] = max(kinds.get(kind, 0.0), share)
        return Outcome(pushes / elapsed_s, kinds)

    def _busy(self) -> dict[tuple[str, int], float]:
        found = {}
        for rank, process in enumerate(self._ranks):
            name = "rank 0" if rank == 0 else "a rank"
            if not self._setting.is_one_machine:
                found[f"{name}'s cores", rank] = process.cores.busy_s / process.cores.count
            found[f"{name}'s interpreter", rank] = process.interpreter.busy_s
            found[f"{name}'s link", rank] = process.wire.busy_s
        if self._setting.is_one_machine:
            cores = self._ranks[0].cores
            found["the machine's cores", 0] = cores.busy_s / cores.count
        return found

    # A push's way.

    def _begin(self, worker: Process) -> None:
        parts, costs = self._parts, self._costs
        chunks = {rank: -(-size // CHUNK_BYTES) for rank, size in parts.items()}
        push = Push(worker, chunks, len(parts), len(parts), len(parts))

        def made() -> None:
            # rank 0's last, as workers do
            for rank in reversed(parts):
                send = partial(self._send, push, rank, parts[rank])
                worker.interpreter.use(costs.worker_of(parts[rank]) / 2, send)

        worker.interpreter.use(costs.worker_s / 2, made)

    def _send(self, push: Push, rank: int, left: int) -> None:
        """Send the next chunk of a part, and then those behind it."""
        size, to, costs = min(left, CHUNK_BYTES), self._ranks[rank], self._costs

        def encoded() -> None:
            push.worker.wire.carry(size, self._setting.latency_s, lambda: to.wire.carry(size, 0.0, came))
            if left > size:
                self._send(push, rank, left - size)

        def came() -> None:
            to.cores.use(size * costs.server_byte_s, lambda: self._arrived(push, rank))

        push.worker.cores.use(size * costs.worker_byte_s, encoded)

    def _arrived(self, push: Push, rank: int) -> None:
        push.chunks[rank] -= 1
        if push.chunks[rank]:
            return
        if rank == 0:
            self._rank_works(0, partial(self._staged, push))
        else:
            self._rank_works(rank, lambda: self._say(self._staged, push))

    def _rank_works(self, rank: int, then: Then) -> None:
        """Half of what a part costs a rank: until it is staged, and its step."""
        cost_s = self._costs.server_of(self._parts[rank], is_alone=self._is_alone) / 2
        self._ranks[rank].interpreter.use(cost_s, then)

    @property
    def _third_s(self) -> float:
        """Of what another rank costs rank 0 for each push: it hears of the part, sends a ticket, hears of the step."""
        return self._costs.each_rank_s / 3

    def _say(self, heard: Callable[[Push], None], push: Push) -> None:
        """Tell rank 0 of a push."""
        hear = partial(self._ranks[0].interpreter.use, self._third_s, partial(heard, push))
        self._clock.after(self._setting.latency_s, hear)

    def _staged(self, push: Push) -> None:
        push.unstaged -= 1
        if push.unstaged:
            return
        others = len(self._parts) - 1
        cost_s = 0.0 if self._is_alone else self._costs.zero_s + others * self._third_s
        self._ranks[0].interpreter.use(cost_s, partial(self._ticket, push))

    def _ticket(self, push: Push) -> None:
        self._rank_works(0, partial(self._stepped, push))
        for rank in self._parts:
            if rank:
                step = partial(self._rank_works, rank, partial(self._other_stepped, push, rank))
                self._clock.after(self._setting.latency_s, step)

    def _other_stepped(self, push: Push, rank: int) -> None:
        self._answer(push, rank)
        self._say(self._stepped, push)

    def _stepped(self, push: Push) -> None:
        push.unstepped -= 1
        if not push.unstepped:
            self._answer(push, 0)

    def _answer(self, push: Push, rank: int) -> None:
        cost_s = self._costs.worker_of(self._parts[rank]) / 2
        hear = partial(push.worker.interpreter.use, cost_s, partial(self._answered, push))
        self._clock.after(self._setting.latency_s, hear)

    def _answered(self, push: Push) -> None:
        push.unanswered -= 1
        if not push.unanswered:
            push.worker.interpreter.use(self._costs.worker_s / 2, partial(self._over, push))

    def _over(self, push: Push) -> None:
        self._done += 1
        self._begin(push.worker)
