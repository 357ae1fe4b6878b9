"""One time for several processes: each has an event loop of its own, and the next event of all happens next."""

from __future__ import annotations

import asyncio
import heapq
import warnings
from collections.abc import Callable
from typing import Any

from pushstep.proto.errors import PushstepError
from tests.simulation.loop import Action, SimulatedLoop

# A coroutine may wait so often while it is closed.
CLOSES = 20


class ProcessEnds(SystemExit):
    """A process ends at once, in the middle of what it does, as by os._exit."""


class World:
    """The clock, what happens between processes, and their loops."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.loops: list[ProcessLoop] = []
        self._actions: list[tuple[float, int, Action]] = []
        self._number = 0
        self._failures: list[BaseException] = []

    def after(self, delay_s: float, action: Action) -> None:
        """Let `action` happen so much later, outside of all processes."""
        self._number += 1
        heapq.heappush(self._actions, (self.now_s + max(0.0, delay_s), self._number, action))

    def fail(self, problem: BaseException) -> None:
        """End the run."""
        self._failures.append(problem)

    def advance(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Let everything happen that is due within `seconds`, or until it is `enough`; whether it was."""
        until_s = self.now_s + seconds
        while not enough():
            at_s, which = self._actions[0][0] if self._actions else float("inf"), None
            for loop in self.loops:
                next_s = loop.next_s()
                if next_s < at_s:
                    at_s, which = next_s, loop
            if at_s > until_s:
                self.now_s = until_s
                return enough()
            self.now_s = max(self.now_s, at_s)
            if which is None:
                heapq.heappop(self._actions)[2]()
            else:
                which.turn()
            if self._failures:
                raise self._failures[0]
        return True


class ProcessLoop(SimulatedLoop):
    """The event loop of one process, in the world's time."""

    def __init__(self, world: World, on_exit: Action = lambda: None) -> None:
        self.world = world
        super().__init__()
        self._on_exit = on_exit
        world.loops.append(self)

    @property
    def now_s(self) -> float:
        """The world's time."""
        return self.world.now_s

    @now_s.setter
    def now_s(self, _: float) -> None:
        """Only the world lets time pass."""

    def next_s(self) -> float:
        """When something happens here next."""
        if self._ready:
            return self.now_s
        while self._scheduled and self._scheduled[0].cancelled():
            self._timer_cancelled_count -= 1
            heapq.heappop(self._scheduled)._scheduled = False
        return max(self.now_s, self._scheduled[0].when()) if self._scheduled else float("inf")

    def turn(self) -> None:
        """Let happen what is due."""
        try:
            self.within(self._run_once)
        except ProcessEnds:
            self._on_exit()
        if self._failures:
            raise self._failures[0]

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Nobody waits any more for what an error of the catalogue says, or for what is of a process that is gone."""
        if "task" not in context and not isinstance(context.get("exception"), PushstepError | SystemExit):
            super()._failed(loop, context)

    def fail(self, problem: BaseException) -> None:
        self.world.fail(problem)

    def kill(self) -> None:
        """Nothing happens here any more."""
        self.world.loops.remove(self)
        for task in asyncio.all_tasks(self):
            task._log_destroy_pending = False
            self.within(lambda task=task: _end(task.get_coro()))
        self._ready.clear()
        self._scheduled.clear()


def _end(coroutine: Any) -> None:
    """Close a coroutine of a process that is gone, before the interpreter does. What it does meanwhile reaches nobody."""
    for _ in range(CLOSES):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # what it was about to start is never awaited
                coroutine.close()
        except RuntimeError:  # it waits for something before it ends: that never comes
            continue
        except ProcessEnds:
            pass
        return
