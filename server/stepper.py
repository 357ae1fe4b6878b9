"""The one writer of a model: a thread that does, one after the other, everything that touches its arenas.

Decisions are made on the event loop, in the order in which they are submitted here; that order is the model's
history. The thread runs kernels and copies, which let go of the GIL, so the loop never waits for one of any size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .device import Lane

T = TypeVar("T")


class Stepper:
    """First in, first out, one at a time."""

    def __init__(self, model: str, lane: Lane) -> None:
        self._thread = ThreadPoolExecutor(1, f"stepper-{model}", lane.adopt)
        self._takes_small = lane.takes_small
        self._unfinished = 0

    def submit(self, job: Callable[[], T], *, small: bool = False) -> asyncio.Future[T]:
        """Queue a job behind all earlier ones. Its result, or what it raised, comes with the future.

        A small job that has none before it is done here and now: only the event loop hands out jobs, so the thread
        stays idle meanwhile, and the way there and back costs 0.15 ms, more than a small step.
        """
        loop = asyncio.get_running_loop()
        if small and self._takes_small and not self._unfinished:
            done: asyncio.Future[T] = loop.create_future()
            try:
                done.set_result(job())
            except Exception as error:  # noqa: BLE001 - it belongs to whoever awaits the future
                done.set_exception(error)
            return done
        self._unfinished += 1
        queued = loop.run_in_executor(self._thread, job)
        queued.add_done_callback(self._finished)
        return queued

    def _finished(self, _: asyncio.Future[T]) -> None:
        self._unfinished -= 1

    async def close(self) -> None:
        """Let the queue run empty and end the thread."""
        await asyncio.to_thread(self._thread.shutdown)
