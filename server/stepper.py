"""The one writer of a model: a thread that does, one after the other, everything that touches its arenas.

Decisions are made on the event loop, in the order in which they are submitted here; that order is the model's
history. The thread runs kernels and copies, which let go of the GIL, so the loop never waits for one of any size.
A write that breaks off half way leaves the arenas torn: no job behind it reads or steps them until they are loaded anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pushstep.proto.errors import ModelFailed

from .arena import Arenas
from .threads import DISK

T = TypeVar("T")


class Stepper:
    """First in, first out, one at a time."""

    def __init__(self, model: str, arenas: Arenas) -> None:
        self._model = model
        self._arenas = arenas
        self._thread = ThreadPoolExecutor(1, f"stepper-{model}", arenas.lane.adopt)
        self._takes_small = arenas.lane.takes_small
        self._unfinished = 0

    def submit(self, job: Callable[[], T], *, small: bool = False, mends: bool = False) -> asyncio.Future[T]:
        """Queue a job behind all earlier ones. Its result, or what it raised, comes with the future.

        A small job that has none before it is done here and now: only the event loop hands out jobs, so the thread
        stays idle meanwhile, and the way there and back costs 0.15 ms, more than a small step. ModelFailed if the
        arenas are torn when its turn comes, unless the job `mends` them.
        """
        loop = asyncio.get_running_loop()
        if small and self._takes_small and not self._unfinished:
            done: asyncio.Future[T] = loop.create_future()
            try:
                done.set_result(self._done(job, mends))
            except Exception as error:  # noqa: BLE001 - it belongs to whoever awaits the future
                done.set_exception(error)
            return done
        self._unfinished += 1
        queued = loop.run_in_executor(self._thread, self._done, job, mends)
        queued.add_done_callback(self._finished)
        return queued

    def write(self, job: Callable[[], T], *, mends: bool = False) -> asyncio.Future[T]:
        """The same for what changes the model: it is done although whoever waits for it goes away."""
        return asyncio.shield(self.submit(job, mends=mends))

    def _done(self, job: Callable[[], T], mends: bool) -> T:
        arenas = self._arenas
        if arenas.torn and not mends:
            raise ModelFailed(
                model=self._model, version=arenas.version, problem="a write before this one broke off"
            )
        return job()

    def _finished(self, _: asyncio.Future[T]) -> None:
        self._unfinished -= 1

    async def close(self) -> None:
        """Let the queue run empty and end the thread."""
        await DISK.run(self._thread.shutdown)
