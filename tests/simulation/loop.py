"""An event loop in a time of its own, in which the server's code runs as it is.

The clock jumps from one event to the next. What the server gives to threads is done in this thread, when the runner says
so: outside the loop, as in a thread, and for a pool of one thread in order. Nothing depends on anything but what was put
in, so a run can be repeated.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from pushstep.proto.errors import PushstepError

T = TypeVar("T")
Action = Callable[[], None]
# Has a piece of the server's work done, of a kind of threads, when it gets round to it.
Runner = Callable[[str, Action], None]


class SimulatedLoop(asyncio.BaseEventLoop):
    """What a run happens in: the workers, the network and the server."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        # None: each piece of work is done at once
        self.runner: Runner | None = None
        self._until_s = 0.0
        self._selector = self
        self._at_once = False
        self._numbers = iter(range(1 << 62))
        # pieces of work that the runner has, and the jobs of each pool of one thread
        self._pieces: dict[int, Action] = {}
        self._jobs: dict[Any, deque[Action]] = {}
        self._failures: list[BaseException] = []
        self.set_exception_handler(self._failed)

    def __del__(self, *_: Any) -> None:
        """It has nothing open. Calls that a failed run has left may end after it."""

    # Time.

    def time(self) -> float:
        """The simulation's."""
        return self.now_s

    def after(self, delay_s: float, action: Action) -> None:
        """Let `action` happen so much later."""
        self.call_later(max(0.0, delay_s), action)

    def advance(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Let everything happen that is due within `seconds`, or until it is `enough`; whether it was."""
        self._until_s = self.now_s + seconds
        return self.within(lambda: self._advance(enough))

    def _advance(self, enough: Callable[[], bool]) -> bool:
        while not enough():
            if not self._ready and not self._is_due():
                self.now_s = self._until_s
                return enough()
            self._run_once()
            if self._failures:
                raise self._failures[0]
        return True

    def within(self, call: Callable[[], T]) -> T:
        """Make a call as the loop would."""
        running = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            return call()
        finally:
            asyncio._set_running_loop(running)

    def complete(self, work: Coroutine[Any, Any, T]) -> T:
        """Have something done to the end at this moment, and all that threads have to do."""
        task = self.create_task(work)
        for piece in list(self._pieces.values()):
            self.call_soon(piece)
        self._at_once = True
        try:
            if not self.advance(0.0, task.done):
                raise RuntimeError("it waits for time to pass")
        finally:
            self._at_once = False
        return task.result()

    def _is_due(self) -> bool:
        while self._scheduled and self._scheduled[0].cancelled():
            self._run_once()
        return bool(self._scheduled) and self._scheduled[0].when() <= self._until_s

    # What the base class waits on: nothing is ever read or written.

    def select(self, timeout: float | None) -> list[Any]:
        """Wait until the next event."""
        if timeout and self._scheduled and self._scheduled[0].when() <= self._until_s:
            self.now_s = max(self.now_s, self._scheduled[0].when())
        return []

    def _process_events(self, events: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _failed(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._failures.append(context.get("exception") or RuntimeError(context["message"]))

    def create_task(self, work: Coroutine[Any, Any, T], **options: Any) -> asyncio.Task[T]:  # type: ignore[override]
        """A task. What it raises ends the run at once, unless it is an error of the catalogue."""
        task: asyncio.Task[T] = super().create_task(work, **options)
        task.add_done_callback(self._ended)
        return task

    def fail(self, problem: BaseException) -> None:
        """End the run."""
        self._failures.append(problem)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        problem = None if task.cancelled() else task.exception()
        if problem is not None and not isinstance(problem, PushstepError):
            self.fail(problem)

    # Threads.

    def run_in_executor(self, pool: Any, job: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Do a job when the runner gets round to it; in a pool of one thread behind the jobs before it."""
        assert isinstance(pool, ThreadPoolExecutor)
        future = self.create_future()
        piece = partial(self._do, future, job, arguments)
        if pool._max_workers > 1:
            self._run(pool, piece)
            return future
        jobs = self._jobs.setdefault(pool, deque())
        jobs.append(piece)
        if len(jobs) == 1:
            self._run(pool, partial(self._do_all, jobs))
        return future

    def _run(self, pool: ThreadPoolExecutor, piece: Action) -> None:
        number = next(self._numbers)

        def once() -> None:
            if self._pieces.pop(number, None) is not None:
                piece()

        self._pieces[number] = once
        if self._at_once or self.runner is None:
            self.call_soon(once)
        else:
            self.runner(pool._thread_name_prefix.partition("-")[0], once)

    def _do_all(self, jobs: deque[Action]) -> None:
        while jobs:
            jobs[0]()
            jobs.popleft()

    def _do(self, future: asyncio.Future[Any], job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if future.done():
            return  # cancelled before a thread took it
        running = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        try:
            tell = partial(future.set_result, job(*arguments))
        except Exception as error:  # noqa: BLE001 - it belongs to whoever awaits the future
            tell = partial(future.set_exception, error)
        finally:
            asyncio._set_running_loop(running)
        self.call_soon(lambda: None if future.done() else tell())
